"""An answer while it is being written: what is certain, what to try next, and what a pass's logits make of it.

Plain Python on the host: a token costs some microseconds, a pass of the smallest model a millisecond.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vla0_trl.grammar import ActionGrammar
from vla0_trl.passes import FIELDS

FIRST_WINDOW, LARGEST_WINDOW = 8, 64


class Speller:
    """The grammar as one row walks through it: tokens by column, the choices in a state, what is forced.

    Args:
        grammar: shared by all rows.
        forced_tokens: treat a token without alternative as written; otherwise it needs a pass like any other.
    """

    def __init__(self, grammar: ActionGrammar, forced_tokens: bool = True):
        self.grammar, self.forced_tokens = grammar, forced_tokens
        self.token_ids = grammar.token_ids.tolist()
        self.column = {token: column for column, token in enumerate(self.token_ids)}
        self.next_state: list[list[int]] = grammar.next_state.tolist()
        self.finishes: list[int] = grammar.finishes.tolist()
        self._promising: dict[tuple[int, int], bool] = {}

    def after(self, count: int, state: int, column: int) -> tuple[int, int]:
        return count + self.finishes[column], self.next_state[state][column]

    def forced(self, count: int, state: int) -> int | None:
        """The only column that may follow, if there is one only."""
        if not self.forced_tokens or state == self.grammar.done:
            return None
        choices = self.grammar.choices(count, state)
        return choices[0] if len(choices) == 1 else None

    def promising(self, count: int, state: int) -> bool:
        """Whether most choices here are followed by another choice, so that trying them all saves a pass."""
        choices = self.grammar.choices(count, state)
        open_ones = 0
        for column in choices:
            after = self.after(count, state, column)
            open_ones += after[1] != self.grammar.done and self.forced(*after) is None
        return 2 * open_ones > len(choices)


class Draft:
    """A guess of a whole answer, which can be rejoined wherever a row comes back to one of its states.

    Args:
        speller: of the row.
        tokens: ids, from the prefix through the end of the turn. Cut where they leave the grammar.
    """

    def __init__(self, speller: Speller, tokens: list[int]):
        self.columns: list[int] = []
        self.at: dict[tuple[int, int], int] = {}
        count, state = speller.grammar.initial_count, speller.grammar.initial_state
        for token in tokens:
            column = speller.column.get(token)
            if column is None or column not in speller.grammar.choices(count, state):
                break
            self.at.setdefault((count, state), len(self.columns))
            self.columns.append(column)
            count, state = speller.after(count, state, column)


@dataclass
class Tree:
    """Tokens of one row for one pass: certain ones, a guess that continues them, and tries beside it.

    Attributes:
        fields (`list`): a tuple of FIELDS numbers for each token, see [`passes`].
        children (`dict`): (node, column) -> node.
        last (`int`): the last certain token, where choosing begins.
        guesses (`int`): tokens of the draft in it.
        scratch (`dict`): node -> scratch slot, of the tries.
    """

    last: int
    fields: list[tuple[int, ...]] = field(default_factory=list)
    children: dict[tuple[int, int], int] = field(default_factory=dict)
    guesses: int = 0
    scratch: dict[int, int] = field(default_factory=dict)


class Row:
    """One answer. `tokens` are certain, the first `read` of them are in the cache."""

    def __init__(self, speller: Speller, draft: list[int] | None = None):
        self.speller, self.grammar = speller, speller.grammar
        self.tokens: list[int] = []
        self.read = 0
        self.count, self.state = self.grammar.initial_count, self.grammar.initial_state
        self.draft = None if draft is None else Draft(speller, draft)
        self.window = FIRST_WINDOW
        self.accepted = 0
        self._write_forced(None, {})

    @property
    def done(self) -> bool:
        return self.state == self.grammar.done

    def guess(self, limit: int) -> list[int]:
        """Columns that the draft has for what comes next, at most `limit`; empty while the row is off the draft."""
        start = None if self.draft is None or not self.window else self.draft.at.get((self.count, self.state))
        if start is None:
            return []
        return self.draft.columns[start : start + min(limit, self.grammar.max_new_tokens - len(self.tokens))]

    def grow(self, first: int, tries: bool, pairs: bool, guess: list[int]) -> Tree:
        """What to ask the model next.

        Args:
            first: slot of the answer's first token.
            tries: add all choices for the next token, each with a scratch slot.
            pairs: and behind each try what it forces, so that the choice after that is seen as well.
            guess: columns of the draft.
        """
        length = len(self.tokens)
        tree = Tree(last=length - self.read - 1)
        token_ids = self.speller.token_ids
        for place in range(self.read, length):
            tree.fields.append((self.tokens[place], place, first + place, first + place, 0))
        node = tree.last
        for place, column in enumerate(guess, start=length):
            tree.children[node, column] = node = len(tree.fields)
            tree.fields.append((token_ids[column], place, first + place, first + place, 0))
        tree.guesses = len(guess)
        if tries:
            self._add_tries(tree, first + length - 1, length, pairs)
        return tree

    def _add_tries(self, tree: Tree, limit: int, place: int, pairs: bool) -> None:
        for column in self.grammar.choices(self.count, self.state):
            if (tree.last, column) in tree.children:
                continue  # the draft's own
            after = self.speller.after(self.count, self.state, column)
            forced = self.speller.forced(*after)
            if after[1] == self.grammar.done or (forced is not None and not pairs):
                continue  # nothing is chosen after it
            node, slot = len(tree.fields), len(tree.scratch)
            tree.children[tree.last, column] = node
            tree.fields.append((self.speller.token_ids[column], place, slot, limit, 1 << slot))
            tree.scratch[node] = slot
            if forced is not None and self.speller.after(*after, forced)[1] != self.grammar.done:
                tree.children[node, forced] = len(tree.fields)
                tree.scratch[len(tree.fields)] = slot + 1
                token = self.speller.token_ids[forced]
                tree.fields.append((token, place + 1, slot + 1, limit, 3 << slot))

    def follow(
        self, tree: Tree, logits: np.ndarray, first: int, keep_tries: bool = True
    ) -> tuple[list[int], list[int]]:
        """Choose as long as the pass tells what comes next.

        Args:
            tree: what was asked.
            logits: float32 (tokens of the tree, columns).
            first: slot of the answer's first token.
            keep_tries: count tries that turned out right as read, because their slots will be moved.

        Returns:
            The slots of such tries, and the slots that they belong to.
        """
        read, node, path = len(self.tokens), tree.last, []
        while node is not None and not self.done:
            choices = self.grammar.choices(self.count, self.state)
            # Equal logits: the lowest id, as argmax over a vocabulary does.
            column = choices[0] if len(choices) == 1 else choices[int(logits[node][choices].argmax())]
            self._write(column)
            node = tree.children.get((node, column))
            if node is not None:
                path.append(node)
            node = self._write_forced(node, tree.children, path)
        tries = [tree.scratch[node] for node in path if node in tree.scratch]  # a path has these or guesses
        accepted = len(path) - len(tries)
        self.accepted += accepted
        if tree.guesses:
            # Ask for more of a good draft; give a bad one up after two passes, since tries do better than it.
            good = min(LARGEST_WINDOW, max(FIRST_WINDOW, 2 * accepted))
            self.window = good if accepted > 1 else self.window // 4
        if not keep_tries:
            tries = []
        self.read = read + accepted + len(tries)
        return tries, list(range(first + read, first + read + len(tries)))

    def write(self, column: int) -> None:
        """Take a token as certain, and all that it forces."""
        self._write(column)
        self._write_forced(None, {})

    def _write(self, column: int) -> None:
        self.tokens.append(self.speller.token_ids[column])
        self.count, self.state = self.speller.after(self.count, self.state, column)

    def _write_forced(
        self, node: int | None, children: dict[tuple[int, int], int], path: list[int] | None = None
    ) -> int | None:
        """Write what has no alternative; the node it ends at, None if it left the tree."""
        while (column := self.speller.forced(self.count, self.state)) is not None:
            self._write(column)
            node = None if node is None else children.get((node, column))
            if node is not None:
                path.append(node)
        return node


def pack(trees: list[Tree | None], scratch: int) -> np.ndarray:
    """Trees, None for rows without one -> int64 (B, Q, FIELDS), padded with tokens that nobody sees."""
    width = max(len(tree.fields) for tree in trees if tree is not None)
    packed = np.zeros((len(trees), width, FIELDS), np.int64)
    packed[..., 2], packed[..., 3] = scratch, -1
    for row, tree in zip(packed, trees, strict=True):
        if tree is not None:
            row[: len(tree.fields)] = tree.fields
    return packed
