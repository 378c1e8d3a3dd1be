"""Images in a parquet column `struct<bytes, path>`, from front to back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vla0_trl.episodes import EpisodeError

_BATCH_ROWS = 32  # in memory at once: 3 MB of 256 px PNGs
# Without both, all of a column's row group is read at once, up to the size of the file: 1.4 GB instead of 0.5 for two
# cameras and a file of 0.8 GB, and ten times slower.
_FROM_FRONT_TO_BACK = {"buffer_size": 1 << 20, "pre_buffer": False}


@contextmanager
def readable(path: Path, name: str) -> Iterator[None]:
    """A parquet that can't be read as an [`EpisodeError`]; `name` is the episode's."""
    try:
        yield
    except (OSError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise EpisodeError(
            f"{name}: {path} can't be read, it is absent or damaged: fetch it again, or leave the episode out with "
            f"--skip_bad_episodes ({error})"
        ) from error


class ImageColumn:
    """A column of one file, at a row that moves forward; going back opens it again.

    Args:
        path (`Path`), key (`str`): file and column.
    """

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key
        self._file: pq.ParquetFile | None = None
        self._group_starts = np.zeros(1, np.int64)
        self._images: Iterator[dict | None] = iter(())
        self._row = 0  # the next that `_images` gives

    def frames(self, start: int, count: int, name: str) -> Iterator[bytes]:
        """Image files of the rows `start` to `start + count`.

        Raises:
            EpisodeError: the file or the column is absent or damaged, or a row holds no bytes.
        """
        try:
            with readable(self.path, name):
                self._go_to(start, name)
                for row in range(count):
                    image = next(self._images)
                    self._row += 1
                    if image is None or not image["bytes"]:
                        raise EpisodeError(
                            f"{name}, frame {row}: {self.path} holds no image in {self.key}, a path at most: images "
                            "have to be in the parquet files"
                        )
                    yield image["bytes"]
        except EpisodeError:
            self.close()  # it is not at a row that could be told
            raise

    def close(self) -> None:
        """Give the file back; a later call opens it again."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def _go_to(self, row: int, name: str) -> None:
        if self._file is None:
            self._file = pq.ParquetFile(self.path, **_FROM_FRONT_TO_BACK)
            if self.key not in self._file.schema_arrow.names:
                self.close()
                raise EpisodeError(f"{name}: {self.path} has no column {self.key!r}: choose others with --image_keys")
            footer = self._file.metadata
            lengths = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
            self._group_starts = np.cumsum([0, *lengths])
            self._images, self._row = iter(()), -1
        if self._row != row:
            group = int(np.searchsorted(self._group_starts, row, side="right")) - 1
            if not self._group_starts[group] <= self._row < row:
                self._images, self._row = self._read_from(group), int(self._group_starts[group])
            while self._row < row:
                next(self._images)
                self._row += 1

    def _read_from(self, group: int) -> Iterator[dict | None]:
        for number in range(group, self._file.num_row_groups):  # one by one: a damaged one spares those before it
            batches = self._file.iter_batches(_BATCH_ROWS, row_groups=[number], columns=[self.key], use_threads=False)
            for batch in batches:
                yield from batch.column(0).to_pylist()
