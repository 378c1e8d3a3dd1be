"""Episodes of a LeRobotDataset: vectors from parquet, frames from parquet or mp4, each file from front to back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vla0_trl.conversion.staging import ConversionError
from vla0_trl.episodes import Episode, EpisodeError, SourceInfo
from vla0_trl.sources.lerobot_meta import IMAGE_TYPES, EpisodeMeta, LeRobotMeta
from vla0_trl.sources.parquet_images import ImageColumn, readable

_STATE_KEYS = ("observation.state", "state")  # LeRobot's name, and physical-intelligence/libero's
_ACTION_KEYS = ("action", "actions")
_STATS_SLACK = 0.01  # of a dimension's range
_FIX = "fetch the dataset again, or leave the episode out with --skip_bad_episodes"


@dataclass
class FeatureKeys:
    """Which features are what.

    Args:
        cameras (`dict[str, str]`): camera's name -> key.
        action, state (`str`): keys; `state` is None if there is none.
    """

    cameras: dict[str, str]
    action: str
    state: str | None


def find_keys(
    meta: LeRobotMeta,
    image_keys: list[str] | None = None,
    state_key: str | None = None,
    action_key: str | None = None,
) -> FeatureKeys:
    """The features to use, as given or found in info.json; depth maps are no cameras.

    Raises:
        ConversionError: a feature that there is not, no camera or no action at all.
    """
    features = meta.features
    where = f"{meta.root}/meta/info.json"

    def existing(flag: str, asked: list[str | None], known: tuple[str, ...]) -> list[str]:
        unknown = [key for key in asked if key and key not in features]
        if unknown:
            raise ConversionError(f"{flag}: {where} has no feature {unknown[0]!r}, it has {sorted(features)}")
        return [key for key in asked if key] or [key for key in known if key in features]

    images = [key for key, feature in features.items() if feature["dtype"] in IMAGE_TYPES]
    images = [key for key in images if not features[key].get("info", {}).get("video.is_depth_map")]
    images = existing("--image_keys", image_keys or [], tuple(images))
    actions = existing("--action_key", [action_key], _ACTION_KEYS)
    states = existing("--state_key", [state_key], _STATE_KEYS)
    for flag, found, what in (("--image_keys", images, "camera"), ("--action_key", actions, "action")):
        if not found:
            raise ConversionError(f"{where} has no {what}: say which of {sorted(features)} with {flag}")
    no_images = [key for key in images if features[key]["dtype"] not in IMAGE_TYPES]
    if no_images:
        raise ConversionError(
            f"--image_keys: {no_images[0]!r} is {features[no_images[0]]['dtype']}, not image or video"
        )
    cameras = {key.removeprefix("observation.").removeprefix("images."): key for key in images}
    if len(cameras) < len(images):
        raise ConversionError(f"{images} have the same names without their prefixes: choose with --image_keys")
    return FeatureKeys(cameras, actions[0], states[0] if states else None)


class LeRobotSource:
    """The episodes of a LeRobotDataset.

    Args:
        meta (`LeRobotMeta`): as read.
        keys (`FeatureKeys`): which features to use; frames of other cameras are not read.
        info (`SourceInfo`): where it is from.
        check_stats (`bool`): compare what is read with the dataset's own statistics.
    """

    def __init__(self, meta: LeRobotMeta, keys: FeatureKeys, info: SourceInfo, check_stats: bool = True):
        self.meta, self.keys, self.info, self.check_stats = meta, keys, info, check_stats
        self.action_dim = self._dim(keys.action)
        self.state_dim = self._dim(keys.state) if keys.state else 0
        self._table: tuple[str, pa.Table | None] = ("", None)
        self._readers: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.meta.episodes)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_table": ("", None), "_readers": {}}  # every process opens its own files

    def task(self, index: int) -> str:
        return next(iter(self.meta.episodes[index].tasks), "")

    def episode(self, index: int) -> Episode:
        meta = self.meta.episodes[index]
        name = f"{self.info.source}, episode {meta.index}"
        rows, start = self._rows(meta, name)
        vectors = {key: self._vectors(rows, key, meta, name) for key in (self.keys.action, self.keys.state) if key}
        if self.check_stats:
            for key, values in vectors.items():
                self._compare_stats(key, values, meta, name)
        images = {
            camera: _Frames(self, camera, key, meta, start, rows["timestamp"].to_numpy(), name)
            for camera, key in self.keys.cameras.items()
        }
        state = vectors[self.keys.state] if self.keys.state else None
        return Episode(self._task(rows, name), vectors[self.keys.action], images, state, name)

    def reader(self, camera: str, kind: type, path: Path, *args: Any) -> Any:
        """The open file of a camera; the one before it is closed."""
        reader = self._readers.get(camera)
        if reader is None or reader.path != path:
            if reader is not None:
                reader.close()
            reader = self._readers[camera] = kind(path, *args)
        return reader

    def _dim(self, key: str) -> int:
        shape = self.meta.features[key]["shape"]
        if len(shape) != 1:
            raise ConversionError(f"{self.meta.root}/meta/info.json: {key} has shape {shape}, expected [dimensions]")
        return shape[0]

    def _rows(self, meta: EpisodeMeta, name: str) -> tuple[pa.Table, int]:
        """The episode's rows without images, and the number of the first in its file."""
        path = self.meta.root / meta.data
        if self._table[0] != meta.data:
            columns = ["episode_index", "timestamp", "task_index", self.keys.action]
            columns += [self.keys.state] if self.keys.state else []
            with readable(path, name):
                missing = [column for column in columns if column not in pq.read_schema(path).names]
                if missing:
                    raise EpisodeError(f"{name}: {path} has no column {missing[0]!r}: {_FIX}")
                self._table = (meta.data, pq.read_table(path, columns=columns, partitioning=None))
        table = self._table[1]
        own = np.flatnonzero(table["episode_index"].to_numpy() == meta.index)
        if len(own) != meta.length or (len(own) and own[-1] - own[0] + 1 != len(own)):
            raise EpisodeError(
                f"{name}: {path} has {len(own)} rows of it, meta/episodes says length {meta.length}: {_FIX}"
            )
        if not len(own):
            raise EpisodeError(f"{name}: {path}: has no frames: {_FIX}")
        return table.slice(own[0], len(own)), int(own[0])

    def _vectors(self, rows: pa.Table, key: str, meta: EpisodeMeta, name: str) -> np.ndarray:
        """float32 (T, D)."""
        column = rows[key].combine_chunks()
        dim = self._dim(key)
        widths = {1}
        if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
            widths = set(pc.list_value_length(column).to_pylist())
            column = column.flatten()
        if widths != {dim} or column.null_count:
            raise EpisodeError(
                f"{name}: {self.meta.root / meta.data}: {key} has {sorted(map(str, widths))} dimensions and "
                f"{column.null_count} empty values, meta/info.json says {dim} dimensions: {_FIX}"
            )
        return column.to_numpy().astype(np.float32).reshape(-1, dim)

    def _task(self, rows: pa.Table, name: str) -> str:
        numbers = pc.unique(rows["task_index"]).to_pylist()
        where = f"{self.meta.root / self.meta.tasks_file}"
        if len(numbers) != 1:
            raise EpisodeError(
                f"{name}: has {len(numbers)} tasks (task_index {numbers}), an episode can have one: split the "
                "recording, or leave the episode out with --skip_bad_episodes"
            )
        text = self.meta.tasks.get(numbers[0]) or ""
        if not text.strip():
            raise EpisodeError(
                f"{name}: task_index {numbers[0]} has no text in {where}: write the instruction there, or leave the "
                "episode out with --skip_bad_episodes"
            )
        return text

    def _compare_stats(self, key: str, values: np.ndarray, meta: EpisodeMeta, name: str) -> None:
        """Values outside of the dataset's own range: its data or its statistics are of another version.

        The statistics themselves are computed again, so that smaller differences and missing ones do no harm.
        """
        stats = self.meta.stats.get(meta.index, self.meta.stats.get(None, {})).get(key)
        if stats is None or not {"min", "max"} <= stats.keys():
            return
        low, high = (np.asarray(stats[bound], np.float64).ravel() for bound in ("min", "max"))
        dim = values.shape[1]
        fix = "fetch the dataset again, or trust the data with --ignore_stats"
        if len(low) != dim or len(high) != dim:
            raise EpisodeError(f"{name}: meta's statistics of {key} have {len(low)} dimensions, the data {dim}: {fix}")
        slack = _STATS_SLACK * (high - low) + 1e-4 * (1 + np.abs(high))
        outside = (values < low - slack) | (values > high + slack)
        if outside.any():
            frame, at = np.argwhere(outside)[0]
            raise EpisodeError(
                f"{name}, frame {frame}: {key}[{at}] is {values[frame, at]:g}, meta's statistics say {low[at]:g} to "
                f"{high[at]:g}: {fix}"
            )


@dataclass
class _Frames:
    """A camera's frames of one episode, not read before they are iterated."""

    source: LeRobotSource
    camera: str
    key: str
    meta: EpisodeMeta
    start: int
    timestamps: np.ndarray
    name: str

    def __len__(self) -> int:
        return len(self.timestamps)

    def __iter__(self) -> Iterator[np.ndarray | bytes]:
        source, root, name = self.source, self.source.meta.root, f"{self.name}, camera {self.camera!r}"
        if self.key not in self.meta.videos:
            path = root / self.meta.data
            return source.reader(self.camera, ImageColumn, path, self.key).frames(self.start, len(self), name)
        return self._video(root, name)

    def _video(self, root: Path, name: str) -> Iterator[np.ndarray]:
        try:
            from vla0_trl.sources.video import VideoReader
        except ImportError as error:
            raise ConversionError('reading videos needs PyAV: pip install -e ".[convert]"') from error
        fps = self.source.meta.info["fps"]
        span = self.meta.videos[self.key]
        if span.end is not None and abs((span.end - span.start) * fps - len(self)) > 0.5:
            raise EpisodeError(
                f"{name}: meta/episodes gives it {span.start:.4f} to {span.end:.4f} s of {root / span.path}, which is "
                f"{(span.end - span.start) * fps:.1f} frames; the parquet has {len(self)} rows: {_FIX}"
            )
        reader = self.source.reader(self.camera, VideoReader, root / span.path, fps)
        times = span.start + self.timestamps.astype(np.float64)
        return reader.frames(times, name, alone=span.end is None)
