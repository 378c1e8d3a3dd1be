"""LeRobotDatasets written from the formats' definition, not by lerobot, and ways to spoil them.

Every frame shows its episode, number and camera as black and white blocks that survive any codec: a frame in the
wrong place can be read off.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from PIL import Image

from vla0_trl.data.sources.lerobot import LeRobotSource
from vla0_trl.data.sources.lerobot_meta import read_meta

FPS = 30
SIDE = 64
BLOCKS = 4  # a side
LENGTHS = [5, 33, 4, 12, 7, 21, 6]
TASKS = ["pick up the red cube", "open the drawer"]
CODECS = {"h264": {"crf": "23"}, "libsvtav1": {"g": "2", "crf": "30", "preset": "12", "svtav1-params": "lp=1"}}
# Episodes of data, first and second camera that share a file: boundaries that do not fall together.
SHARED = {"data": 4, "top": 3, "wrist": 2}


def frame_of(episode: int, frame: int, camera: int) -> np.ndarray:
    """uint8 (64, 64, 3): 16 blocks, 1 bit each, in a colour of the camera."""
    number = episode << 10 | frame << 2 | camera
    bits = (number >> np.arange(BLOCKS**2) & 1).reshape(BLOCKS, BLOCKS).astype(np.uint8)
    picture = np.kron(bits, np.ones((SIDE // BLOCKS, SIDE // BLOCKS), np.uint8))[..., None] * np.uint8([200, 210, 220])
    return picture + np.uint8([5, 20, 10])


def number_in(image: Image.Image) -> tuple[int, int, int]:
    """(episode, frame, camera) as the blocks say."""
    grey = np.asarray(image.convert("L")).reshape(BLOCKS, SIDE // BLOCKS, BLOCKS, SIDE // BLOCKS)
    bits = grey[:, 4:-4, :, 4:-4].mean((1, 3)).ravel() > 115
    number = int((bits << np.arange(BLOCKS**2)).sum())
    return number >> 10, number >> 2 & 255, number & 3


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass
class Written:
    """A LeRobotDataset to write; what `spoil` is given is spoilt before it is written."""

    root: Path
    version: str = "v3.0"
    codec: str | None = "h264"  # None: images
    lengths: tuple[int, ...] = tuple(LENGTHS)
    options: tuple[str, ...] = ()
    names: tuple[str, ...] = ("observation.images.top", "observation.images.wrist", "observation.state", "action")
    side: int = SIDE

    def vectors(self, episode: int) -> tuple[np.ndarray, np.ndarray]:
        """float32 states (T, 3) and actions (T, 2)."""
        rng = np.random.default_rng(episode)
        states = rng.normal(size=(self.lengths[episode], 3)).astype(np.float32)
        return states, (states[:, :2] * 10).astype(np.float32)

    def write(self) -> Path:
        top, wrist, state, action = self.names
        self.cameras = {top: "top", wrist: "wrist"}
        one_each = self.version != "v3.0"
        dtype = "video" if self.codec else "image"
        features = {key: {"dtype": dtype, "shape": [self.side, self.side, 3]} for key in self.cameras}
        features[state] = {"dtype": "float32", "shape": [3], "names": {"motors": ["pan", "lift", "grip"]}}
        features[action] = {"dtype": "float32", "shape": [2], "names": None}
        for name in ("timestamp", "episode_index", "frame_index", "task_index"):
            features[name] = {"dtype": "float32" if name == "timestamp" else "int64", "shape": [1]}
        file = "episode_{episode_index:06d}" if one_each else "file-{file_index:03d}"
        chunk = "chunk-{episode_chunk:03d}" if one_each else "chunk-{chunk_index:03d}"
        key_and_chunk = f"{chunk}/{{video_key}}" if one_each else f"{{video_key}}/{chunk}"
        info = {
            "codebase_version": self.version,
            "robot_type": "so100",
            "fps": FPS,
            "chunks_size": 1000,
            "data_files_size_in_mb": 100.0,
            "data_path": f"data/{chunk}/{file}.parquet",
            "video_path": f"videos/{key_and_chunk}/{file}.mp4" if self.codec else None,
            "features": features,
        }
        self._dump("meta/info.json", info)
        per_file = {name: 1 if one_each else count for name, count in SHARED.items()}
        self._write_data(info, per_file["data"])
        if self.codec:
            for camera, (key, name) in enumerate(self.cameras.items()):
                self._write_videos(info, key, camera, per_file[name])
        (self._write_meta_v2 if one_each else self._write_meta_v3)(per_file)
        return self.root

    def task_of(self, episode: int) -> int:
        return episode % 2

    def _files(self, per_file: int) -> list[list[int]]:
        episodes = list(range(len(self.lengths)))
        return [episodes[start : start + per_file] for start in range(0, len(episodes), per_file)]

    def path(self, template: str, number: int, key: str = "") -> Path:
        numbers = {"episode_chunk": 0, "episode_index": number, "chunk_index": 0, "file_index": number}
        path = self.root / template.format(video_key=key, **numbers)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _write_data(self, info: dict, per_file: int) -> None:
        for number, episodes in enumerate(self._files(per_file)):
            tables = [self._rows(episode) for episode in episodes]
            with pq.ParquetWriter(self.path(info["data_path"], number), tables[0].schema) as writer:
                for table in tables:  # a row group each
                    writer.write_table(table)

    def _rows(self, episode: int) -> pa.Table:
        states, actions = self.vectors(episode)
        frames = np.arange(self.lengths[episode])
        vector = pa.list_(pa.float32(), 2) if self.version == "v3.0" else pa.list_(pa.float32())
        columns = {
            self.names[2]: pa.array(states.tolist(), pa.list_(pa.float32())),
            self.names[3]: pa.array(actions.tolist(), vector),
            "timestamp": pa.array((frames / FPS).astype(np.float32)),
            "frame_index": pa.array(frames),
            "episode_index": pa.array(np.full(len(frames), episode)),
            "task_index": pa.array(np.full(len(frames), self.task_of(episode))),
        }
        if not self.codec:
            for camera, key in enumerate(self.cameras):
                images = [{"bytes": png(frame_of(episode, frame, camera)), "path": f"{frame}.png"} for frame in frames]
                columns[key] = pa.array(images, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        return pa.table(columns)

    def _write_videos(self, info: dict, key: str, camera: int, per_file: int) -> None:
        for number, episodes in enumerate(self._files(per_file)):
            path = self.path(info["video_path"], number, key)
            with av.open(path, "w", options=dict(option.split("=") for option in self.options)) as container:
                stream = container.add_stream(self.codec, rate=FPS, options=CODECS[self.codec])
                stream.width = stream.height = self.side
                stream.pix_fmt = "yuv420p"
                for at, (episode, frame) in enumerate((e, f) for e in episodes for f in range(self.lengths[e])):
                    pixels = np.asarray(Image.fromarray(frame_of(episode, frame, camera)).resize([self.side] * 2, 0))
                    picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                    picture.pts, picture.time_base = at, Fraction(1, FPS)
                    if frame == 0:
                        picture.pict_type = av.video.frame.PictureType.I
                    container.mux(stream.encode(picture))
                container.mux(stream.encode())
            # SVT-AV1, run by root, gives its caller real-time priority, and then nothing else runs on that core.
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))

    def _stats(self, episodes: list[int]) -> dict:
        values = map(np.concatenate, zip(*map(self.vectors, episodes), strict=True))
        described = ({"min": v.min(0).tolist(), "max": v.max(0).tolist(), "count": [len(v)]} for v in values)
        return dict(zip(self.names[2:], described, strict=True))

    def _write_meta_v2(self, per_file: dict[str, int]) -> None:
        tasks = [{"task_index": index, "task": task} for index, task in enumerate(TASKS)]
        episodes = [
            {"episode_index": index, "tasks": [TASKS[self.task_of(index)]], "length": length}
            for index, length in enumerate(self.lengths)
        ]
        self._dump("meta/tasks.jsonl", *tasks)
        self._dump("meta/episodes.jsonl", *episodes)
        stats = [{"episode_index": i, "stats": self._stats([i])} for i in range(len(self.lengths))]
        self._dump("meta/episodes_stats.jsonl", *stats)

    def _write_meta_v3(self, per_file: dict[str, int]) -> None:
        self._dump("meta/stats.json", self._stats(list(range(len(self.lengths)))))
        # As pandas writes a frame whose index is the text.
        tasks = pa.table({"task_index": list(range(len(TASKS))), "__index_level_0__": TASKS})
        pq.write_table(tasks, self.root / "meta/tasks.parquet")
        rows = []
        for index, length in enumerate(self.lengths):
            row = {"episode_index": index, "tasks": [TASKS[self.task_of(index)]], "length": length}
            row |= {"data/chunk_index": 0, "data/file_index": index // per_file["data"]}
            for key, name in self.cameras.items() if self.codec else ():
                first = index // per_file[name] * per_file[name]
                start = sum(self.lengths[first:index]) / FPS
                row |= {f"videos/{key}/chunk_index": 0, f"videos/{key}/file_index": index // per_file[name]}
                row |= {f"videos/{key}/from_timestamp": start, f"videos/{key}/to_timestamp": start + length / FPS}
            row["stats/action/q01"] = [0.0, 0.0]
            rows.append(row)
        half = len(rows) // 2  # two files
        for number, part in enumerate((rows[:half], rows[half:])):
            path = self.root / f"meta/episodes/chunk-000/file-{number:03d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(part), path)

    def _dump(self, name: str, *lines: dict) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text("\n".join(json.dumps(line) for line in lines) + "\n")


# -- what spoils them


def rewrite(path: Path, change) -> None:
    """A parquet with its rows changed."""
    pq.write_table(change(pq.read_table(path, partitioning=None)), path)


def edit_info(root: Path, **changes) -> None:
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(info | changes))


def edit_lines(path: Path, change, line: int = 1) -> None:
    """One line of JSON Lines changed in place."""
    lines = [json.loads(text) for text in path.read_text().split("\n") if text]
    change(lines[line])
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def first_video(root: Path) -> Path:
    return min(root.glob("videos/**/*.mp4"))


def replace_column(table: pa.Table, name: str, values) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


def wrong_span(table: pa.Table) -> pa.Table:
    first, *others = table[name := "videos/observation.images.top/to_timestamp"].to_pylist()
    return replace_column(table, name, pa.array([first + 2 / FPS, *others]))


def shifted_span(table: pa.Table) -> pa.Table:
    for part in ("from", "to"):  # half a frame late
        name = f"videos/observation.images.top/{part}_timestamp"
        table = replace_column(table, name, pa.array([value + 0.5 / FPS for value in table[name].to_pylist()]))
    return table


def two_tasks(table: pa.Table) -> pa.Table:
    return replace_column(table, "task_index", pa.array(np.arange(len(table)) % 2))


def wide_actions(table: pa.Table) -> pa.Table:
    return replace_column(table, "action", pa.array([[0.0, 1.0, 2.0]] * len(table), pa.list_(pa.float32())))


def no_bytes(table: pa.Table) -> pa.Table:
    images = [image | {"bytes": None} for image in table["observation.images.top"].to_pylist()]
    images = pa.array(images, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    return replace_column(table, "observation.images.top", images)


class Library:
    """Datasets, each written once: library(version, codec) -> folder that nobody may change."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, version: str = "v3.0", codec: str | None = "h264") -> Path:
        root = self.folder / f"{version}-{codec}"
        return root if root.exists() else Written(root, version, codec).write()


def source(root: Path, **options) -> LeRobotSource:
    """The dataset's episodes, opened anew."""
    return LeRobotSource(read_meta(root), **options)


def check_episodes(source: LeRobotSource) -> None:
    """Every episode has its vectors, its task and as many images as frames."""
    for index in range(len(source)):
        episode = source.episode(index)
        assert all(map(np.array_equal, (episode.states, episode.actions), Written(Path()).vectors(index)))
        assert episode.task == TASKS[index % 2] == source.task(index)
        assert [len(list(frames)) for frames in episode.images.values()] == [LENGTHS[index]] * 2


def check_rows(rows: Dataset, episodes: Iterable[int] = range(len(LENGTHS)), cameras: Iterable[int] = (0, 1)) -> None:
    """Every frame, first to last of every episode, is where it belongs, and so are vectors and text."""
    expected = [(episode, frame) for episode in episodes for frame in range(LENGTHS[episode])]
    assert list(zip(rows["episode_index"], rows["frame_index"], strict=True)) == expected
    for row, (episode, frame) in zip(rows, expected, strict=True):
        assert [number_in(image) for image in row["images"]] == [(episode, frame, camera) for camera in cameras]
        states, actions = Written(Path()).vectors(episode)
        assert row["raw_state"] == states[frame].tolist()
        assert row["raw_action"][:2] == actions[frame].tolist()
        assert row["task"] == TASKS[episode % 2]
