"""The `meta/` folder of a LeRobotDataset, v2.1 or v3.0: which episodes there are, in which files, with which features.

Read from the formats' definition (`lerobot/datasets` of lerobot 0.3.3 and 0.6.1), without that package, whose pins
conflict with this one's.
"""

import hashlib
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vla0_trl.data.sources import lerobot_schema
from vla0_trl.data.sources.lerobot_schema import filled
from vla0_trl.data.staging import ConversionError
from vla0_trl.schema import Kinds, checked, items, line_of_text, parse_json, parse_yaml, short

VERSIONS = ("v2.1", "v3.0")
IMAGE_TYPES = ("image", "video")
_MAX_HEADER = 100_000  # bytes of a dataset card that are looked at


@dataclass
class VideoSpan:
    """Where a camera's frames of one episode are: an mp4 in the dataset's folder, and from when to when in it."""

    path: str
    start: float = 0.0
    end: float | None = None  # the file holds this episode alone


@dataclass
class EpisodeMeta:
    """What `meta/` tells of an episode."""

    index: int
    length: int
    tasks: list[str]  # as `meta/` lists them; those of its frames count, see [`Frames`]
    data: str  # its parquet, in the dataset's folder
    videos: dict[str, VideoSpan]  # by the camera's feature; none if its frames are in the parquet
    stats: dict[str, Any]  # by feature: of the episode or the whole dataset


@dataclass
class LeRobotMeta:
    """All of `meta/`, the license of the dataset card, and where on the Hub it is from."""

    root: Path  # the dataset's folder
    info: dict[str, Any]
    tasks: dict[int, str]  # by task_index
    tasks_file: str
    episodes: list[EpisodeMeta]  # by ascending index
    digest: str  # of the contents of `meta/`
    license: str
    hub_id: str | None = None
    revision: str | None = None

    def path(self, name: str) -> Path:
        """A file of the dataset. Links stay inside it, or lead to where the Hub's cache keeps a snapshot's files."""
        return _inside(self.root, name)

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        """Name -> {dtype, shape, names, …}."""
        return self.info["features"]


def _inside(root: Path, name: str) -> Path:
    path, home = root / name, root.resolve()
    if not any(path.resolve().is_relative_to(folder) for folder in (home, home.parent.parent / "blobs")):
        raise ConversionError(f"{path} leads to {path.resolve()}, outside the dataset: put the file itself there")
    return path


_Parts = tuple[dict[int, str], str, list[EpisodeMeta]]


def read_meta(root: Path) -> LeRobotMeta:
    """Read `root/meta`; `ConversionError` for what is absent or wrong in it."""
    try:
        return _read_meta(root)
    except ValueError as error:  # a schema's, or of what is not text
        raise ConversionError(str(error)) from error


def _read_meta(root: Path) -> LeRobotMeta:
    path = root / "meta/info.json"
    if not path.is_file():
        raise ConversionError(f"{root} is not a LeRobotDataset: it has no meta/info.json")
    for file in (root / "meta").rglob("*"):
        _inside(root, str(file.relative_to(root)))
    found = parse_json(str(path), _text(path))
    version = found.get("codebase_version") if isinstance(found, dict) else None
    if version not in VERSIONS:
        raise ConversionError(
            f"{path}: codebase_version {short(version)} is unknown, this reads {', '.join(VERSIONS)}: convert the "
            "dataset with LeRobot's own scripts, or update vla0_trl"
        )
    info = checked(str(path), found, lerobot_schema.INFO)
    for key, feature in info["features"].items():
        info["features"][key] = checked(f"{path}: features: {key}", feature, lerobot_schema.FEATURE)
    video_keys = [key for key, feature in info["features"].items() if feature["dtype"] == "video"]
    tasks, tasks_file, episodes = (_v30 if version == "v3.0" else _v21)(root, info, video_keys)
    episodes.sort(key=lambda episode: episode.index)
    for episode, following in pairwise(episodes):
        if episode.index == following.index:
            raise ConversionError(f"{root}/meta lists episode {episode.index} twice: remove the line that is wrong")
    if info["total_episodes"] not in (None, len(episodes)):
        warnings.warn(
            f"{path}: total_episodes is {info['total_episodes']}, meta lists {len(episodes)} episodes: is the copy "
            "complete?",
            stacklevel=2,
        )
    return LeRobotMeta(root, info, tasks, tasks_file, episodes, _digest(root / "meta"), _license(root / "README.md"))


def _license(card: Path) -> str:
    """What the dataset card's header says, or "unknown"."""
    if not card.is_file():
        return "unknown"
    with card.open("rb") as file:
        header = re.match(rb"---\s*\n(.*?)\n---", file.read(_MAX_HEADER), re.DOTALL)
    try:
        found = parse_yaml(str(card), header.group(1)) if header else None
        found = found.get("license") if isinstance(found, dict) else None
        licenses = items(line_of_text, 1, 10)(found if isinstance(found, list) else [found])
        return licenses[0] if len(licenses) == 1 else "other"  # the Hub's word for it
    except ValueError:
        return "unknown"


def _v21(root: Path, info: dict[str, Any], video_keys: list[str]) -> _Parts:
    """One parquet and one mp4 per camera, for each episode."""
    meta, where = root / "meta", f"{root}/meta/info.json"
    tasks = _tasks(meta / "tasks.jsonl", _json_lines(meta / "tasks.jsonl", lerobot_schema.TASK))
    stats = {}
    if (meta / "episodes_stats.jsonl").is_file():
        lines = _json_lines(meta / "episodes_stats.jsonl", lerobot_schema.EPISODE_STATS)
        stats = {line["episode_index"]: line["stats"] for line in lines}
    episodes = []
    for line in _json_lines(meta / "episodes.jsonl", lerobot_schema.EPISODE):
        index = line["episode_index"]
        numbers = {"episode_index": index, "episode_chunk": index // max(info["chunks_size"], 1)}
        data = filled(where, "data_path", info["data_path"], **numbers)
        videos = {
            key: VideoSpan(filled(where, "video_path", info["video_path"], video_key=key, **numbers))
            for key in video_keys
        }
        episodes.append(EpisodeMeta(index, line["length"], line["tasks"], data, videos, stats.get(index, {})))
    return tasks, "meta/tasks.jsonl", episodes


def _v30(root: Path, info: dict[str, Any], video_keys: list[str]) -> _Parts:
    """Many episodes in a parquet and in an mp4."""
    path, where = root / "meta/tasks.parquet", f"{root}/meta/info.json"
    table = _table(path)
    text = _text_column(path, table.schema)
    lines = [checked(str(path), row | {"task": row[text]}, lerobot_schema.TASK) for row in table.to_pylist()]
    tasks = _tasks(path, lines)

    path = root / "meta/stats.json"
    stats = checked(str(path), parse_json(str(path), _text(path)), {}) if path.is_file() else {}
    kinds, video_file = lerobot_schema.EPISODE | lerobot_schema.DATA_FILE, lerobot_schema.VIDEO_FILE
    for key in video_keys:
        kinds |= {f"videos/{key}/{part}": kind for part, kind in video_file.items()}
    paths = sorted((root / "meta/episodes").rglob("*.parquet"))
    if not paths:
        raise ConversionError(f"{root}: meta/episodes has no parquet files: the copy is not complete, fetch it again")
    episodes = []
    for path in paths:
        for number, found in enumerate(_table(path, list(kinds)).to_pylist()):  # without statistics, most of it
            row = checked(f"{path}, row {number}", found, kinds)
            numbers = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
            data = filled(where, "data_path", info["data_path"], **numbers)
            videos = {}
            for key in video_keys:
                chunk, file, start, end = (row[f"videos/{key}/{part}"] for part in video_file)
                numbers = {"video_key": key, "chunk_index": chunk, "file_index": file}
                videos[key] = VideoSpan(filled(where, "video_path", info["video_path"], **numbers), start, end)
            episodes.append(EpisodeMeta(row["episode_index"], row["length"], row["tasks"], data, videos, stats))
    return tasks, "meta/tasks.parquet", episodes


def _text_column(path: Path, schema: pa.Schema) -> str:
    """The column of tasks.parquet that holds the text: pandas' index as LeRobot writes it, "task", or the only one."""

    def is_text(kind: pa.DataType) -> bool:
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)

    texts = [field.name for field in schema if is_text(field.type)]
    index = [name for name in (schema.pandas_metadata or {}).get("index_columns", []) if isinstance(name, str)]
    known = [name for name in (*index, "__index_level_0__", "task") if name in texts]
    if not known and len(texts) != 1:
        raise ConversionError(f"{path}: the columns of text are {texts}, wanted one, called task")
    return (known or texts)[0]


def _tasks(path: Path, lines: Iterable[dict[str, Any]]) -> dict[int, str]:
    """task_index -> text."""
    tasks: dict[int, str] = {}
    for line in lines:
        index, text = line["task_index"], line["task"]
        if tasks.setdefault(index, text) != text:
            raise ConversionError(f"{path}: task_index {index} is both {tasks[index]!r} and {text!r}: remove one")
    return tasks


def _table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Those of `columns` that there are; all by default."""
    try:
        names = None if columns is None else [name for name in pq.read_schema(path).names if name in columns]
        return pq.read_table(path, columns=names, partitioning=None)
    except FileNotFoundError as error:
        raise ConversionError(f"{path} is missing: the copy is not complete, fetch it again") from error
    except (OSError, pa.ArrowException) as error:
        raise ConversionError(f"{path} is damaged, fetch it again: {error}") from error


def _json_lines(path: Path, kinds: Kinds) -> Iterator[dict[str, Any]]:
    """JSON Lines end with "\\n"; texts may hold what else Python's splitlines takes for a line's end."""
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield checked(where, parse_json(where, line), kinds)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise ConversionError(f"{path} is missing: the copy is not complete, fetch it again") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file, fetch it again: {error}") from error


def _digest(folder: Path) -> str:
    """Of the names and contents of all files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
