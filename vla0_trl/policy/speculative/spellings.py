"""The spellings of numbers as tables, so that one step for many numbers takes a few look-ups."""

from collections.abc import Iterable

import numpy as np

from vla0_trl.policy.grammar import ActionGrammar


class Spellings:
    """The integers 0…num_bins as a tree of tokens.

    A node is what was written of a number. The tables' columns are the grammar's, by token id: of equal logits, the
    first is the one that greedy decoding takes.

    Attributes:
        token_ids (`np.ndarray`): (columns,), ascending.
        order (`np.ndarray`): (columns,), the grammar's column of each.
        child (`np.ndarray`): int (nodes, columns): the node behind a token, −1 where it can't follow.
        token_id (`np.ndarray`): int (nodes,): the last token written.
        number (`np.ndarray`): int (nodes,): the number that is whole there, or −1.
        leaf (`np.ndarray`): bool (nodes,): no token follows.
        depth (`int`): tokens of the longest spelling.
    """

    def __init__(self, grammar: ActionGrammar):
        self.order = np.argsort(grammar.token_ids)
        self.token_ids = grammar.token_ids[self.order]
        self._column = {token: column for column, token in enumerate(self.token_ids.tolist())}
        self._children: list[dict[int, int]] = []
        self._whole: list[int] = []
        self._last_token: list[int] = []
        self.depth = 0

    def add(self, spelled: Iterable[list[int]]) -> int:
        """Add all numbers, from 0 on; the node where they begin."""
        root = self._node(last_token=-1)
        for number, tokens in enumerate(spelled):
            node = root
            for token, column in zip(tokens, self.columns(tokens), strict=True):
                if column not in self._children[node]:
                    self._children[node][column] = self._node(token)
                node = self._children[node][column]
            if node == root or self._whole[node] != -1:
                raise ValueError(f"this tokenizer spells {number} as it spells another number: {tokens}")
            self._whole[node] = number
            self.depth = max(self.depth, len(tokens))
        return root

    def columns(self, tokens: Iterable[int]) -> list[int]:
        """Of these ids; `ValueError` if the grammar does not know one."""
        try:
            return [self._column[token] for token in tokens]
        except KeyError as unknown:
            raise ValueError(
                f"token {unknown} is not of digits and spaces alone, so it can't be part of a number"
            ) from None

    def freeze(self) -> None:
        """Make the tables."""
        self.child = np.full((len(self._children), len(self.token_ids)), -1, np.int32)
        for node, children in enumerate(self._children):
            self.child[node, [*children]] = [*children.values()]
        self.number, self.leaf = np.array(self._whole), (self.child < 0).all(1)
        self.token_id = np.array(self._last_token)

    def _node(self, last_token: int) -> int:
        self._children.append({})
        self._whole.append(-1)
        self._last_token.append(last_token)
        return len(self._children) - 1
