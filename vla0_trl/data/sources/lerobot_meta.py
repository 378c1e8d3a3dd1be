"""The `meta/` folder of a LeRobotDataset, v2.1 or v3.0: which episodes there are, in which files, with which features.

Read from the formats' definition (`lerobot/datasets` of lerobot 0.3.3 and 0.6.1), without that package, whose pins
conflict with this one's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import DatasetCard

from vla0_trl.data.staging import ConversionError

VERSIONS = ("v2.1", "v3.0")
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
    """What `meta/` tells of an episode.

    Args:
        data (`str`): its parquet, in the dataset's folder.
        videos (`dict`): camera's feature -> where its frames are; none if they are in the parquet.
        stats (`dict`): feature -> statistics, of the episode or the whole dataset.
    """

    index: int
    length: int
    tasks: list[str]
    data: str
    videos: dict[str, VideoSpan]
    stats: dict[str, Any]


@dataclass
class LeRobotMeta:
    """All of `meta/`.

    Args:
        root (`Path`): the dataset's folder.
        info (`dict`): info.json.
        tasks (`dict[int, str]`): task_index -> instruction.
        tasks_file (`str`): where they are from, for messages.
        episodes (`list[EpisodeMeta]`): by ascending index.
        digest (`str`): of the folder's contents.
        license (`str`): from the dataset card.
        hub_id, revision (`str`, *optional*): where on the Hub it is from.
    """

    root: Path
    info: dict[str, Any]
    tasks: dict[int, str]
    tasks_file: str
    episodes: list[EpisodeMeta]
    digest: str
    license: str
    hub_id: str | None = None
    revision: str | None = None

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        """Name -> {dtype, shape, names, …}."""
        return self.info["features"]


_Parts = tuple[dict[int, str], str, list[EpisodeMeta]]


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
    video_keys = [key for key, feature in info["features"].items() if feature["dtype"] == "video"]
    parts = (_v30 if version == "v3.0" else _v21)(root, info, video_keys)
    card = root / "README.md"
    license = (card.is_file() and DatasetCard.load(card).data.license) or "unknown"
    return LeRobotMeta(root, info, *parts, _digest(root / "meta"), license)


def _v21(root: Path, info: dict[str, Any], video_keys: list[str]) -> _Parts:
    """One parquet, and one mp4 a camera, for each episode."""
    meta = root / "meta"
    tasks = {line["task_index"]: line["task"] or "" for line in _json_lines(meta / "tasks.jsonl")}
    stats = {}
    if (meta / "episodes_stats.jsonl").is_file():
        stats = {line["episode_index"]: line["stats"] for line in _json_lines(meta / "episodes_stats.jsonl")}
    episodes = []
    for line in _json_lines(meta / "episodes.jsonl"):
        index = line["episode_index"]
        numbers = {"episode_index": index, "episode_chunk": index // info.get("chunks_size", 1000)}
        data = info["data_path"].format(**numbers)
        videos = {key: VideoSpan(info["video_path"].format(video_key=key, **numbers)) for key in video_keys}
        episode = EpisodeMeta(index, line["length"], line.get("tasks", []), data, videos, stats.get(index, {}))
        episodes.append(episode)
    return tasks, "meta/tasks.jsonl", sorted(episodes, key=lambda e: e.index)


def _v30(root: Path, info: dict[str, Any], video_keys: list[str]) -> _Parts:
    """Many episodes in a parquet and in an mp4."""
    path = root / "meta/tasks.parquet"
    table = _table(path)
    texts = [name for name in table.column_names if name != "task_index"]  # a pandas index, named or not
    if "task_index" not in table.column_names or not texts:
        raise ConversionError(f"{path}: has columns {table.column_names}, expected task_index and the task's text")
    tasks = {row["task_index"]: row[texts[0]] or "" for row in table.to_pylist()}

    path = root / "meta/stats.json"
    stats = _json(path, path.read_text()) if path.is_file() else {}
    columns = ["episode_index", "length", "tasks", "data/chunk_index", "data/file_index"]
    parts = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
    columns += [f"videos/{key}/{part}" for key in video_keys for part in parts]
    paths = sorted((root / "meta/episodes").rglob("*.parquet"))
    if not paths:
        raise ConversionError(f"{root}: meta/episodes has no parquet files: the copy is not complete, fetch it again")
    rows = [row for path in paths for row in _table(path, columns).to_pylist()]  # without statistics, most of it
    episodes = []
    for row in rows:
        data = info["data_path"].format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
        videos = {}
        for key in video_keys:
            chunk, file, start, end = (row[f"videos/{key}/{part}"] for part in parts)
            video = info["video_path"].format(video_key=key, chunk_index=chunk, file_index=file)
            videos[key] = VideoSpan(video, start, end)
        episodes.append(EpisodeMeta(row["episode_index"], row["length"], row["tasks"], data, videos, stats))
    return tasks, "meta/tasks.parquet", sorted(episodes, key=lambda e: e.index)


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
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
