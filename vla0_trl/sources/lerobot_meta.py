"""The `meta/` folder of a LeRobotDataset, v2.0 to v3.0: which episodes there are, in which files, with which features.

Read from the formats' definition (`lerobot/datasets` of lerobot 0.3.3 and 0.6.1), without that package, whose pins
conflict with this one's.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vla0_trl.conversion.staging import ConversionError

VERSIONS = ("v2.0", "v2.1", "v3.0")
IMAGE_TYPES = ("image", "video")


@dataclass
class VideoSpan:
    """Where a camera's frames of one episode are.

    Args:
        path (`str`): of the mp4, in the dataset's folder.
        start, end (`float`): in its seconds; `end` is None if the file holds this episode alone.
    """

    path: str
    start: float = 0.0
    end: float | None = None


@dataclass
class EpisodeMeta:
    """What `meta/` tells of an episode; `data` is its parquet in the dataset's folder."""

    index: int
    length: int
    tasks: list[str]
    data: str
    videos: dict[str, VideoSpan] = field(default_factory=dict)


@dataclass
class LeRobotMeta:
    """All of `meta/`.

    Args:
        root (`Path`): the dataset's folder.
        info (`dict`): info.json.
        features (`dict`): name -> {dtype, shape, names, …}.
        tasks (`dict[int, str]`): task_index -> instruction.
        tasks_file (`str`): where they are from, for messages.
        episodes (`list[EpisodeMeta]`): by ascending index.
        stats (`dict`): episode index -> feature -> its statistics; under None those of the whole dataset.
        digest (`str`): of the folder's contents.
    """

    root: Path
    info: dict[str, Any]
    features: dict[str, dict[str, Any]]
    tasks: dict[int, str]
    tasks_file: str
    episodes: list[EpisodeMeta]
    stats: dict[int | None, dict[str, Any]]
    digest: str

    @property
    def video_keys(self) -> list[str]:
        return _keys(self.features, "video")


def read_meta(root: Path) -> LeRobotMeta:
    """Read `root/meta`.

    Raises:
        ConversionError: no LeRobotDataset, an unknown version, a file or a field of `meta/` missing.
    """
    path = root / "meta/info.json"
    if not path.is_file():
        raise ConversionError(f"{root} is no LeRobotDataset: it has no meta/info.json")
    info = _json(path, path.read_text())
    version = info.get("codebase_version")
    if version not in VERSIONS:
        raise ConversionError(
            f"{path}: codebase_version {version!r} is unknown, this reads {', '.join(VERSIONS)}: convert the dataset "
            "with LeRobot's own scripts, or update vla0_trl"
        )
    missing = {"features", "fps", "data_path"} - info.keys()
    if missing:
        raise ConversionError(f"{path}: {sorted(missing)} are missing: the file is damaged, fetch it again")
    features = info["features"]
    parts = _v30(root, info) if version == "v3.0" else _v2(root, info)
    return LeRobotMeta(root, info, features, *parts, digest=_digest(root / "meta"))


def _v2(root: Path, info: dict[str, Any]) -> tuple[dict[int, str], str, list[EpisodeMeta], dict]:
    """One parquet, and one mp4 a camera, for each episode; `episodes_stats.jsonl` since v2.1."""
    tasks = {line["task_index"]: line["task"] or "" for line in _json_lines(root / "meta/tasks.jsonl")}
    video_keys = _keys(info["features"], "video")
    episodes = []
    for line in _json_lines(root / "meta/episodes.jsonl"):
        index = line["episode_index"]
        numbers = {"episode_index": index, "episode_chunk": index // info.get("chunks_size", 1000)}
        videos = {key: VideoSpan(info["video_path"].format(video_key=key, **numbers)) for key in video_keys}
        data = info["data_path"].format(**numbers)
        episodes.append(EpisodeMeta(index, line["length"], line.get("tasks", []), data, videos))
    stats: dict[int | None, dict] = {}
    if (root / "meta/episodes_stats.jsonl").is_file():
        stats = {line["episode_index"]: line["stats"] for line in _json_lines(root / "meta/episodes_stats.jsonl")}
    else:
        stats = _whole_stats(root)
    return tasks, "meta/tasks.jsonl", sorted(episodes, key=lambda e: e.index), stats


def _v30(root: Path, info: dict[str, Any]) -> tuple[dict[int, str], str, list[EpisodeMeta], dict]:
    """Many episodes in a parquet and in an mp4."""
    path = root / "meta/tasks.parquet"
    table = _table(path)
    texts = [name for name in table.column_names if name != "task_index"]  # a pandas index, named or not
    if "task_index" not in table.column_names or not texts:
        raise ConversionError(f"{path}: has columns {table.column_names}, expected task_index and the task's text")
    tasks = {row["task_index"]: row[texts[0]] or "" for row in table.to_pylist()}

    video_keys = _keys(info["features"], "video")
    columns = ["episode_index", "length", "tasks", "data/chunk_index", "data/file_index"]
    parts = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
    columns += [f"videos/{key}/{part}" for key in video_keys for part in parts]
    paths = sorted((root / "meta/episodes").rglob("*.parquet"))
    if not paths:
        raise ConversionError(f"{root}: meta/episodes has no parquet files: the copy is not complete, fetch it again")
    episodes = [
        EpisodeMeta(
            row["episode_index"],
            row["length"],
            row["tasks"],
            _file(info["data_path"], row, "data"),
            {
                key: VideoSpan(
                    _file(info["video_path"], row, f"videos/{key}", video_key=key),
                    row[f"videos/{key}/from_timestamp"],
                    row[f"videos/{key}/to_timestamp"],
                )
                for key in video_keys
            },
        )
        for path in paths
        for row in _table(path, columns).to_pylist()  # without the statistics, which are most of it
    ]
    return tasks, "meta/tasks.parquet", sorted(episodes, key=lambda e: e.index), _whole_stats(root)


def _file(template: str, row: dict[str, Any], prefix: str, **names: str) -> str:
    chunk, file = row[f"{prefix}/chunk_index"], row[f"{prefix}/file_index"]
    return template.format(chunk_index=chunk, file_index=file, **names)


def _whole_stats(root: Path) -> dict[int | None, dict]:
    path = root / "meta/stats.json"
    return {None: _json(path, path.read_text())} if path.is_file() else {}


def _keys(features: dict[str, dict[str, Any]], dtype: str) -> list[str]:
    return [key for key, feature in features.items() if feature["dtype"] == dtype]


def _table(path: Path, columns: list[str] | None = None) -> pa.Table:
    try:
        schema = pq.read_schema(path)
        missing = [name for name in columns or [] if name not in schema.names]
        if missing:
            raise ConversionError(f"{path}: columns {missing} are missing: it does not fit meta/info.json")
        return pq.read_table(path, columns=columns, partitioning=None)
    except FileNotFoundError as error:
        raise ConversionError(f"{path} is missing: the copy is not complete, fetch it again") from error
    except pa.ArrowInvalid as error:
        raise ConversionError(f"{path} is damaged, fetch it again: {error}") from error


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise ConversionError(f"{path} is missing: the copy is not complete, fetch it again")
    for line in path.read_text().splitlines():
        if line.strip():
            yield _json(path, line)


def _json(path: Path, text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConversionError(f"{path} is no JSON, fetch it again: {error}") from error


def _digest(folder: Path) -> str:
    """Of the names and contents of all files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def wildcard(template: str, video_key: str = "") -> str:
    """A path of info.json as a pattern for all of its files: "data/*/episode_*.parquet"."""
    return re.sub(r"\{[^}]*\}", "*", template.replace("{video_key}", video_key))
