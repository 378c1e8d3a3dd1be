"""What an evaluation writes: one line per episode, results.json, videos, and the origin of each number.

An output folder belongs to one run: one checkpoint (by the hash of its weights and configs) under one protocol.
`episodes.jsonl` is the truth: what is in it is never run again, and `results.json` follows from it. The processes of a
launch write one file each, `episodes-LAUNCH-RANK.jsonl`, which the last one merges.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np

from vla0_trl.evaluation.metrics import identity
from vla0_trl.evaluation.rollout import EpisodeResult, Seed
from vla0_trl.files import delete_leftovers, whole_file, write_whole
from vla0_trl.run_folder import RunFolder, belongs_to_another
from vla0_trl.schema import (
    between,
    boolean,
    checked,
    mapping,
    not_negative,
    number,
    one_line,
    parse_json,
    text,
    warn_once,
)

EPISODES = "episodes.jsonl"
_SHARDS = "episodes-*.jsonl"
RESULTS = "results.json"
VIDEOS = "videos"
_COUNT = between(0, 10**9)
_LEFT_OUT = "it is left out; run the evaluation again to fill the gap"


def _suite(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"\w{1,100}", value):  # becomes a part of a film's name
        raise ValueError("a suite's name")
    return value


_ROW = {
    **dict.fromkeys(("task", "checkpoint", "checkpoint_hash"), text),
    "seed": between(0, 2**63),
    **dict.fromkeys(("steps", "model_calls"), _COUNT),
    "success": boolean,
    **dict.fromkeys(("seconds", "model_seconds"), not_negative),
    "protocol": mapping,
}
_LIBERO = {"suite": _suite, "task_id": _COUNT}
_OTHERS = {"max_coverage": number, "decoding": text}  # where they are there


class WriteError(OSError):
    """The disk is full, or something else kept a result from being written; what was written before is whole."""


def video_name(row: dict[str, Any]) -> str:
    """The file of an episode's film."""
    words = [f"{part:06d}" if len(identity(row)) == 1 else str(part) for part in identity(row)]
    return f"episode_{'_'.join(words)}_{'success' if row['success'] else 'failure'}.mp4"


def read_episodes(folder: Path, seeds: dict[str, list[int]] | None = None) -> list[dict[str, Any]]:
    """The finished episodes of an output folder, each once, in order.

    A half line left by a kill is not an episode, and neither is a damaged one, with a warning; both are run again.
    With `seeds`, which [`seed_ranges`] gives, only those.
    """
    rows: dict[tuple, dict[str, Any]] = {}
    for path in [*sorted(folder.glob(_SHARDS)), folder / EPISODES]:
        with suppress(FileNotFoundError):  # another process may have merged it into EPISODES, which comes last
            for count, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
                try:
                    row = _read_row(f"{path}, line {count}", line)
                    rows[identity(row)] = row
                except ValueError as error:
                    warn_once(f"{str(error).splitlines()[0]}; {_LEFT_OUT}")
    usual = Counter(map(len, rows)).most_common(1)
    for key in [key for key in rows if len(key) != usual[0][0]]:
        line = f"{folder / EPISODES}: the line of {' '.join(map(str, key))}"
        warn_once(f"{line} is of another simulator than most; {_LEFT_OUT}")
        del rows[key]
    return [rows[key] for key in sorted(rows) if seeds is None or _in_ranges(key, seeds)]


def _read_row(where: str, line: bytes) -> dict[str, Any]:
    """A line's record, as it was written: merging must not change a line."""
    row = checked(where, parse_json(where, line), {}, "")
    kinds = _ROW | (_LIBERO if row.keys() & _LIBERO else {})
    found = checked(where, row, kinds | {name: kind for name, kind in _OTHERS.items() if name in row}, "damaged")
    return row | {name: found[name] for name in ("seed", "task_id") if name in row}


def seed_ranges(seeds: Sequence[Seed]) -> dict[str, list[int]]:
    """The first and the last seed of each task, in few words: `{"libero_object 0": [0, 49]}`; of PushT, `{"": …}`."""
    ranges: dict[str, list[int]] = {}
    for seed in seeds:
        key = seed if isinstance(seed, tuple) else (seed,)
        low, high = ranges.get(_group(key), (key[-1], key[-1]))
        ranges[_group(key)] = [min(low, key[-1]), max(high, key[-1])]
    return ranges


def _in_ranges(key: tuple, ranges: dict[str, list[int]]) -> bool:
    low, high = ranges.get(_group(key), (0, -1))
    return low <= key[-1] <= high


def _group(key: tuple) -> str:
    return " ".join(map(str, key[:-1]))


def merge_shards(folder: Path) -> None:
    """Put the files of several processes into one, once all of them have finished."""
    shards = list(folder.glob(_SHARDS))
    if not shards:
        return
    _replace(folder / EPISODES, "".join(json.dumps(row) + "\n" for row in read_episodes(folder)))
    for shard in shards:
        shard.unlink(missing_ok=True)


class EpisodeLog(AbstractContextManager):
    """The episodes of one run in one output folder, open for appending. A context manager.

    Args:
        run (`dict`): its identity: `checkpoint`, `checkpoint_hash`, `protocol`; becomes part of every line.
        overwrite (`bool`, *optional*): delete the evaluation that is there.
        launch (`str`, *optional*), rank (`int`, *optional*): a word that several processes share, and which of them
            this is: each has a file of its own.

    Attributes:
        first (`bool`): whether no other process of this launch had it open.

    `FolderError` if the folder holds another run, or another command is writing to it.
    """

    def __init__(
        self, folder: Path, run: dict[str, Any], overwrite: bool = False, launch: str | None = None, rank: int = 0
    ):
        self.folder, self.run = folder, run
        self.path = folder / (EPISODES if launch is None else _SHARDS.replace("*", f"{launch}-{rank}"))
        self._held = RunFolder(folder, launch)
        self.first = self._held.first
        try:
            self._held.path.mkdir(parents=True, exist_ok=True)
            if self.first:
                for written in (folder, folder / VIDEOS):
                    delete_leftovers(written)
                # A process of this launch that is through already has done so, and what is there is its own.
                if overwrite and not list(folder.glob(_SHARDS.replace("*", f"{launch}-*"))):
                    self._delete_all()
            self.episodes = read_episodes(folder)
            self.check(self.episodes)
            # unbuffered: after a full disk, a buffer would try the same line again when it is closed
            self._file = self.path.open("ab", buffering=0)
            text = self.path.read_bytes()
            self._file.truncate(text.rfind(b"\n") + 1)  # or the next line would be glued to half a one
            self._held.share()
        except BaseException:  # Ctrl-C, too, must not leave the folder locked
            self._held.close()
            raise

    def check(self, rows: list[dict[str, Any]]) -> None:
        """`FolderError` if one of these episodes is another run's."""
        for row in rows:
            if any(row[key] != self.run[key] for key in ("checkpoint_hash", "protocol")):
                raise belongs_to_another(self.folder, "run", _described(row), _described(self.run))

    def _delete_all(self) -> None:
        """All that earlier evaluations left here: their lines say which films are theirs."""
        doomed = [self.folder / VIDEOS / video_name(row) for row in read_episodes(self.folder)]
        for path in (*doomed, self.folder / RESULTS, self.folder / EPISODES, *self.folder.glob(_SHARDS)):
            path.unlink(missing_ok=True)

    def append(self, episode: EpisodeResult, **more: Any) -> dict[str, Any]:
        """Add a line, with `more` in it, that survives a kill from now on, or raise [`WriteError`]."""
        row = {
            "task": episode.task,
            "seed": episode.seed[-1] if isinstance(episode.seed, tuple) else episode.seed,
            **episode.result,
            "seconds": episode.model_seconds + episode.environment_seconds,
            "model_seconds": episode.model_seconds,
            "model_calls": episode.model_calls,
            **more,
            **({"crashes": episode.crashes} if episode.crashes else {}),
            **self.run,
        }
        size = os.fstat(self._file.fileno()).st_size
        line = json.dumps(row).encode() + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(size)
            raise WriteError(f"could not write {self.path}: {error.strerror}") from error
        self.episodes.append(row)
        return row

    def missing(self, seeds: Sequence[Seed]) -> list[Seed]:
        """Those of `seeds` that no line has yet."""
        done = {identity(row) for row in self.episodes}
        return [seed for seed in seeds if (seed if isinstance(seed, tuple) else (seed,)) not in done]

    def close(self) -> None:
        self._file.close()
        self._held.close()

    def __exit__(self, *error: object) -> None:
        if self.path.name != EPISODES and not os.fstat(self._file.fileno()).st_size:
            self.path.unlink(missing_ok=True)  # there was nothing to do for this process
        self.close()


def _described(run: dict[str, Any]) -> dict[str, Any]:
    return {"checkpoint": f"{run['checkpoint']} ({run['checkpoint_hash'][:8]})", **run["protocol"]}


def write_json(path: Path, data: Any) -> None:
    """Write all of `data`, or leave what was there and raise [`WriteError`]."""
    _replace(path, json.dumps(data, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    try:
        write_whole(path, text)
    except OSError as error:
        raise WriteError(f"could not write {path}: {error.strerror}") from error


def provenance(device: str, packages: tuple[str, ...]) -> dict[str, Any]:
    """What must be known of a number: command, commit (None outside a checkout), package versions, machine."""
    import torch

    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "command": shlex.join(["python", *sys.argv]),
        "git_commit": _git_commit(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "machine": {
            "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
            "cpu": cpu,
            "threads": torch.get_num_threads(),
        },
    }


def _git_commit() -> str | None:
    checkout = Path(__file__).parents[2]
    # an installed package may lie inside somebody else's repository
    if not (checkout / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def can_film() -> bool:
    """Whether there is a program that writes films; where there is none, one line says so."""
    with suppress(RuntimeError):
        if shutil.which(imageio_ffmpeg.get_ffmpeg_exe()):
            return True
    warn_once('no episode will be filmed, there is no ffmpeg: pip install "imageio[ffmpeg]", or set --num_videos 0')
    return False


def write_video(path: Path, frames: list[np.ndarray], fps: float) -> None:
    """An mp4 (h264, yuv420p: plays in every browser) of uint8[H, W, 3] frames with even sides; or [`WriteError`]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width, _ = frames[0].shape
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{fps:g}", "-i", "-"]
    target = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-movflags", "+faststart", "-f", "mp4"]
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", *source, *target]
    with whole_file(path) as partial:
        pixels = b"".join(frame.tobytes() for frame in frames)
        done = subprocess.run([*ffmpeg, str(partial)], input=pixels, capture_output=True)
        if done.returncode != 0:
            raise WriteError(f"ffmpeg could not write {path}: {one_line(done.stderr.decode(errors='replace'))}")
