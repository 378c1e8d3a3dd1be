"""Rows of a chat dataset as a collator takes them; small datasets can be kept in memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from vla0_trl.processing.images import row_image


class ChatRows(torch.utils.data.Dataset):
    """The rows of a chat dataset without the text that follows from the raw columns.

    Images are left encoded, for the collator to decode those of the cameras that it takes. Kept in memory, they are
    decoded once: PushT's 96 px PNG takes a seventh of a nano backbone's training step, and then 28 KB.

    Args:
        dataset ([`~datasets.Dataset`]): with the raw columns.
        keep (`bool`): keep each row, decoded, from its first use on.
    """

    COLUMNS = ("images", "task", "episode_index", "frame_index", "raw_state", "raw_action")

    def __init__(self, dataset: Dataset, keep: bool):
        # In Arrow's format `datasets` doesn't decode images: it does so one at a time, with several steps of its own,
        # and does not say which row holds a damaged file.
        self._dataset = dataset.select_columns(list(self.COLUMNS)).with_format("arrow")
        self._kept: dict[int, dict[str, Any]] | None = {} if keep else None

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """What `DataLoader` asks for: the rows of a batch. [`ImageError`] for a kept one whose image is damaged."""
        if self._kept is None:
            return self._dataset[indices].to_pylist()
        missing = [index for index in indices if index not in self._kept]
        if missing:
            for index, row in zip(missing, self._dataset[missing].to_pylist(), strict=True):
                images = [row_image(row, camera) for camera in range(len(row["images"]))]
                vectors = {name: np.asarray(row[name], np.float32) for name in ("raw_state", "raw_action")}
                self._kept[index] = row | vectors | {"images": images}
        return [self._kept[index] for index in indices]
