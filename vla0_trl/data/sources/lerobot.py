"""Episodes of a LeRobotDataset: vectors from parquet, frames from parquet or mp4, each file from front to back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vla0_trl.data.episodes import Episode, EpisodeError, SourceInfo
from vla0_trl.data.sources.lerobot_meta import IMAGE_TYPES, EpisodeMeta, LeRobotMeta
from vla0_trl.data.sources.parquet_images import ImageColumn, readable
from vla0_trl.data.staging import ConversionError

_STATE_KEYS = ("observation.state", "state")  # LeRobot's name, and physical-intelligence/libero's
_ACTION_KEYS = ("action", "actions")
_STATS_SLACK = 0.01  # of a dimension's range
_FIX = "fetch the dataset again, or leave the episode out with --skip_bad_episodes"


class LeRobotSource:
    """The episodes of a LeRobotDataset, whose features are used as given or as found in info.json.

    Args:
        meta (`LeRobotMeta`): as read.
        image_keys (`list[str]`, *optional*): features that are cameras; frames of others are not read. Depth maps are
            none unless they are named here.
        state_key, action_key (`str`, *optional*): features. There may be no state.
        check_stats (`bool`): compare what is read with the dataset's own statistics.

    Raises:
        ConversionError: a feature that there is not, no camera or no action at all.
    """

    def __init__(
        self,
        meta: LeRobotMeta,
        image_keys: list[str] | None = None,
        state_key: str | None = None,
        action_key: str | None = None,
        check_stats: bool = True,
    ):
        self.meta, self.check_stats = meta, check_stats
        pictures = [key for key, feature in meta.features.items() if feature["dtype"] in IMAGE_TYPES]
        known = [key for key in pictures if not meta.features[key].get("info", {}).get("video.is_depth_map")]
        images = self._found("--image_keys", image_keys or [], known, "camera")
        for key in images:
            if key not in pictures:
                dtype = meta.features[key]["dtype"]
                raise ConversionError(f"--image_keys: {key!r} is {dtype}, not image or video")
        self.cameras = {key.removeprefix("observation.").removeprefix("images."): key for key in images}
        if len(self.cameras) < len(images):
            raise ConversionError(f"{images} have the same names without their prefixes: choose with --image_keys")
        self.action_key = self._found("--action_key", [action_key] if action_key else [], _ACTION_KEYS, "action")[0]
        states = self._found("--state_key", [state_key] if state_key else [], _STATE_KEYS)
        self.state_key = states[0] if states else None
        self.action_dim = self._dim(self.action_key)
        self.state_dim = self._dim(self.state_key) if states else 0

        robot = meta.info.get("robot_type") or "unknown"
        self.info = SourceInfo(
            source=meta.hub_id or meta.root.resolve().name,
            revision=meta.revision or f"sha256 of meta/: {meta.digest}",
            license=meta.license,
            robot=robot,
            fps=float(meta.info["fps"]),
            how=f"Converted from a LeRobotDataset, format {meta.info['codebase_version']}, recorded with {robot}.",
            options={"action": self.action_key, "state": self.state_key, "cameras": self.cameras},
        )
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
        actions = self._vectors(rows, self.action_key, meta, name)
        states = self._vectors(rows, self.state_key, meta, name) if self.state_key else None
        times = rows["timestamp"].to_numpy().astype(np.float64)
        images = {
            camera: self._frames(f"{name}, camera {camera!r}", camera, key, meta, start, times)
            for camera, key in self.cameras.items()
        }
        return Episode(self._task(rows, name), actions, images, states, name)

    def _found(self, flag: str, asked: list[str], known: Iterable[str], needed: str = "") -> list[str]:
        features, where = self.meta.features, f"{self.meta.root}/meta/info.json"
        for key in asked:
            if key not in features:
                raise ConversionError(f"{flag}: {where} has no feature {key!r}, it has {sorted(features)}")
        found = asked or [key for key in known if key in features]
        if needed and not found:
            raise ConversionError(f"{where} has no {needed}: say which of {sorted(features)} with {flag}")
        return found

    def _dim(self, key: str) -> int:
        shape = self.meta.features[key]["shape"]
        if len(shape) != 1:
            raise ConversionError(f"{self.meta.root}/meta/info.json: {key} has shape {shape}, expected [dimensions]")
        return shape[0]

    def _rows(self, meta: EpisodeMeta, name: str) -> tuple[pa.Table, int]:
        """The episode's rows without images, and the number of the first in its file."""
        path = self.meta.root / meta.data
        if self._table[0] != meta.data:
            columns = ["episode_index", "timestamp", "task_index", self.action_key]
            columns += [self.state_key] if self.state_key else []
            with readable(path, name):
                missing = [column for column in columns if column not in pq.read_schema(path).names]
                if missing:
                    raise EpisodeError(f"{name}: {path} has no column {missing[0]!r}: {_FIX}")
                self._table = (meta.data, pq.read_table(path, columns=columns, partitioning=None))
        table = self._table[1]
        own = np.flatnonzero(table["episode_index"].to_numpy() == meta.index)
        if not len(own) or len(own) != meta.length or own[-1] - own[0] + 1 != len(own):
            raise EpisodeError(
                f"{name}: {path} has {len(own)} rows of it, meta/episodes says length {meta.length}: {_FIX}"
            )
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
        values = column.to_numpy().astype(np.float32).reshape(-1, dim)
        if self.check_stats:
            self._compare_stats(key, values, meta, name)
        return values

    def _task(self, rows: pa.Table, name: str) -> str:
        numbers = pc.unique(rows["task_index"]).to_pylist()
        if len(numbers) != 1:
            raise EpisodeError(
                f"{name}: has {len(numbers)} tasks (task_index {numbers}), an episode can have one: split the "
                "recording, or leave the episode out with --skip_bad_episodes"
            )
        text = self.meta.tasks.get(numbers[0]) or ""
        if not text.strip():
            raise EpisodeError(
                f"{name}: task_index {numbers[0]} has no text in {self.meta.root / self.meta.tasks_file}: write the "
                "instruction there, or leave the episode out with --skip_bad_episodes"
            )
        return text

    def _compare_stats(self, key: str, values: np.ndarray, meta: EpisodeMeta, name: str) -> None:
        """Values outside of the dataset's own range: its data or its statistics are of another version.

        The statistics themselves are computed again, so that smaller differences and missing ones do no harm.
        """
        stats = meta.stats.get(key, {})
        if not {"min", "max"} <= stats.keys():
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

    def _frames(
        self, name: str, camera: str, key: str, meta: EpisodeMeta, start: int, times: np.ndarray
    ) -> Iterator[np.ndarray | bytes]:
        """A camera's frames of an episode, whose rows begin at `start` and are at `times`; `name` names both."""
        if key not in meta.videos:
            column = self._reader(camera, ImageColumn, self.meta.root / meta.data, key)
            yield from column.frames(start, len(times), name)
            return
        try:
            from vla0_trl.data.sources.video import VideoReader
        except ImportError as error:
            raise ConversionError('reading videos needs PyAV: pip install -e ".[convert]"') from error
        fps, span = self.meta.info["fps"], meta.videos[key]
        path = self.meta.root / span.path
        if span.end is not None and abs((span.end - span.start) * fps - len(times)) > 0.5:
            raise EpisodeError(
                f"{name}: meta/episodes gives it {span.start:.4f} to {span.end:.4f} s of {path}, which is "
                f"{(span.end - span.start) * fps:.1f} frames; the parquet has {len(times)} rows: {_FIX}"
            )
        video = self._reader(camera, VideoReader, path, fps)
        yield from video.frames(span.start + times, name, alone=span.end is None)

    def _reader(self, camera: str, kind: type, path: Path, *args: Any) -> Any:
        """The open file of a camera, one at a time."""
        reader = self._readers.get(camera)
        if reader is None or reader.path != path:
            reader = self._readers[camera] = kind(path, *args)
        return reader
