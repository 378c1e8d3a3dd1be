"""What an evaluation leaves behind: a line an episode, results.json, videos, and what each number needs beside it.

An output folder belongs to one run: one checkpoint (by the hash of its weights and configs) under one protocol.
`episodes.jsonl` is the truth: what is in it is never run again, and `results.json` follows from it. Several processes
write a file each, `episodes-RANK.jsonl`, which the last of them puts together.
"""

import fcntl
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np

from vla0_trl.evaluation.metrics import identity
from vla0_trl.evaluation.rollout import EpisodeResult, Seed
from vla0_trl.files import write_whole

EPISODES = "episodes.jsonl"
_SHARDS = "episodes-*.jsonl"
RESULTS = "results.json"
VIDEOS = "videos"


class WriteError(OSError):
    """The disk is full, or something else kept a result from being written; what was written before is whole."""


def video_name(row: dict[str, Any]) -> str:
    """The file of an episode's film."""
    words = [f"{part:06d}" if len(identity(row)) == 1 else str(part) for part in identity(row)]
    return f"episode_{'_'.join(words)}_{'success' if row['success'] else 'failure'}.mp4"


def read_episodes(folder: Path) -> list[dict[str, Any]]:
    """The finished episodes of an output folder, each once, in order; a half line left by a kill is no episode."""
    rows = {}
    for path in [*sorted(folder.glob(_SHARDS)), folder / EPISODES]:
        with suppress(FileNotFoundError):  # another process may have merged it into EPISODES, which comes last
            for line in path.read_bytes().split(b"\n")[:-1]:
                row = json.loads(line)
                rows[identity(row)] = row
    return [rows[key] for key in sorted(rows)]


def merge_shards(folder: Path) -> None:
    """Put the files of several processes into one, once all of them have finished."""
    shards = list(folder.glob(_SHARDS))
    if not shards:
        return
    _replace(folder / EPISODES, "".join(json.dumps(row) + "\n" for row in read_episodes(folder)))
    for shard in shards:
        shard.unlink(missing_ok=True)


class EpisodeLog:
    """The episodes of one run in one output folder, open for appending. A context manager: one process at a time.

    Args:
        folder (`Path`):
            Made if it isn't there.
        run (`dict`):
            The run's identity: `checkpoint`, `checkpoint_hash`, `protocol`; becomes part of every line.
        overwrite (`bool`, *optional*, defaults to `False`):
            Delete the evaluation that is there.
        rank (`int`, *optional*):
            Which of several processes this is; each has a file of its own. Process 0 deletes for all.

    Raises:
        `ValueError`: the folder holds another run, or another process is writing to it.
    """

    def __init__(self, folder: Path, run: dict[str, Any], overwrite: bool = False, rank: int | None = None):
        self.folder = folder
        self.run = run
        self.path = folder / (EPISODES if rank is None else _SHARDS.replace("*", str(rank)))
        folder.mkdir(parents=True, exist_ok=True)
        # unbuffered: after a full disk, a buffer would try the same line again when it is closed
        self._file = self.path.open("ab", buffering=0)
        try:
            self._claim(overwrite, rank)
        except ValueError:
            self.close()
            raise

    def _claim(self, overwrite: bool, rank: int | None) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by the kernel, however we end
        except BlockingIOError:
            raise ValueError(f"another process is evaluating into {self.folder}: wait for it, or stop it") from None
        if overwrite:
            self._file.truncate(0)
            if not rank:
                self._delete_all(keep_shards=rank is not None)
            self.episodes: list[dict[str, Any]] = []  # process 0 may not have deleted the rest yet
            return
        text = self.path.read_bytes()
        self._file.truncate(text.rfind(b"\n") + 1)  # or the next line would be glued to half a one
        self.episodes = read_episodes(self.folder)
        for row in self.episodes[:1]:
            if any(row[key] != self.run[key] for key in ("checkpoint_hash", "protocol")):
                raise ValueError(
                    f"{self.folder} holds {len(self.episodes)} episodes of another run: {_describe(row, self.run)}; "
                    f"this run: {_describe(self.run, row)}. Give another --output_dir, or --overwrite to delete them"
                )

    def _delete_all(self, keep_shards: bool) -> None:
        """All that an evaluation left here but our own file, and those of processes that run beside us."""
        doomed = [*(self.folder / VIDEOS).glob("episode_*.mp4"), self.folder / RESULTS, self.folder / EPISODES]
        doomed += [] if keep_shards else self.folder.glob(_SHARDS)
        for path in doomed:
            if path != self.path:
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

    def __enter__(self) -> "EpisodeLog":
        return self

    def __exit__(self, *error: object) -> None:
        if self.path.name != EPISODES and not os.fstat(self._file.fileno()).st_size:
            self.path.unlink(missing_ok=True)  # there was nothing to do for this process
        self.close()


def _describe(run: dict[str, Any], other: dict[str, Any]) -> str:
    """A run in the words in which it differs from the other."""
    words = [f"checkpoint {run['checkpoint']} ({run['checkpoint_hash'][:8]})"]
    keys = run["protocol"].keys() | other["protocol"].keys()
    words += [
        f"{key}={run['protocol'].get(key)}"
        for key in sorted(keys)
        if run["protocol"].get(key) != other["protocol"].get(key)
    ]
    return ", ".join(words)


def write_json(path: Path, data: Any) -> None:
    """Write all of `data`, or leave what was there and raise [`WriteError`]."""
    _replace(path, json.dumps(data, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    try:
        write_whole(path, text)
    except OSError as error:
        raise WriteError(f"could not write {path}: {error.strerror}") from error


def provenance(device: str, packages: tuple[str, ...]) -> dict[str, Any]:
    """What a number needs beside it: command, commit (None outside a checkout), package versions, machine."""
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


def write_video(path: Path, frames: list[np.ndarray], fps: float) -> None:
    """An mp4 (h264, yuv420p: plays in every browser) of uint8[H, W, 3] frames with even sides; or [`WriteError`]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial_{path.name}")
    height, width, _ = frames[0].shape
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{fps:g}", "-i", "-"]
    target = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-movflags", "+faststart", str(partial)]
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", *source, *target]
    try:
        done = subprocess.run(ffmpeg, input=b"".join(frame.tobytes() for frame in frames), capture_output=True)
        if done.returncode != 0:
            raise WriteError(f"ffmpeg could not write {path}: {done.stderr.decode(errors='replace').strip()}")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
