"""All numbers of an answer at once: each is asked for as if those before it were hidden.

A policy that was trained with hidden values ([`VLADataCollator`]) can answer number 17 while 1 to 16 are placeholders.
So one pass reads the answer as the collator writes it with all numbers hidden, the *trunk*, and its logits begin every
number. Where a number takes several tokens, each number is a *branch*: it sees the prompt, the trunk up to where it
begins, and its own tokens so far, at the positions that they have in a training row in which exactly the numbers
before it are hidden. All branches advance in the same pass, so an answer takes as many passes as a number has tokens.

Example: two numbers up to 12, one token per digit, the prompt fills cache slots 0 to 3. The first pass reads the
prompt and the trunk " ? ", and both of its spaces begin a number. Behind it each branch has two slots, as a number
has two digits at most. Say both numbers begin with "1". The second pass reads

    token  position  cache_slot  visible_until  visible_from    slot 0 1 2 3 4 5 6 7 8 9
    "1"           1           7              4             7         x x x x x . . x . .
    "1"           3           9              6             9         x x x x x x x . . x

and chooses a second digit for each, or that the number ends there. After "12" nothing may follow: it is whole.

In further rounds the numbers that the model is least sure of are hidden and asked again, and see the others before
them (mask-predict, Ghazvininejad et al. 2019): with k rounds k of k + 1 parts of all numbers, then k − 1, and
finally one. How sure it is: the probability of the number among all that the grammar allows.

A branch only writes the spelling that training showed, and ends where the model prefers a token that begins the next
number, or the end of the turn. So every answer is one that the grammar allows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from vla0_trl.policy.grammar import ActionGrammar, LogitsError
from vla0_trl.policy.speculative.spellings import Spellings
from vla0_trl.policy.speculative.tree_forward import TreeForward
from vla0_trl.processing.branches import BranchedAnswer, branch_tokens, text_tokens
from vla0_trl.processing.chat_tokenizer import ChatTokenizer


@dataclass
class Reading:
    """The answers to B prompts.

    Attributes:
        numbers (`np.ndarray`): int (B, N) in 0…num_bins.
        log_probs (`np.ndarray`): float (B, N), of these numbers, when they were asked last; 0 where they are given.
        unrefined, asked, trunks, roots, logits: of the first round: its numbers; which were asked, bool (B, N); see
            [`BranchedAnswer.trunk`]; and float32 (B, longest trunk + 1, columns), last after the prompt.
        chose (`list`): of the first round, the logits float32 (B, N, columns) that chose each number's first token,
            its second, …
    """

    numbers: np.ndarray
    log_probs: np.ndarray
    unrefined: np.ndarray
    asked: np.ndarray
    trunks: list[list[int]]
    roots: np.ndarray
    logits: np.ndarray
    chose: list[np.ndarray] = field(default_factory=list)

    def least_sure(self, share: float) -> np.ndarray:
        """Which numbers, bool (B, N), a share of those that were asked, the model is least sure of."""
        rank = np.where(self.asked, self.log_probs, np.inf).argsort(1, kind="stable").argsort(1)
        return rank < np.ceil(self.asked.sum(1, keepdims=True) * share - 1e-9)


class ParallelReader:
    """Reads all numbers of an answer at once.

    Args:
        chat ([`ChatTokenizer`]): how numbers, and placeholders for hidden ones, are written.
        grammar ([`ActionGrammar`]): of the answers.

    Attributes:
        num_slots (`int`): of the cache, that an answer needs behind its prompt.

    `ValueError`: chat and grammar disagree about the answer, or numbers can't be told apart by their tokens.
    """

    def __init__(self, chat: ChatTokenizer, grammar: ActionGrammar):
        ours, theirs = (grammar.num_values, grammar.num_bins), (chat.config.num_values, chat.config.num_bins)
        if ours != theirs:
            raise ValueError(
                f"the grammar is of {ours[0]} integers up to {ours[1]}, the config of {theirs[0]} up to {theirs[1]}"
            )
        self.chat_tokenizer, self.num_values, self.end_of_turn_id = chat, grammar.num_values, grammar.end_of_turn_id
        self.branched = BranchedAnswer(chat)
        spelled, shared = self.branched.spelled, self.branched.shared
        self.tree = Spellings(grammar)
        first, other = (
            self.tree.add(tokens[skip:] for tokens in numbers) for numbers, skip in zip(spelled, shared, strict=True)
        )
        self.tree.freeze()
        self.begin = np.array([first] + [other] * (self.num_values - 1))
        self.ends = np.zeros((self.num_values, len(self.tree.token_ids)), bool)
        self.ends[:-1, self.tree.columns({tokens[0] for tokens in spelled[1]})] = True
        self.ends[-1, self.tree.columns([self.end_of_turn_id])] = True
        may_go_on = (self.tree.child[self.tree.number >= 0] >= 0).any(0)
        if (may_go_on & self.ends.any(0)).any():
            raise ValueError("this tokenizer has a token that may continue a number or begin the next one")
        longest = max(len(self.branched.hidden[1]), *(len(tokens) for tokens in (*spelled[0], *spelled[1])))
        self.num_slots = self.num_values * (longest + self.tree.depth)

    def answer(self, numbers: np.ndarray) -> list[int]:
        """Ids of an answer of these numbers, from the prefix through the end of the turn."""
        return [*self.chat_tokenizer.encode_beginning(numbers), self.end_of_turn_id]

    def parse(self, tokens: list[int]) -> list[int]:
        """The numbers that an answer begins with; `ValueError` if these are not the ids of whole numbers."""
        numbers: list[int] = []
        while len(spelled := self.chat_tokenizer.encode_beginning(numbers)) < len(tokens):
            node = self.begin[len(numbers)]
            for column in self.tree.columns(tokens[len(spelled) + self.branched.shared[min(len(numbers), 1)] :]):
                if self.tree.child[node, column] < 0:
                    break
                node = self.tree.child[node, column]
            numbers.append(int(self.tree.number[node]))
            if numbers[-1] < 0:
                break
        if numbers[-1:] == [-1] or spelled != tokens:
            raise ValueError(f"an answer can't begin with the tokens {tokens}: these are not whole numbers")
        return numbers

    def read(
        self,
        forward: TreeForward,
        first_slot: int,
        read_prompt: Callable[[list[list[int]]], np.ndarray],
        given: list[list[int]],
        refine: int = 0,
    ) -> Reading:
        """Read prompts and all numbers.

        Args:
            forward: with room for `num_slots` in its cache.
            first_slot: of the answers.
            read_prompt: reads the prompts and these ids behind them: float32 (B, longest + 1, columns), the logits
                after each id and, last, after the prompt.
            given: B times the numbers that the answer begins with, which are not asked.
            refine: further rounds; see the module.
        """
        shape = (forward.rows, self.num_values)
        numbers, asked = np.zeros(shape, np.int64), np.ones(shape, bool)
        for row, known in enumerate(given):
            numbers[row, : len(known)], asked[row, : len(known)] = known, False
        trunks, roots = self._trunks(numbers, asked)
        logits = read_prompt(trunks)
        reading = Reading(numbers, np.zeros(shape), numbers, asked, trunks, roots, logits)
        reading.chose = self._ask(forward, first_slot, reading, logits, roots, asked)
        reading.unrefined = numbers.copy()
        for round_ in range(refine):
            again = reading.least_sure((refine - round_) / (refine + 1))
            trunks, roots = self._trunks(numbers, again)
            read = [forward.step(_row_tokens(forward, first_slot, trunks))] if any(trunks) else []
            # What follows the prompt directly sees no number, so its logits stay.
            logits = np.concatenate([*read, reading.logits[:, -1:]], 1)
            self._ask(forward, first_slot, reading, logits, roots, again)
        return reading

    def _trunks(self, numbers: np.ndarray, hidden: np.ndarray) -> tuple[list[list[int]], np.ndarray]:
        trunks, roots = zip(*map(self.branched.trunk, numbers, hidden), strict=True)
        return list(trunks), np.array(roots)

    def _ask(self, forward: TreeForward, first_slot: int, reading: Reading, logits, roots, asked) -> list[np.ndarray]:
        """Write the asked numbers, bool (B, N), into a reading, from the logits of their trunks; reads the rest.

        Returns the logits that chose each token of the numbers, float32 (B, N, columns).
        """
        logits = np.take_along_axis(logits, roots[..., None], 1)
        node, open_ = np.broadcast_to(self.begin, asked.shape), asked.copy()
        branches = first_slot + roots.max() + 1  # the slots behind all trunks
        reading.log_probs[asked] = 0
        chose: list[np.ndarray] = []
        while True:
            chose.append(logits)
            node, whole, log_probs = self.step(node, logits)
            if np.isnan(log_probs[open_]).any():
                raise LogitsError
            reading.log_probs[open_] += log_probs[open_]
            reading.numbers[open_ & whole] = self.tree.number[node[open_ & whole]]
            open_ &= ~whole
            if not open_.any():
                return chose
            rows, positions = np.nonzero(open_)
            places = (open_.cumsum(1) - 1)[rows, positions]
            begins = branches + positions * self.tree.depth
            ids = self.tree.token_id[node[rows, positions]]
            token = branch_tokens(ids, roots[rows, positions], len(chose), begins, first_slot)
            tokens = forward.padding(places.max() + 1)
            tokens[rows, places] = np.stack(token, -1)
            logits = np.zeros((*asked.shape, len(self.tree.token_ids)), np.float32)
            logits[rows, positions] = forward.step(tokens)[rows, places]

    def allowed(self, node: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """bool (…, columns): what may follow these nodes (…), and `ends` (…, columns) where they are whole."""
        return (self.tree.child[node] >= 0) | ((self.tree.number[node] >= 0)[..., None] & ends)

    def step(self, node: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Choose what follows in each branch.

        Args:
            node: (B, N) what was written of each number, see [`Spellings`].
            logits: float32 (B, N, columns) after that.

        Returns:
            the next node, or the same where the number ends; bool, whether the number is whole; and the
            log-probability of the choice among those that are allowed.
        """
        tree, allowed = self.tree, self.allowed(node, self.ends)
        # Clamped: a forbidden token must lose against an allowed one of score −inf, too.
        scores = np.where(allowed, np.maximum(logits[..., tree.order], np.finfo(np.float32).min), -np.inf)
        column, best = scores.argmax(-1), scores.max(-1, keepdims=True)
        log_probs = -np.log(np.exp(scores - best).sum(-1))
        child = tree.child[node, column]
        after = np.where(child < 0, node, child)
        return after, (child < 0) | tree.leaf[after], log_probs


def _row_tokens(forward: TreeForward, first_slot: int, rows: list[list[int]]) -> np.ndarray:
    """[`PassToken`]s of plain text behind the prompts, (B, longest, 5)."""
    tokens = forward.padding(max(map(len, rows)))
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = np.stack(text_tokens(ids, np.arange(len(ids)), first_slot), -1)
    return tokens
