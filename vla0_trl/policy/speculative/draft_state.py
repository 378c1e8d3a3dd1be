"""An answer while it is written: its certain tokens, the tokens that the next pass reads, and how logits choose.

Plain Python on the host: a token costs a few microseconds, a pass of the smallest model two milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vla0_trl.policy.grammar import ActionGrammar, LogitsError
from vla0_trl.processing.branches import PassToken

# Tokens guessed in one pass: from a draft, and from the answer's own last step, which is right less often.
LARGEST_WINDOW, FIRST_WINDOW = 64, 8


class Speller:
    """The grammar for one row: tokens by column of its tables, and the tokens that it forces.

    Args:
        grammar: shared by all rows.
        forced_tokens: write a token without alternative at once; otherwise it needs a pass like any other.
    """

    def __init__(self, grammar: ActionGrammar, forced_tokens: bool = True):
        self.grammar, self.forced_tokens = grammar, forced_tokens
        self.token_ids: list[int] = grammar.token_ids.tolist()
        self.column = {token: column for column, token in enumerate(self.token_ids)}
        self._next_state: list[list[int]] = grammar.next_state.tolist()
        self._finishes: list[int] = grammar.finishes.tolist()

    def after(self, count: int, state: int, column: int) -> tuple[int, int]:
        """Numbers finished and state of the grammar, one token later."""
        return count + self._finishes[column], self._next_state[state][column]

    def forced(self, count: int, state: int) -> int | None:
        """The column that must follow; None if several may."""
        if not self.forced_tokens or state == self.grammar.done:
            return None
        choices = self.grammar.choices(count, state)
        return choices[0] if len(choices) == 1 else None


class Guess:
    """Text that an answer is guessed to repeat: a draft, or what was written before.

    It is looked up by the state of the grammar, so a row that left it finds it again at the next number: behind a
    space, or, where " 12" is one token, behind the same count of numbers.
    """

    def __init__(self, speller: Speller, older: Guess | None = None):
        self.speller, self.older = speller, older  # the older one is asked where this one knows nothing
        self.columns: list[int] = []
        self._begins: dict[tuple[int, int], int] = {}
        self._next_numbers: dict[int, int] = {}

    def add(self, count: int, state: int, column: int) -> None:
        """`column` was written after `count` finished numbers, in this state of the grammar."""
        self._begins.setdefault((count, state), len(self.columns))
        after, started = self.speller.after(count, state, column)
        if after > count and started != self.speller.grammar.open:
            self._next_numbers.setdefault(count, len(self.columns))
        self.columns.append(column)

    def after(self, count: int, state: int) -> list[int]:
        """The columns that followed this count and state; empty if they did not occur."""
        begin = self._begins.get((count, state), self._next_numbers.get(count))
        if begin is not None:
            return self.columns[begin:]
        return [] if self.older is None else self.older.after(count, state)

    @classmethod
    def of(cls, speller: Speller, tokens: list[int]) -> Guess:
        """From the ids of a whole answer, prefix through end of turn. Ends where they leave the grammar."""
        guess, place = cls(speller), (speller.grammar.initial_count, speller.grammar.initial_state)
        for token in tokens:
            column = speller.column.get(token)
            if column is None or column not in speller.grammar.choices(*place):
                break
            guess.add(*place, column)
            place = speller.after(*place, column)
        return guess


@dataclass
class Tree:
    """Tokens of one row for one pass: certain ones, then a guess that continues them, or candidates side by side.

    Attributes:
        last (`int`): index of the last certain token, where choosing begins; −1 is the prompt's last.
        tokens (`list`): what the pass reads, see [`PassToken`].
        children (`dict`): (index of a token, column that follows it) -> index of that token.
        guess (`list`): the columns that are guessed, in order.
    """

    last: int
    tokens: list[PassToken] = field(default_factory=list)
    children: dict[tuple[int | None, int], int] = field(default_factory=dict)
    guess: list[int] = field(default_factory=list)


class DraftState:
    """One row's answer. Its `tokens` are certain; the first `read` of them are in the cache.

    Args:
        speller: shared by all rows.
        draft: ids of a guess of the whole answer.
        period: without a draft, each number is guessed to equal the one `period` numbers before it.
        noise: float32 (most tokens of an answer, columns), added to logits before a token is chosen.
    """

    def __init__(
        self,
        speller: Speller,
        draft: list[int] | None = None,
        period: int | None = None,
        noise: np.ndarray | None = None,
    ):
        self.speller, self.grammar = speller, speller.grammar
        self.noise = noise
        self.tokens: list[int] = []
        self.read = 0
        self.count, self.state = self.grammar.initial_count, self.grammar.initial_state
        self.draft = None if draft is None else Guess.of(speller, draft)
        self.period, self.written = period, Guess(speller)
        self.window = FIRST_WINDOW if draft is None else LARGEST_WINDOW
        self.drafted = self.accepted = 0  # tokens
        self.scores: list[tuple[int, np.ndarray]] = []  # place in the answer, and the logits that chose its token
        self._write_forced()

    @property
    def done(self) -> bool:
        return self.state == self.grammar.done

    def guess(self, limit: int) -> list[int]:
        """At most `limit` columns that are guessed to come next, in order; empty where nothing suggests any."""
        if self.draft is not None:
            columns = self.draft.after(self.count, self.state)
        elif self.period is not None:
            columns = self.written.after(self.count - self.period, self.state)
        else:
            return []
        return columns[: min(limit, self.window, self.grammar.max_new_tokens - len(self.tokens))]

    def candidates(self) -> list[list[int]]:
        """Columns of each token that may come next and of what it forces, except where that ends the answer."""
        candidates = []
        for column in self.grammar.choices(self.count, self.state):
            path, place = [column], self.speller.after(self.count, self.state, column)
            while (forced := self.speller.forced(*place)) is not None:
                path.append(forced)
                place = self.speller.after(*place, forced)
            if place[1] != self.grammar.done:
                candidates.append(path)
        return candidates

    def grow(self, first_slot: int, guess: list[int], candidates: list[list[int]]) -> Tree:
        """The tokens that the next pass reads.

        Args:
            first_slot: cache slot of the answer's first token.
            guess: columns that follow the certain tokens, in order,
            candidates: or several alternatives, see [`candidates`].
        """
        length = len(self.tokens)
        tree = Tree(last=length - self.read - 1, guess=guess)
        for position, token in enumerate(self.tokens[self.read :], start=self.read):
            slot = first_slot + position
            tree.tokens.append(PassToken(token, position, slot, visible_until=slot, visible_from=slot))
        last_certain = first_slot + length - 1
        for path in [guess, *candidates]:
            node, begin = tree.last, first_slot + self.read + len(tree.tokens)
            for step, column in enumerate(path):
                tree.children[node, column] = node = len(tree.tokens)
                token = (self.speller.token_ids[column], length + step, begin + step)
                tree.tokens.append(PassToken(*token, visible_until=last_certain, visible_from=begin))
        return tree

    def follow(self, tree: Tree, logits: np.ndarray) -> None:
        """Choose tokens while the pass has logits, float32 (tokens of the tree, columns); `LogitsError` if one is NaN.

        A guess that was right stays in the cache. A candidate's cache slot is not its own, so it is read once more.
        """
        certain, node, reached, place = len(self.tokens), tree.last, tree.last, (self.count, self.state)
        while node is not None and not self.done:
            choices = self.grammar.choices(self.count, self.state)
            scores = logits[node][choices]
            if np.isnan(scores).any():
                raise LogitsError
            if self.noise is not None:
                scores = scores + self.noise[len(self.tokens)][choices]
            # Equal scores: the lowest id, as argmax over a vocabulary does.
            column: int | None = choices[int(scores.argmax())]
            self.scores.append((len(self.tokens), logits[node]))
            while column is not None:  # the choice, then what it forces
                self._write(column)
                node = tree.children.get((node, column))
                reached = reached if node is None else node
                column = self.speller.forced(self.count, self.state)
        accepted = 0
        if tree.guess:
            accepted = reached - tree.last
            if self.draft is not None and accepted < len(tree.guess):
                self._revise_draft(tree, logits, place)
            # Read more of a good guess, and soon none of a bad one: candidates do better.
            self.window = min(LARGEST_WINDOW, 4 * accepted) or self.window // 4
        self.drafted += len(tree.guess)
        self.accepted += accepted
        self.read = certain + accepted

    def _revise_draft(self, tree: Tree, logits: np.ndarray, place: tuple[int, int]) -> None:
        """Replace what follows in the draft by what the model would write behind the draft's own beginning.

        The pass has read that already, and it is nearer to the answer (Jacobi decoding, Santilli et al. 2023).
        `place` is count and state where the tree's guess began.
        """
        numbers: dict[int, list[tuple[int, int]]] = {}  # by count: the draft's columns, and the model's
        separate = set()  # counts of numbers that begin behind a space of its own
        for node, column in enumerate(tree.guess, start=tree.last):
            if place[1] == self.grammar.open:
                separate.add(place[0])
            choices = self.grammar.choices(*place)
            if column not in choices:
                break
            predicted = choices[int(logits[node][choices].argmax())]
            numbers.setdefault(place[0], []).append((column, predicted))
            place = self.speller.after(*place, column)
        revised, place = Guess(self.speller, self.draft.older or self.draft), (self.count, self.state)
        while columns := numbers.get(count := place[0]):
            if count in separate and place[1] != self.grammar.open:
                place = (count + 1, self.grammar.open)  # the rest of a number that the row has begun otherwise
                continue
            last, _ = columns[-1]  # ends a number that the model would write longer
            for column, predicted in [*columns, (last, last)]:
                choices = self.grammar.choices(*place)
                chosen = predicted if predicted in choices else column
                if chosen not in choices or place[0] != count or place[1] == self.grammar.done:
                    break
                revised.add(*place, chosen)
                place = self.speller.after(*place, chosen)
            if place[0] == count:
                break
        self.draft = revised

    def begin_with(self, tokens: list[int]) -> None:
        """Write the answer's first tokens, which the caller has chosen, and what they force.

        `ValueError` if they leave the grammar.
        """
        for place, token in enumerate(tokens[len(self.tokens) :], start=len(self.tokens)):
            column = self.speller.column.get(token)
            if column not in self.grammar.choices(self.count, self.state):
                raise ValueError(
                    f"an answer can't begin with the tokens {tokens}: {token}, at {place}, must not follow"
                )
            self._write(column)
        self._write_forced()

    def write(self, column: int) -> None:
        """Add a token, which is certain, and those that it forces."""
        self._write(column)
        self._write_forced()

    def _write(self, column: int) -> None:
        self.written.add(self.count, self.state, column)
        self.tokens.append(self.speller.token_ids[column])
        self.count, self.state = self.speller.after(self.count, self.state, column)

    def _write_forced(self) -> None:
        while (column := self.speller.forced(self.count, self.state)) is not None:
            self._write(column)
