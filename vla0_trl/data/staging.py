"""Phase 1 of a conversion: every episode read, checked and written to a file of its own, in parallel, resumably."""

import io
from collections.abc import Iterable, Iterator
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from vla0_trl.config import VLAConfig
from vla0_trl.data.chat_dataset import RAW_SCHEMA
from vla0_trl.data.episodes import EpisodeError, ImageFormat, Source, raw_rows
from vla0_trl.files import whole_file
from vla0_trl.process_pool import ProcessPool

MAX_RUN = 16  # episodes that a process reads in a row
# Frames are compressed already, and all of it is deleted in the end.
_PLAIN = {"compression": "none", "use_dictionary": False, "write_statistics": False}


class ConversionError(RuntimeError):
    """A conversion that can't begin or go on; the message says what to do."""


class StagedInfo(NamedTuple):
    """What a staged file's footer tells. Without frames, the episode is rejected, or bad for the reason in `error`."""

    frames: int
    name: str
    error: str
    sizes: str  # of each camera's frames


@contextmanager
def parquet_writer(path: Path, schema: pa.Schema, **options: Any) -> Iterator[pq.ParquetWriter]:
    """A writer whose file is gone after an error: pyarrow's own would end half of the rows with a valid footer."""
    writer = pq.ParquetWriter(path, schema, **options)
    try:
        yield writer
        writer.close()
    except BaseException:  # Ctrl-C, too, must leave no file with a valid footer
        with suppress(OSError):  # of a disk that is still full
            writer.close()
        path.unlink(missing_ok=True)
        raise


@dataclass
class Staging:
    """A source's episodes as raw rows, a file each; pickled once for every process."""

    source: Source
    config: VLAConfig
    folder: Path
    image_format: ImageFormat  # of frames that are not encoded yet
    skip_bad: bool  # stage a bad episode as skipped, instead of stopping there

    def stage_all(self, indices: list[int], num_proc: int) -> int:
        """Stage the episodes that are not there yet; returns how many those were."""
        self.folder.mkdir(exist_ok=True)
        missing = [index for index in indices if not self._is_staged(index)]
        done = len(indices) - len(missing)
        with tqdm(total=len(indices), initial=done, desc="reading", unit="episode") as progress:
            if num_proc == 1 or not missing:
                for index in missing:
                    self.stage(index)
                    progress.update()
            else:
                _stage_in_parallel(self, missing, num_proc, progress)
        return len(missing)

    def stage(self, index: int) -> None:
        """Read one episode and write its file."""
        with whole_file(self.path(index)) as partial:
            try:
                episode = self.source.episode(index)
                if episode is None:
                    self._write(partial, ())
                else:
                    rows = raw_rows(episode, self.config, index, self.image_format)
                    self._write(partial, rows, name=episode.name)
            except EpisodeError as error:
                if not self.skip_bad:
                    raise
                self._write(partial, (), error=str(error))

    def path(self, index: int) -> Path:
        """The file of one episode; it exists only when it is whole. A rejected or skipped episode's has no rows."""
        return self.folder / f"episode-{index:06d}.parquet"

    def info(self, index: int) -> StagedInfo:
        """Of a staged episode, without reading it."""
        footer = pq.read_metadata(self.path(index))
        return StagedInfo(footer.num_rows, *(footer.metadata[key].decode() for key in (b"name", b"error", b"sizes")))

    def rows(self, index: int, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """A staged episode's rows, a piece of an episode at a time."""
        with pq.ParquetFile(self.path(index)) as file:
            for number in range(file.num_row_groups):
                yield file.read_row_group(number, columns)

    def _is_staged(self, index: int) -> bool:
        """An episode that an earlier call skipped is read again where bad ones are not skipped."""
        return self.path(index).exists() and (self.skip_bad or not self.info(index).error)

    def _write(self, path: Path, pieces: Iterable[dict[str, list]], name: str = "", error: str = "") -> None:
        sizes = {}
        with parquet_writer(path, RAW_SCHEMA, **_PLAIN) as writer:
            for piece in pieces:
                writer.write_table(pa.table(piece, RAW_SCHEMA))
                first = [Image.open(io.BytesIO(image["bytes"])).size for image in piece["images"][0]]
                sizes = dict(zip(self.config.cameras, first, strict=True))
            writer.add_key_value_metadata({"name": name, "error": error, "sizes": str(sizes)})


def _stage_in_parallel(staging: Staging, missing: list[int], num_proc: int, progress: tqdm) -> None:
    # Neighbours share files that are read from front to back, or a simulator's scene: a process gets several in a
    # row, few enough to keep all of them busy until the end.
    length = min(MAX_RUN, -(-len(missing) // (4 * num_proc)))
    runs = [missing[start : start + length] for start in range(0, len(missing), length)]
    try:
        with ProcessPool(min(num_proc, len(missing)), _take_staging, staging) as pool:
            futures = [pool.submit(_stage_in_worker, run) for run in runs]
            for future in as_completed(futures):
                progress.update(future.result())
    except BrokenProcessPool as error:
        raise ConversionError(
            "a worker process died, out of memory perhaps: run the same command again with a smaller --num_proc; "
            f"finished episodes are kept in {staging.folder}"
        ) from error


_worker_staging: Staging


def _take_staging(staging: Staging) -> None:
    global _worker_staging
    _worker_staging = staging


def _stage_in_worker(run: list[int]) -> int:
    for index in run:
        _worker_staging.stage(index)
    return len(run)
