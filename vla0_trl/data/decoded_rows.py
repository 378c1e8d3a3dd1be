"""Rows of a chat dataset, read and decoded as a collator takes them; small datasets can be kept in memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from vla0_trl.processing.images import row_image


class DecodedRows(torch.utils.data.Dataset):
    """The rows of a chat dataset, with images as arrays and without the text that follows from the raw columns.

    Decoding PushT's 96 px PNG takes a seventh of a nano backbone's training step. Kept images take what their pixels
    do: 28 KB for each of these.

    Args:
        dataset ([`~datasets.Dataset`]): with the raw columns.
        keep (`bool`): decode each row once, and keep it in memory.
    """

    COLUMNS = ("images", "task", "episode_index", "frame_index", "raw_state", "raw_action")

    def __init__(self, dataset: Dataset, keep: bool):
        # Images as bytes: `datasets` decodes one at a time, with several steps of its own, and does not say which row
        # holds a damaged file.
        self._encoded = dataset.select_columns(list(self.COLUMNS)).with_format("arrow")
        self._kept: dict[int, dict[str, Any]] | None = {} if keep else None

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """What `DataLoader` asks for: the rows of a batch. [`ImageError`] for a row whose image is damaged."""
        known = {} if self._kept is None else self._kept
        missing = [index for index in indices if index not in known]
        if missing:
            for index, row in zip(missing, self._encoded[missing].to_pylist(), strict=True):
                images = [row_image(row, camera) for camera in range(len(row["images"]))]
                vectors = {name: np.asarray(row[name], np.float32) for name in ("raw_state", "raw_action")}
                known[index] = row | vectors | {"images": images}
        return [known[index] for index in indices]
