"""Images in a parquet column `struct<bytes, path>`, from front to back."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vla0_trl.data.episodes import EpisodeError

_BATCH_ROWS = 32  # in memory at once: 3 MB of 256 px PNGs
# Without both, all of a column's row group is read at once, up to the size of the file: 1.4 GB instead of 0.5 for two
# cameras and a file of 0.8 GB, and ten times slower.
_FROM_FRONT_TO_BACK = {"buffer_size": 1 << 20, "pre_buffer": False}


@contextmanager
def readable(path: Path, name: str) -> Iterator[None]:
    """A parquet that can't be read as an [`EpisodeError`]; `name` is the episode's."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise EpisodeError(
            f"{name}: {path} can't be read, it is absent or damaged: fetch it again, or leave the episode out with "
            f"--skip_bad_episodes ({error})"
        ) from error


class ImageColumn:
    """A column of one file, at a row that moves forward; going back opens it again."""

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key
        self._images: Iterator[tuple[int, bytes | None]] | None = None
        self._next = self._wanted = 0  # the row that `_images` gives next, and the first that matters

    def frames(self, rows: np.ndarray, name: str) -> Iterator[bytes]:
        """Image files of `rows`, int64 (T,) and ascending."""
        if self._images is None or rows[0] < self._next:
            self.close()
            self._images = self._read(name)
        self._wanted = rows[0]
        frame = 0
        try:
            with readable(self.path, name):
                for row, image in self._images:
                    self._next = row + 1
                    if row != rows[frame]:
                        continue
                    if not image:
                        raise EpisodeError(
                            f"{name}, frame {frame}: {self.path} holds no image in {self.key}, a path at most: images "
                            "have to be in the parquet files"
                        )
                    yield image
                    frame += 1
                    if frame == len(rows):
                        return
        except EpisodeError:
            self.close()  # it is not at a row that could be told
            raise

    def close(self) -> None:
        """Give the file back; a later call opens it again."""
        if self._images is not None:
            self._images.close()
        self._images, self._next = None, 0

    def _read(self, name: str) -> Iterator[tuple[int, bytes | None]]:
        with pq.ParquetFile(self.path, **_FROM_FRONT_TO_BACK) as file:
            if file.schema_arrow.names.count(self.key) != 1:
                raise EpisodeError(
                    f"{name}: {self.path} has no column {self.key!r}, or two: choose others with --image_keys"
                )
            kind = file.schema_arrow.field(self.key).type
            if not (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0):
                raise EpisodeError(
                    f"{name}: {self.path}: {self.key} is {kind}, wanted struct<bytes: binary, path: string>: choose "
                    "others with --image_keys"
                )
            end = 0
            for group in range(file.num_row_groups):  # one by one: a damaged one spares those before it
                row, end = end, end + file.metadata.row_group(group).num_rows
                if end <= self._wanted:
                    continue
                for batch in file.iter_batches(_BATCH_ROWS, [group], columns=[self.key], use_threads=False):
                    yield from enumerate(pc.struct_field(batch.column(0), "bytes").to_pylist(), row)
                    row += len(batch)
