"""The one place that decides which rows, times and task an episode of a LeRobotDataset has.

An episode's rows are those with its `episode_index`, wherever they lie in its file, if their `frame_index` is 0, 1, 2,
…; its task is that of its frames' `task_index`. Vectors, images, videos, `--tasks` and `--max_episodes_per_task` all
read it from here.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vla0_trl.data.episodes import EpisodeError
from vla0_trl.data.sources.lerobot_meta import EpisodeMeta, LeRobotMeta
from vla0_trl.data.sources.parquet_images import readable

_WHOLE, _NUMBER = "whole numbers", "numbers"
_INDEX = {"episode_index": _WHOLE, "frame_index": _WHOLE, "timestamp": _NUMBER, "task_index": _WHOLE}
TIME_TOLERANCE = 0.25  # of a frame: timestamps are float32, and cameras' clocks are not exact
FIX = "fetch the dataset again, or leave the episode out with --skip_bad_episodes"
_REPAIR = "repair the recording, or leave the episode out with --skip_bad_episodes"


class EpisodeRows(NamedTuple):
    """An episode's frames, first to last."""

    rows: np.ndarray  # int64 (T,), their numbers in the data file
    times: np.ndarray  # float64 (T,), their timestamps in seconds
    task: str


class Frames:
    """[`EpisodeRows`] of a dataset's episodes; the index columns of one file are in memory."""

    def __init__(self, meta: LeRobotMeta, trust_timestamps: bool):
        self.meta, self.trust_timestamps = meta, trust_timestamps
        self._path: Path | None = None
        self._columns: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_path": None, "_columns": {}}

    def of(self, episode: EpisodeMeta, name: str) -> EpisodeRows:
        """The rows of one episode, which `name` names; `EpisodeError` where there is not one meaning."""
        path = self.meta.path(episode.data)
        columns = self._read(path, name)
        own = np.flatnonzero(columns["episode_index"] == episode.index)
        if not len(own) or len(own) != episode.length:
            raise EpisodeError(
                f"{name}: {path} has {len(own)} rows of it, meta/episodes says length {episode.length}: {FIX}"
            )
        self._check_order(columns["frame_index"][own], f"{name}: {path}")
        times = columns["timestamp"][own]
        self._check_times(times, name)
        return EpisodeRows(own, times, self._task(columns["task_index"][own], name))

    def _read(self, path: Path, name: str) -> dict[str, np.ndarray]:
        if self._path != path:
            table = read_columns(path, list(_INDEX), name)
            self._columns = {key: _scalars(table[key], kind, f"{name}: {path}: {key}") for key, kind in _INDEX.items()}
            self._path = path
        return self._columns

    def _check_order(self, frames: np.ndarray, where: str) -> None:
        ordered = np.arange(len(frames))
        if (frames == ordered).all():
            return
        found = np.sort(frames)
        if (found == ordered).all():
            at = np.flatnonzero(np.diff(frames) != 1)[0]
            problem = f"in the file {frames[at + 1]} follows {frames[at]}: sort its rows by episode_index, frame_index"
        else:
            at = np.flatnonzero(found != ordered)[0]
            twice = at and found[at] == found[at - 1]
            problem = (f"{found[at]} is there twice" if twice else f"{at} is missing") + f": {_REPAIR}"
        raise EpisodeError(f"{where}: frame_index has to be 0, 1, 2, … in every episode, {problem}")

    def _check_times(self, times: np.ndarray, name: str) -> None:
        fps = self.meta.info["fps"]
        expected = np.arange(len(times)) / fps
        wrong = np.flatnonzero(~(np.abs(times - times[0] - expected) <= TIME_TOLERANCE / fps))
        if len(wrong) and not self.trust_timestamps:
            at = wrong[0]
            raise EpisodeError(
                f"{name}, frame {at}: its timestamp is {times[at] - times[0]:.4f} s after the first one's, by the "
                f"{fps:g} fps of meta/info.json it would be {expected[at]:.4f} s: correct fps or the timestamps, "
                "leave the episode out with --skip_bad_episodes, or accept them with --trust_timestamps"
            )

    def _task(self, indices: np.ndarray, name: str) -> str:
        numbers = np.unique(indices).tolist()
        if len(numbers) != 1:
            raise EpisodeError(
                f"{name}: has {len(numbers)} tasks (task_index {numbers}), an episode can have one: split the "
                "recording, or leave the episode out with --skip_bad_episodes"
            )
        text = self.meta.tasks.get(numbers[0], "")
        if not text.strip():
            raise EpisodeError(
                f"{name}: task_index {numbers[0]} has no text in {self.meta.root / self.meta.tasks_file}: write the "
                "instruction there, or leave the episode out with --skip_bad_episodes"
            )
        return text


def read_columns(path: Path, columns: list[str], name: str) -> pa.Table:
    """Columns of a data file; `EpisodeError` if it is absent or damaged, or has not all of them."""
    with readable(path, name):
        missing = [column for column in columns if column not in pq.read_schema(path).names]
        if missing:
            raise EpisodeError(f"{name}: {path} has no column {missing[0]!r}: {FIX}")
        return pq.read_table(path, columns=columns, partitioning=None)


def vectors(column: pa.ChunkedArray, dim: int, where: str) -> np.ndarray:
    """float32 (rows, dim) of any of Arrow's kinds of lists, of tensors, and of scalars where `dim` is 1."""
    array, rows, widths = column.combine_chunks(), len(column), [1]
    empty = array.null_count
    while (is_list := _is_list(array)) or isinstance(array, pa.ExtensionArray):
        if is_list:
            lengths = pc.unique(pc.list_value_length(array)).to_pylist()
            widths = [width * length for width in widths for length in sorted(lengths, key=str) if length is not None]
            array = array.flatten()
        else:
            array = array.storage
        empty += array.null_count
    if empty or widths != [dim] or not _is_number(array.type):
        found = f"{' or '.join(map(str, widths))} values in a row of type {column.type}, {empty} of them null"
        raise EpisodeError(f"{where} has {found}; meta/info.json wants {dim} numbers: {FIX}")
    return array.to_numpy(zero_copy_only=False).astype(np.float32).reshape(rows, dim)


def _scalars(column: pa.ChunkedArray, wanted: str, where: str) -> np.ndarray:
    """(rows,): int64 or float64 as `wanted`; lists of one, as other writers have them, are scalars too."""
    array = column.combine_chunks()
    while _is_list(array) and not array.null_count and pc.unique(pc.list_value_length(array)).to_pylist() == [1]:
        array = array.flatten()
    if array.null_count or not _is_number(array.type):
        raise EpisodeError(f"{where} is {column.type} with {array.null_count} nulls, wanted {wanted}: {FIX}")
    values = array.to_numpy(zero_copy_only=False)
    if wanted is _NUMBER:
        return values.astype(np.float64)
    whole = np.nan_to_num(values).astype(np.int64)
    if (whole != values).any():
        raise EpisodeError(f"{where} holds {values[whole != values][0]}, wanted {wanted}: {FIX}")
    return whole


def _is_list(array: pa.Array) -> bool:
    kinds = pa.ListType | pa.LargeListType | pa.FixedSizeListType | pa.ListViewType | pa.LargeListViewType
    return isinstance(array.type, kinds)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
