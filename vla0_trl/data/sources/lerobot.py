"""Episodes of a LeRobotDataset: vectors from parquet, frames from parquet or mp4, each file from front to back."""

import math
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vla0_trl import pip_install
from vla0_trl.data.episodes import Episode, EpisodeError, SourceInfo
from vla0_trl.data.sources.gripper import as_sign
from vla0_trl.data.sources.lerobot_frames import FIX, EpisodeRows, Frames, read_columns, vectors
from vla0_trl.data.sources.lerobot_meta import IMAGE_TYPES, EpisodeMeta, LeRobotMeta
from vla0_trl.data.sources.parquet_images import ImageColumn
from vla0_trl.data.staging import ConversionError
from vla0_trl.joint_units import DEGREES, NORMALIZED, beyond_units, units_shown
from vla0_trl.schema import items, line_of_text, short

_STATE_KEYS = ("observation.state", "state")  # LeRobot's name, and physical-intelligence/libero's
_ACTION_KEYS = ("action", "actions")
_STATS_SLACK = 0.01  # of a dimension's range


class LeRobotSource:
    """The episodes of a LeRobotDataset, whose features are used as given or as found in info.json.

    Args:
        meta (`LeRobotMeta`): as read.
        image_keys, state_key, action_key (*optional*): features. Depth maps are not cameras unless they are named.
        check_stats (`bool`): compare what is read with the dataset's own statistics.
        trust_timestamps (`bool`): accept timestamps that contradict fps.
        gripper (`str`, *optional*): the last action dimension is one, by one of [`gripper.CONVENTIONS`].
        units (`str`, *optional*): what joints are measured in, one of [`joint_units.JOINT_UNITS`].
    """

    def __init__(
        self,
        meta: LeRobotMeta,
        image_keys: list[str] | None = None,
        state_key: str | None = None,
        action_key: str | None = None,
        check_stats: bool = True,
        trust_timestamps: bool = False,
        gripper: str | None = None,
        units: str | None = None,
    ):
        self.meta, self.check_stats, self.gripper, self.units = meta, check_stats, gripper, units
        pictures = [key for key, feature in meta.features.items() if feature["dtype"] in IMAGE_TYPES]
        known = [key for key in pictures if not _is_depth_map(meta.features[key])]
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

        robot = meta.info["robot_type"]
        said = {"units": units} if units else {}
        self.info = SourceInfo(
            source=meta.hub_id or meta.root.resolve().name,
            revision=meta.revision or f"sha256 of meta/: {meta.digest}",
            license=meta.license,
            robot=robot,
            fps=float(meta.info["fps"]),
            how=f"Converted from a LeRobotDataset, format {meta.info['codebase_version']}, recorded with {robot}.",
            options={
                "action": self.action_key,
                "state": self.state_key,
                "cameras": self.cameras,
                "trust_timestamps": trust_timestamps,
                "gripper": gripper,
                **said,
            },
            **said,
        )
        self.frames = Frames(meta, trust_timestamps)
        self._listed: dict[int, str] = {}  # tasks by which episodes were chosen before their frames were fetched
        self._table: tuple[str, pa.Table | None] = ("", None)
        self._readers: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.meta.episodes)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_table": ("", None), "_readers": {}}  # every process opens its own files

    def task(self, index: int) -> str:
        """The task of the episode's frames; on the Hub the one that `meta/` lists, so that not all must be fetched."""
        listed = self.listed_task(index)
        if listed is not None:
            self._listed[index] = listed
            return listed
        return self.frames.of(self.meta.episodes[index], self._name(index)).task

    def listed_task(self, index: int) -> str | None:
        """What `meta/` lists as a Hub dataset's episode's task, if that is one of the dataset's tasks."""
        tasks = self.meta.episodes[index].tasks
        usable = self.meta.hub_id and len(tasks) == 1 and tasks[0] in self.meta.tasks.values()
        return tasks[0] if usable else None

    def episode(self, index: int) -> Episode:
        meta, name = self.meta.episodes[index], self._name(index)
        rows = self.frames.of(meta, name)
        self._compare_task(rows.task, index, name)
        table = self._vectors_of(meta, rows.rows, name)
        actions = self._vectors(table, self.action_key, meta, name)
        actions = as_sign(actions, self.gripper, name) if self.gripper else actions
        states = self._vectors(table, self.state_key, meta, name) if self.state_key else None
        images = {
            camera: self._frames(f"{name}, camera {camera!r}", camera, key, meta, rows)
            for camera, key in self.cameras.items()
        }
        return Episode(rows.task, actions, images, states, name)

    def refuse_mixed_units(self, indices: Iterable[int]) -> None:
        """Where units are said, all of these episodes must be in them; merged recordings may not be.

        `ConversionError`: two episodes can't be in the same units.
        """
        shown: dict[str, str] = {}
        for index in indices if self.units else ():
            meta, name = self.meta.episodes[index], self._name(index)
            for key in filter(None, (self.action_key, self.state_key)):
                names = self.meta.features[key].get("names")
                body = [place for place, joint in enumerate(names or ()) if "gripper" not in str(joint)]
                if not isinstance(names, list) or len(names) != self._dim(key):
                    continue  # which one is a gripper, with 0…100 in either, is not known
                try:
                    table = self._vectors_of(meta, self.frames.of(meta, name).rows, name)
                    found = units_shown(vectors(table[key], self._dim(key), name)[:, body])
                except EpisodeError:
                    continue  # is told when it is converted
                if found:
                    shown.setdefault(found, f"{name}: {key}")
        if len(shown) > 1:
            raise ConversionError(
                f"{shown[DEGREES]} goes beyond 100, as degrees do, and {shown[NORMALIZED]} ends at exactly 100, as "
                "−100…100 does: a mix of units; convert them apart, with --episodes"
            )

    def _name(self, index: int) -> str:
        return f"{self.info.source}, episode {self.meta.episodes[index].index}"

    def _compare_task(self, task: str, index: int, name: str) -> None:
        listed = self.meta.episodes[index].tasks
        if self._listed.get(index, task) != task:
            raise EpisodeError(
                f"{name}: its frames' task is {task!r}, meta/episodes, by which it was chosen, says {listed[0]!r}: "
                "download the whole dataset and convert the folder, where the frames count"
            )
        if listed and task not in listed:
            warnings.warn(f"meta/episodes says {listed[0]!r} where the frames say {task!r}: they count", stacklevel=2)

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
        if sum(size != 1 for size in shape) > 1:
            raise ConversionError(f"{self.meta.root}/meta/info.json: {key} has shape {shape}, wanted a vector")
        return math.prod(shape)

    def names(self, key: str | None) -> list[str] | None:
        """Of a vector's dimensions; None where info.json has other than one different name for each of them."""
        found = self.meta.features.get(key, {}).get("names")
        if isinstance(found, dict) and len(found) == 1:  # {"motors": [...]}, {"axes": [...]}
            [found] = found.values()
        try:
            names = items(line_of_text, 1)(found)
        except ValueError:
            return None
        return names if len(set(names)) == len(names) == self._dim(key) else None

    def _vectors_of(self, meta: EpisodeMeta, rows: np.ndarray, name: str) -> pa.Table:
        """State and action of the episode's rows."""
        if self._table[0] != meta.data:
            keys = [self.action_key, *([self.state_key] if self.state_key else [])]
            self._table = (meta.data, read_columns(self.meta.path(meta.data), list(dict.fromkeys(keys)), name))
        return self._table[1].take(rows)

    def _vectors(self, table: pa.Table, key: str, meta: EpisodeMeta, name: str) -> np.ndarray:
        """float32 (T, D)."""
        values = vectors(table[key], self._dim(key), f"{name}: {self.meta.root / meta.data}: {key}")
        if self.check_stats:
            self._compare_stats(key, values, meta, name)
        if (largest := beyond_units(values, self.units)) is not None:
            raise EpisodeError(f"{name}: {key} reaches {largest:g}, which no joint in {self.units} does: see --units")
        return values

    def _compare_stats(self, key: str, values: np.ndarray, meta: EpisodeMeta, name: str) -> None:
        """Values outside of the dataset's own range: its data or its statistics are of another version.

        The statistics themselves are computed again, so that smaller differences and missing ones do no harm.
        """
        fix = "fetch the dataset again, or trust the data with --ignore_stats"
        stats = meta.stats.get(key)
        found = [stats.get(bound) for bound in ("min", "max")] if isinstance(stats, dict) else [None]
        if None in found:
            return
        try:
            low, high = (np.asarray(bound, np.float64).ravel() for bound in found)
        except (ValueError, TypeError) as error:
            raise EpisodeError(
                f"{name}: meta's statistics of {key} are {short(found)}, wanted lists of numbers: {fix}"
            ) from error
        dim = values.shape[1]
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
        self, name: str, camera: str, key: str, meta: EpisodeMeta, rows: EpisodeRows
    ) -> Iterator[np.ndarray | bytes]:
        """A camera's frames of an episode; `name` names both."""
        times = rows.times
        if key not in meta.videos:
            column = self._reader(camera, ImageColumn, self.meta.path(meta.data), key)
            yield from column.frames(rows.rows, name)
            return
        try:
            from vla0_trl.data.sources.video import VideoReader
        except ImportError as error:
            raise ConversionError(f"reading videos needs PyAV: {pip_install('convert')}") from error
        fps, span = self.meta.info["fps"], meta.videos[key]
        path = self.meta.path(span.path)
        if span.end is not None and abs((span.end - span.start) * fps - len(times)) > 0.5:
            raise EpisodeError(
                f"{name}: meta/episodes gives it {span.start:.4f} to {span.end:.4f} s of {path}, which is "
                f"{(span.end - span.start) * fps:.1f} frames; the parquet has {len(times)} rows: {FIX}"
            )
        video = self._reader(camera, VideoReader, path, fps)
        yield from video.frames(span.start + times, name, alone=span.end is None)

    def _reader(self, camera: str, kind: type, path: Path, *args: Any) -> Any:
        """The open file of a camera, one at a time."""
        reader = self._readers.get(camera)
        if reader is None or reader.path != path:
            reader = self._readers[camera] = kind(path, *args)
        return reader


def _is_depth_map(feature: dict[str, Any]) -> bool:
    """In any of LeRobot's spellings: `info`, in older versions `video_info`, with and without "video."."""
    places = (feature, feature["info"], feature["video_info"])
    return any(place.get(f"{prefix}is_depth_map") for place in places for prefix in ("", "video."))
