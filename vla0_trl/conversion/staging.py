"""Phase 1 of a conversion: every episode read, checked and written to a file of its own, in parallel, resumably."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from vla0_trl.config import VLAConfig
from vla0_trl.episodes import (
    Episode,
    EpisodeError,
    ImageFormat,
    Source,
    checked_vectors,
    encoded_frames,
    frame_sizes,
)

PIECE_FRAMES = 100  # of an episode in memory at once: 10 MB of two 256 px cameras as JPEG
MAX_RUN = 16  # episodes that a process reads in a row


class ConversionError(RuntimeError):
    """A conversion that can't begin or go on; the message says what to do."""


@dataclass
class StagedInfo:
    """What a staged file's footer tells.

    Args:
        frames (`int`): 0: the episode is rejected.
        name (`str`): the episode's, for messages.
        sizes (`dict`): camera -> (width, height).
        error (`str`): why it was skipped as bad; empty if it was not.
    """

    frames: int
    name: str
    sizes: dict[str, tuple[int, int]]
    error: str


@dataclass
class Staging:
    """How episodes are staged; pickled once for every process.

    Args:
        config (`VLAConfig`): gives cameras and widths.
        partial (`Path`): the working folder.
        image_format (`str`): "png" or "jpeg", for frames that are not encoded yet.
        skip_bad (`bool`): stage a bad episode as skipped, instead of stopping there.
    """

    source: Source
    config: VLAConfig
    partial: Path
    image_format: ImageFormat
    skip_bad: bool


def staged_path(partial: Path, index: int) -> Path:
    """The file of one episode; it exists only when it is whole. A rejected or skipped episode's has no rows."""
    return partial / "episodes" / f"episode-{index:06d}.parquet"


def stage_episodes(staging: Staging, indices: list[int], num_proc: int) -> int:
    """Stage the episodes that are not there yet; returns how many those were.

    Raises:
        EpisodeError: the first bad episode, unless bad ones are skipped; others stay.
        ConversionError: a process died.
    """
    (staging.partial / "episodes").mkdir(exist_ok=True)
    missing = [index for index in indices if not _is_staged(staging, index)]
    progress = tqdm(total=len(indices), initial=len(indices) - len(missing), desc="reading", unit="episode")
    with progress:
        if num_proc == 1:
            for index in missing:
                _stage(staging, index)
                progress.update()
        elif missing:
            _stage_in_parallel(staging, missing, num_proc, progress)
    return len(missing)


def _is_staged(staging: Staging, index: int) -> bool:
    """An episode that an earlier call skipped is read again where bad ones are not skipped."""
    if not staged_path(staging.partial, index).exists():
        return False
    return staging.skip_bad or not staged_info(staging.partial, index).error


def staged_info(partial: Path, index: int) -> StagedInfo:
    """Of a staged episode, without reading it."""
    footer = pq.read_metadata(staged_path(partial, index))
    about = footer.metadata
    sizes = {camera: tuple(size) for camera, size in json.loads(about[b"sizes"]).items()}
    return StagedInfo(footer.num_rows, about[b"name"].decode(), sizes, about[b"error"].decode())


def read_staged(partial: Path, index: int) -> Episode:
    """A staged episode without its frames."""
    path = staged_path(partial, index)
    table = pq.read_table(path, columns=["action", "state"])
    actions, states = (
        table[name].combine_chunks().flatten().to_numpy().reshape(len(table), -1) for name in ("action", "state")
    )
    about = pq.read_metadata(path).metadata
    return Episode(
        task=about[b"task"].decode(),
        actions=actions,
        images={},
        states=states if states.shape[1] else None,
        name=about[b"name"].decode(),
    )


def staged_frames(partial: Path, index: int) -> Iterator[dict[str, list[bytes]]]:
    """A staged episode's frames, camera -> at most `PIECE_FRAMES` image files at a time."""
    with pq.ParquetFile(staged_path(partial, index)) as file:
        cameras = [name for name in file.schema_arrow.names if name.startswith("images.")]
        for number in range(file.num_row_groups):
            table = file.read_row_group(number, cameras)
            yield {name.removeprefix("images."): table[name].to_pylist() for name in cameras}


def _stage(staging: Staging, index: int) -> None:
    path = staged_path(staging.partial, index)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        episode = staging.source.episode(index)
        if episode is None:
            _write_nothing(temporary, "")
        else:
            _write_episode(temporary, checked_vectors(episode, staging.config), staging.image_format)
    except EpisodeError as error:
        if not staging.skip_bad:
            temporary.unlink(missing_ok=True)
            raise
        _write_nothing(temporary, str(error))
    temporary.replace(path)


def _write_episode(path: Path, episode: Episode, image_format: ImageFormat) -> None:
    """Piece by piece: a long episode in raw pixels, and even encoded, can be more than the memory."""
    frames = {camera: encoded_frames(episode, camera, image_format) for camera in episode.images}
    states = np.zeros((len(episode.actions), 0), np.float32) if episode.states is None else episode.states
    schema = pa.schema([(f"images.{camera}", pa.binary()) for camera in frames] + _VECTORS)
    sizes = {}
    # Neither compressed nor as a dictionary: frames are compressed already, and all of it is deleted in the end.
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for start in range(0, len(episode.actions), PIECE_FRAMES):
            piece = slice(start, start + PIECE_FRAMES)
            images = {camera: list(islice(encoded, PIECE_FRAMES)) for camera, encoded in frames.items()}
            sizes = sizes or frame_sizes(replace(episode, images=images))
            columns = [*images.values(), episode.actions[piece].tolist(), states[piece].tolist()]
            writer.write_table(pa.table(columns, schema=schema))
        for encoded in frames.values():
            next(encoded, None)  # runs to its end, where a source notices what there is too much of
        about = {"task": episode.task, "name": episode.name, "sizes": json.dumps(sizes), "error": ""}
        writer.add_key_value_metadata(about)


def _write_nothing(path: Path, error: str) -> None:
    schema = pa.schema(_VECTORS).with_metadata({"task": "", "name": "", "sizes": "{}", "error": error})
    pq.write_table(schema.empty_table(), path)


_VECTORS = [("action", pa.list_(pa.float32())), ("state", pa.list_(pa.float32()))]


def _runs(staging: Staging, missing: list[int], num_proc: int) -> list[list[int]]:
    """What is asked of a process at a time: small enough to keep all of them busy until the end."""
    length = min(MAX_RUN, -(-len(missing) // (4 * num_proc))) if staging.source.info.in_order else 1
    return [missing[start : start + length] for start in range(0, len(missing), length)]


def _stage_in_parallel(staging: Staging, missing: list[int], num_proc: int, progress: tqdm) -> None:
    # "spawn", because forking copies whatever threads and locks zarr, torch or a GL context hold at that moment.
    others = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(
        max_workers=min(num_proc, len(missing)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(staging,),
    )
    try:
        # Ctrl-C reaches the whole process group. Workers inherit that it is blocked; this process ends them itself.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            futures = [executor.submit(_stage_in_worker, run) for run in _runs(staging, missing, num_proc)]
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for future in as_completed(futures):
            progress.update(future.result())
    except BrokenProcessPool as error:
        raise ConversionError(
            "a worker process died, out of memory perhaps: run the same command again with a smaller --num_proc; "
            f"finished episodes are kept in {staging.partial}"
        ) from error
    except (KeyboardInterrupt, EpisodeError, OSError):
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()  # an episode can take a minute; what it has written so far is not under a final name
        raise
    finally:
        executor.shutdown(cancel_futures=True)


_worker_staging: Staging


def _start_worker(staging: Staging) -> None:
    global _worker_staging
    _worker_staging = staging
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A killed parent leaves workers that wait for work for ever."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _stage_in_worker(run: list[int]) -> int:
    for index in run:
        _stage(_worker_staging, index)
    return len(run)
