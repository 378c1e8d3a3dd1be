"""An answer while it is being written: what is certain, what to try next, and what a pass's logits make of it.

Plain Python on the host: a token costs some microseconds, a pass of the smallest model two milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vla0_trl.policy.grammar import ActionGrammar

# Tokens that are guessed at once: of a draft, and of what the answer itself suggests, which is right less often.
LARGEST_WINDOW, FIRST_WINDOW = 64, 8


class Speller:
    """The grammar as one row walks through it: tokens by column, and what is forced.

    Args:
        grammar: shared by all rows.
        forced_tokens: treat a token without alternative as written; otherwise it needs a pass like any other.
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
        """The only column that may follow, if there is one only."""
        if not self.forced_tokens or state == self.grammar.done:
            return None
        choices = self.grammar.choices(count, state)
        return choices[0] if len(choices) == 1 else None


class Guess:
    """Text of an answer that another part, or another answer, is guessed to repeat.

    It is found again wherever a row comes to one of its states, so a row that left it rejoins it at the next number.
    """

    def __init__(self, speller: Speller):
        self.speller = speller
        self.columns: list[int] = []
        self._begins: dict[tuple[int, int], int] = {}

    def add(self, count: int, state: int, column: int) -> None:
        """`column` was written when so many numbers were finished, in this state of the grammar."""
        self._begins.setdefault((count, state), len(self.columns))
        self.columns.append(column)

    def after(self, count: int, state: int) -> list[int]:
        """The columns that followed there; empty if it was never there."""
        begin = self._begins.get((count, state))
        return [] if begin is None else self.columns[begin:]

    @classmethod
    def of(cls, speller: Speller, tokens: list[int]) -> Guess:
        """From the ids of a whole answer, prefix through end of turn. Cut where they leave the grammar."""
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
    """Tokens of one row for one pass: certain ones, then a guess that continues them, or tries side by side.

    Attributes:
        last (`int`): the last certain token, where choosing begins; −1 is the prompt's last.
        tokens (`list`): of each what a pass must know of it: see [`passes`].
        children (`dict`): (token, column) -> the token that follows it so.
        guesses (`int`): how many of them are of the draft.
    """

    last: int
    tokens: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    children: dict[tuple[int | None, int], int] = field(default_factory=dict)
    guesses: int = 0


class Row:
    """One answer. `tokens` are certain, the first `read` of them are in the cache.

    Args:
        speller: of all rows.
        draft: ids of a guess of the whole answer.
        period: without a draft, each number is guessed to be like the one so many before it.
    """

    def __init__(self, speller: Speller, draft: list[int] | None = None, period: int | None = None):
        self.speller, self.grammar = speller, speller.grammar
        self.tokens: list[int] = []
        self.read = 0
        self.count, self.state = self.grammar.initial_count, self.grammar.initial_state
        self.draft = None if draft is None else Guess.of(speller, draft)
        self.period, self.written = period, Guess(speller)
        self.window = FIRST_WINDOW if draft is None else LARGEST_WINDOW
        self.accepted = 0
        self._write_forced()

    @property
    def done(self) -> bool:
        return self.state == self.grammar.done

    def guess(self, limit: int) -> list[int]:
        """Columns that may come next, one after the other, at most `limit`; empty where there is nothing to go by."""
        if self.draft is not None:
            columns = self.draft.after(self.count, self.state)
        elif self.period is not None:
            columns = self.written.after(self.count - self.period, self.state)
        else:
            return []
        return columns[: min(limit, self.window, self.grammar.max_new_tokens - len(self.tokens))]

    def tries(self) -> list[list[int]]:
        """All choices for the next token, each with what it forces, as columns; but those that end the answer."""
        tries = []
        for column in self.grammar.choices(self.count, self.state):
            path, place = [column], self.speller.after(self.count, self.state, column)
            while (forced := self.speller.forced(*place)) is not None:
                path.append(forced)
                place = self.speller.after(*place, forced)
            if place[1] != self.grammar.done:
                tries.append(path)
        return tries

    def grow(self, first: int, guess: list[int], tries: list[list[int]]) -> Tree:
        """What to ask the model next.

        Args:
            first: slot of the answer's first token.
            guess: columns that follow what is certain, one after the other.
            tries: or several that may come next.
        """
        length = len(self.tokens)
        tree = Tree(last=length - self.read - 1, guesses=len(guess))
        for place, token in enumerate(self.tokens[self.read :], start=self.read):
            tree.tokens.append((token, place, first + place, first + place, first + place))
        for path in [guess, *tries]:
            node, begin = tree.last, first + self.read + len(tree.tokens)
            for step, column in enumerate(path):
                tree.children[node, column] = node = len(tree.tokens)
                token = self.speller.token_ids[column]
                tree.tokens.append((token, length + step, begin + step, first + length - 1, begin))
        return tree

    def follow(self, tree: Tree, logits: np.ndarray) -> None:
        """Choose as long as the pass tells what comes next.

        A guess that was right is in its slot. A try lies where the next token will, and is read once more.

        Args:
            logits: float32 (tokens of the tree, columns).
        """
        certain, node, reached = len(self.tokens), tree.last, tree.last
        while node is not None and not self.done:
            choices = self.grammar.choices(self.count, self.state)
            # Equal logits: the lowest id, as argmax over a vocabulary does.
            column: int | None = choices[int(logits[node][choices].argmax())]
            while column is not None:  # and all that it forces
                self._write(column)
                node = tree.children.get((node, column))
                reached = reached if node is None else node
                column = self.speller.forced(self.count, self.state)
        accepted = 0
        if tree.guesses:
            accepted = reached - tree.last
            # Ask for more of a good draft; give a bad one up soon, since tries do better than it.
            self.window = min(LARGEST_WINDOW, 4 * accepted) or self.window // 4
        self.accepted += accepted
        self.read = certain + accepted

    def write(self, column: int) -> None:
        """Take a token as certain, and all that it forces."""
        self._write(column)
        self._write_forced()

    def _write(self, column: int) -> None:
        self.written.add(self.count, self.state, column)
        self.tokens.append(self.speller.token_ids[column])
        self.count, self.state = self.speller.after(self.count, self.state, column)

    def _write_forced(self) -> None:
        while (column := self.speller.forced(self.count, self.state)) is not None:
            self._write(column)
