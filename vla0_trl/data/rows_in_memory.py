"""Rows that are read and decoded once: for small datasets that are gone through many times."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from vla0_trl.processing.images import decoded_image


class RowsInMemory(torch.utils.data.Dataset):
    """The rows of a chat dataset as a collator takes them, kept from their first use on.

    Decoding PushT's 96 px PNG takes a seventh of a nano backbone's training step. Images take what their pixels do:
    28 KB for each of these.

    Args:
        dataset ([`~datasets.Dataset`]): with the raw columns; text columns follow from them and are left out.
    """

    COLUMNS = ("images", "task", "episode_index", "frame_index", "raw_state", "raw_action")

    def __init__(self, dataset: Dataset):
        # Images as bytes: `datasets` decodes one at a time, with several steps of its own.
        self._encoded = dataset.select_columns(list(self.COLUMNS)).with_format("arrow")
        self._rows: list[dict[str, Any] | None] = [None] * len(dataset)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """What `DataLoader` asks for: the rows of a batch."""
        missing = [index for index in indices if self._rows[index] is None]
        if missing:
            for index, row in zip(missing, self._encoded[missing].to_pylist(), strict=True):
                images = [decoded_image(image) for image in row["images"]]
                vectors = {name: np.asarray(row[name], np.float32) for name in ("raw_state", "raw_action")}
                self._rows[index] = row | vectors | {"images": images}
        return [self._rows[index] for index in indices]
