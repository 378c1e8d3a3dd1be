"""Co-training: a share of every step's rows is from a vision chat dataset, so that a fine-tuned VLM stays a VLM.

As in RT-2 (Brohan et al. 2023, section 3.2), which mixes robot data with the data that its model was trained on.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from vla0_trl.data.vision_chat import CHAT_EPISODE, VisionChats


class MixedRows(Dataset):
    """A policy's rows, and behind them the vision chats; in a batch, too."""

    def __init__(self, actions: Dataset, chats: VisionChats):
        self.actions, self.chats = actions, chats

    def __len__(self) -> int:
        return len(self.actions) + len(self.chats)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """The rows of a batch, as `DataLoader` asks for them."""
        count = len(self.actions)
        chats = [index - count for index in indices if index >= count]
        rows = self.actions.__getitems__([index for index in indices if index < count])
        return [*rows, *(self.chats.__getitems__(chats) if chats else ())]


class MixedOrder(Sampler[int]):
    """Indices of [`MixedRows`]: every step has the same number of chats, evenly spread, so that its batches do, too.

    An epoch is one pass over the policy's rows; the passes over the chats go on from epoch to epoch. The order
    depends on seed and epoch alone, and a step's rows not on how many processes and accumulated batches share them.

    Args:
        num_rows, num_chats (`int`): of the policy, and of the other dataset.
        step_size, chats_per_step (`int`): rows of an optimizer step, of all processes; at most half are chats.
        shuffle (`bool`): `False`: both as they are stored.
    """

    def __init__(self, num_rows: int, num_chats: int, step_size: int, chats_per_step: int, seed: int, shuffle: bool):
        self.num_rows, self.num_chats, self.seed, self.shuffle = num_rows, num_chats, seed, shuffle
        self.epoch = 0  # to be set before an epoch begins
        is_chat = np.arange(step_size) * chats_per_step % step_size < chats_per_step
        steps, rest = divmod(num_rows - 1, step_size - chats_per_step)
        # An epoch ends with a row of the policy.
        self._is_chat = np.resize(is_chat, steps * step_size + int(np.flatnonzero(~is_chat)[rest]) + 1)

    def __len__(self) -> int:
        return len(self._is_chat)

    def __iter__(self) -> Iterator[int]:
        count = int(self._is_chat.sum())
        order = np.empty(len(self), np.int64)
        order[~self._is_chat] = self._pass(0, self.epoch, self.num_rows)
        turns, places = np.divmod(np.arange(count) + self.epoch * count, self.num_chats)
        passes = {turn: self._pass(1, turn, self.num_chats) for turn in np.unique(turns).tolist()}
        chats = [passes[turn][place] for turn, place in zip(turns.tolist(), places.tolist(), strict=True)]
        order[self._is_chat] = self.num_rows + np.array(chats, np.int64)
        return iter(order.tolist())

    def _pass(self, kind: int, turn: int, count: int) -> np.ndarray:
        return np.random.default_rng((self.seed, kind, turn)).permutation(count) if self.shuffle else np.arange(count)


def losses_apart(log_probs: torch.Tensor, label_mask: torch.Tensor, episodes: torch.Tensor) -> torch.Tensor:
    """Sums of a batch's losses and numbers of its targets, of actions and of chats: float32 (2, 2).

    `log_probs` (B, L) are 0 where `label_mask` (B, L) says that there is no target; `episodes` (B,) are the rows'.
    """
    sums = torch.stack([-log_probs.detach().float().sum(1), label_mask.sum(1).float()])
    chats = episodes == CHAT_EPISODE
    return torch.stack([(sums * ~chats).sum(1), (sums * chats).sum(1)])
