"""Phase 1 of a conversion: every episode read, checked and written to a file of its own, in parallel, resumably."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from vla0_trl.config import VLAConfig
from vla0_trl.episodes import Episode, EpisodeError, Source, checked_episode


class ConversionError(RuntimeError):
    """A conversion that can't begin or go on; the message says what to do."""


def staged_path(partial: Path, index: int) -> Path:
    """The file of one episode; it exists only when it is whole. A rejected episode's has no rows."""
    return partial / "episodes" / f"episode-{index:06d}.parquet"


def stage_episodes(source: Source, config: VLAConfig, indices: list[int], partial: Path, num_proc: int) -> int:
    """Stage the episodes that are not there yet; returns how many those were.

    Raises:
        EpisodeError: the first bad episode; others stay.
        ConversionError: a process died.
    """
    (partial / "episodes").mkdir(exist_ok=True)
    missing = [index for index in indices if not staged_path(partial, index).exists()]
    progress = tqdm(total=len(indices), initial=len(indices) - len(missing), desc="reading", unit="episode")
    with progress:
        if num_proc == 1:
            for index in missing:
                _stage(source, config, partial, index)
                progress.update()
        elif missing:
            _stage_in_parallel(source, config, partial, missing, num_proc, progress)
    return len(missing)


def read_staged(partial: Path, index: int, images: bool = True) -> Episode:
    """The inverse of staging; without `images` only the vectors are read."""
    path = staged_path(partial, index)
    schema = pq.read_schema(path)
    cameras = [name for name in schema.names if name.startswith("images.")]
    table = pq.read_table(path, columns=["action", "state", *(cameras if images else [])])
    actions, states = (
        table[name].combine_chunks().flatten().to_numpy().reshape(len(table), -1) for name in ("action", "state")
    )
    return Episode(
        task=schema.metadata[b"task"].decode(),
        actions=actions,
        images={name.removeprefix("images."): table[name].to_pylist() for name in cameras} if images else {},
        states=states if states.shape[1] else None,
        name=schema.metadata[b"name"].decode(),
    )


def _stage(source: Source, config: VLAConfig, partial: Path, index: int) -> None:
    episode = source.episode(index)
    columns: dict[str, pa.Array] = {}
    if episode is None:
        episode = Episode(task="", actions=np.zeros((0, config.action_dim), np.float32), images={})
    else:
        episode = checked_episode(episode, config)
        columns = {f"images.{camera}": pa.array(frames, pa.binary()) for camera, frames in episode.images.items()}
    states = np.zeros((len(episode.actions), 0), np.float32) if episode.states is None else episode.states
    columns["action"] = pa.array(episode.actions.tolist(), pa.list_(pa.float32()))
    columns["state"] = pa.array(states.tolist(), pa.list_(pa.float32()))
    table = pa.table(columns).replace_schema_metadata({"task": episode.task, "name": episode.name})

    path = staged_path(partial, index)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    # Neither compressed nor as a dictionary: frames are compressed already, and all of it is deleted in the end.
    pq.write_table(table, temporary, compression="none", use_dictionary=False)
    temporary.replace(path)


def _stage_in_parallel(
    source: Source, config: VLAConfig, partial: Path, missing: list[int], num_proc: int, progress: tqdm
) -> None:
    # "spawn", because forking copies whatever threads and locks zarr, torch or a GL context hold at that moment.
    others = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(
        max_workers=min(num_proc, len(missing)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(source, config, partial),
    )
    try:
        # Ctrl-C reaches the whole process group. Workers inherit that it is blocked; this process ends them itself.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            futures = [executor.submit(_stage_in_worker, index) for index in missing]
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for future in as_completed(futures):
            future.result()
            progress.update()
    except BrokenProcessPool as error:
        raise ConversionError(
            "a worker process died, out of memory perhaps: run the same command again with a smaller --num_proc; "
            f"finished episodes are kept in {partial}"
        ) from error
    except (KeyboardInterrupt, EpisodeError, OSError):
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()  # an episode can take a minute; what it has written so far is not under a final name
        raise
    finally:
        executor.shutdown(cancel_futures=True)


_worker_arguments: tuple[Source, VLAConfig, Path]


def _start_worker(source: Source, config: VLAConfig, partial: Path) -> None:
    global _worker_arguments
    _worker_arguments = source, config, partial
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A killed parent leaves workers that wait for work for ever."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _stage_in_worker(index: int) -> None:
    _stage(*_worker_arguments, index)
