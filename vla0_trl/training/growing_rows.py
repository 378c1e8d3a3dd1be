"""A training set to which rows are added while training goes on: what the policy visited, with an expert's labels."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset

from vla0_trl.data.chat_dataset import RAW_SCHEMA
from vla0_trl.files import whole_file


class GrowingRows(TorchDataset):
    """Rows of a chat dataset, of which a share is replaced by added rows, once there are any.

    The length stays that of the dataset, so epochs and schedules do not change. What a batch holds depends on seed,
    indices and training step alone: a resumed run draws what the uninterrupted one draws. So a round that was added
    after step s is drawn from step s + 2 on: `DataLoader`s read a batch ahead.

    Args:
        fraction (`float`): share of the rows drawn that come from the added ones.
        folder (`Path`): where the added rows are kept, one file per round, for a run that is resumed.
        batches_per_step (`int`, *optional*, defaults to `1`): how often a step asks for rows; an epoch's last step may
            ask less often.
    """

    def __init__(self, dataset: Dataset, fraction: float, seed: int, folder: Path, batches_per_step: int = 1):
        if not 0 < fraction <= 1:
            raise ValueError(f"dagger_fraction={fraction} must be in (0, 1]")
        self.dataset, self.fraction, self.seed, self.folder = dataset, fraction, seed, folder
        self.batches_per_step = batches_per_step
        self.rounds: dict[int, list[dict[str, Any]]] = {}
        self._batches, self._batches_per_epoch, self._steps_per_epoch = 0, sys.maxsize, sys.maxsize

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """The rows of one batch, as `DataLoader` asks for them."""
        rows = self.dataset.__getitems__(indices)
        epoch, batch = divmod(self._batches, self._batches_per_epoch)
        step = 1 + epoch * self._steps_per_epoch + batch // self.batches_per_step
        self._batches += 1
        usable = [round for added, round in self.rounds.items() if added + 2 <= step]
        count = sum(map(len, usable))
        if not count:
            return rows
        for place, index in enumerate(indices):
            rng = np.random.default_rng((self.seed, step, index))
            if rng.random() < self.fraction:
                choice = int(rng.integers(count))
                for round in usable:
                    if choice < len(round):
                        rows[place] = round[choice]
                        break
                    choice -= len(round)
        return rows

    def begin(self, step: int, batches_per_epoch: int = sys.maxsize) -> None:
        """The next batch is the first one after `step`; reads the rounds that are on disk."""
        self._batches_per_epoch = batches_per_epoch
        self._steps_per_epoch = -(-batches_per_epoch // self.batches_per_step)
        epoch, step = divmod(step, self._steps_per_epoch)
        self._batches = epoch * batches_per_epoch + step * self.batches_per_step
        self.load()

    def load(self) -> int:
        """Read the rounds that are not in memory yet; returns how many added rows there are now."""
        for step, path in self._files().items():
            if step not in self.rounds:
                self.rounds[step] = pq.read_table(path).to_pylist()
        return sum(map(len, self.rounds.values()))

    def write_round(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Save what was added after `step`, in one step: a kill leaves the whole file or none."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(self.folder / f"round-{step:08d}.parquet") as partial:
            pq.write_table(pa.Table.from_pylist(rows, RAW_SCHEMA), partial)

    def drop_rounds_after(self, step: int) -> None:
        """Delete later rounds: a run that goes on from `step` drives them again, with the same weights."""
        for added, path in self._files().items():
            if added > step:
                path.unlink()

    def _files(self) -> dict[int, Path]:
        return {int(path.stem.split("-")[1]): path for path in sorted(self.folder.glob("round-*.parquet"))}
