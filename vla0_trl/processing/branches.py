"""Answers whose numbers don't see each other: each is a branch of the text, in training as in parallel decoding.

The *trunk* is the answer with placeholders for hidden numbers. A number's own tokens branch off behind its *root*, the
token after which it begins: they see the prompt, the trunk up to the root, and those before them in the branch, at
the positions that they have in a row in which exactly the numbers before theirs are hidden.

Example: the answer "12 7" of two numbers, one token per digit and the prefix " ", behind a prompt of four tokens. The
row of training is " ? ?", the end of the turn ("$"), and behind them "12" and "7" ("x": the token attends to it):

    token   root  position  slot  visible_until  visible_from     slot 0-3 4 5 6 7 8 9 10 11 12     target
    " "                  0     4              4             4            x x . . . . .  .  .  .     "1"
    "?"                  1     5              5             5            x x x . . . .  .  .  .     " "
    " "                  2     6              6             6            x x x x . . .  .  .  .     "7"
    "?"                  3     7              7             7            x x x x x . .  .  .  .     "$"
    "$"                  4     8              8             8            x x x x x x .  .  .  .
    "1"        0         1     9              4             9            x x . . . . x  .  .  .     "2"
    "2"        0         2    10              4             9            x x . . . . x  x  .  .     " "
    "7"        2         3    11              6            11            x x x x . . .  .  x  .     "$"
    "$"        2         4    12              6            11            x x x x . . .  .  x  x

A target is the label one place further on, as in any row; the last token stands there for the label that it bears.
"""

from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
import torch

from vla0_trl.processing.chat_tokenizer import IGNORED, ChatTokenizer


class PassToken(NamedTuple):
    """One token of a forward pass, and what it attends to; or arrays of many.

    Attributes:
        token_id: in the vocabulary.
        position: in the answer; 0 directly follows the prompt.
        cache_slot: where its keys and values are written; in training its place in the row.
        visible_until: it attends to all slots up to this one, padding of the prompt excepted,
        visible_from: and to those from this one to its own.
    """

    token_id: Any
    position: Any
    cache_slot: Any
    visible_until: Any
    visible_from: Any


def text_tokens(ids: Any, places: Any, first_slot: int) -> PassToken:
    """Tokens of plain text at these places of an answer whose first slot is `first_slot`."""
    slots = first_slot + places
    return PassToken(ids, places, slots, visible_until=slots, visible_from=slots)


def branch_tokens(ids: Any, roots: Any, depths: Any, begins: Any, first_slot: int) -> PassToken:
    """Tokens of branches.

    Args:
        roots: place in the answer of the token that the branch begins behind; −1 is the prompt's last.
        depths: of a token in its branch, from 1 on.
        begins: slot of the branch's first token.
        first_slot: of the answer.
    """
    return PassToken(
        token_id=ids,
        position=roots + depths,
        cache_slot=begins + depths - 1,
        visible_until=first_slot + roots,
        visible_from=begins,
    )


def visible(
    slots: torch.Tensor,
    own: torch.Tensor,
    visible_until: torch.Tensor,
    visible_from: torch.Tensor,
    not_padding: torch.Tensor,
) -> torch.Tensor:
    """Which of the slots (S,), bool `not_padding` (B, S), tokens attend to: bool (B, Q, S).

    `own`, `visible_until` and `visible_from` are fields of [`PassToken`]s, (B, Q) each.
    """
    before = (slots <= visible_until[..., None]) & not_padding[:, None]
    return before | (visible_from[..., None] <= slots) & (slots <= own[..., None])


class BranchedAnswer:
    """How answers are written whose numbers may be hidden, and which tokens of a number are its own.

    Args:
        chat ([`ChatTokenizer`]): how numbers, and placeholders for hidden ones, are written.

    Attributes:
        spelled, hidden: for the first number, and for the others: the ids of each number, and of a placeholder.
        shared: how many ids of these all of them begin with: the space, where that is a token of its own.
    """

    def __init__(self, chat: ChatTokenizer):
        self.chat_tokenizer = chat
        self.spelled, self.hidden = zip(*((chat.spellings(k), chat.placeholder(k)) for k in (0, 1)), strict=True)
        self.shared = [_shared(*pair) for pair in zip(self.hidden, self.spelled, strict=True)]

    def branch(self, position: int, number: int) -> list[int]:
        """The ids of a number at this place among the numbers, without those that a placeholder has, too."""
        place = min(position, 1)
        return self.spelled[place][number][self.shared[place] :]

    def trunk(self, numbers: np.ndarray, hidden: np.ndarray) -> tuple[list[int], np.ndarray]:
        """An answer (N,) in which some numbers, bool (N,), are hidden, up to where the last number begins.

        Returns its ids, and the roots (N,): the place of the token behind which each number begins.
        """
        ids: list[int] = []
        roots = np.empty(len(numbers), np.int64)
        for position, (number, hide) in enumerate(zip(numbers, hidden, strict=True)):
            place = min(position, 1)
            roots[position] = len(ids) + self.shared[place] - 1
            ids += self.hidden[place] if hide else self.spelled[place][number]
        return ids[: roots[-1] + 1], roots

    def row(self, numbers: np.ndarray, first_slot: int) -> tuple[PassToken, list[int]]:
        """An answer (N,) for training in which all numbers are hidden, and their branches behind it.

        Returns A tokens, fields of (A,), and the labels of these.
        """
        hidden = np.ones(len(numbers), bool)
        ids, labels = self.chat_tokenizer.encode_answer(numbers, hidden)
        parts = [text_tokens(ids, np.arange(len(ids)), first_slot)]
        following = [*(self.spelled[1][number][0] for number in numbers[1:]), self.chat_tokenizer.end_of_turn_id]
        after = IGNORED
        for position, root in enumerate(self.trunk(numbers, hidden)[1]):
            own = self.branch(position, numbers[position])
            labels[root + 1] = own[0]  # in the placeholder's place
            if position == len(numbers) - 1:
                own = [*own, following[-1]]
            parts.append(branch_tokens(own, root, 1 + np.arange(len(own)), first_slot + len(labels), first_slot))
            labels += [after, *own[1:]]
            after = following[position]
        full = (np.broadcast_arrays(*part) for part in parts)
        return PassToken(*np.concatenate(list(map(np.stack, full)), 1)), labels


def _shared(placeholder: list[int], spelled: list[list[int]]) -> int:
    columns = zip(placeholder, *spelled, strict=False)
    return len(list(takewhile(lambda tokens: len(set(tokens)) == 1, columns)))
