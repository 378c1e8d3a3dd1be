"""What an evaluation leaves behind: a line an episode, the aggregate with its uncertainty, and videos.

An output folder belongs to one run: one checkpoint (by the hash of its weights and configs) under one protocol.
`episodes.jsonl` is the truth: what is in it is never run again, and `results.json` follows from it.
"""

import fcntl
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np

from vla0_trl.config import CONFIG_NAME
from vla0_trl.rollout import EpisodeResult

EPISODES = "episodes.jsonl"
RESULTS = "results.json"
VIDEOS = "videos"


class WriteError(OSError):
    """The disk is full, or something else kept a result from being written; what was written before is whole."""


def wilson_interval(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a success rate (Wilson 1927); 95 % for z = 1.96. (0, 1) if nothing was tried."""
    if n == 0:
        return 0.0, 1.0
    rate, spread = successes / n, z * z / n
    center = (rate + spread / 2) / (1 + spread)
    half = z * float(np.sqrt(rate * (1 - rate) / n + spread / n / 4)) / (1 + spread)
    return max(0.0, center - half), min(1.0, center + half)


def bootstrap_interval(values: np.ndarray, resamples: int = 10_000) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of the mean of `values` (n,); the same numbers at every call."""
    values = np.asarray(values, np.float64)
    draws = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
    return float(low), float(high)


def checkpoint_hash(folder: Path) -> str:
    """sha256 over what decides a checkpoint's answers: its configs and weights, in the order of their names."""
    names = {CONFIG_NAME, "config.json", "adapter_config.json"}
    paths = sorted(path for path in folder.iterdir() if path.name in names or path.suffix == ".safetensors")
    if not any(path.suffix == ".safetensors" for path in paths):
        raise FileNotFoundError(f"{folder} has no *.safetensors: not a whole checkpoint")
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def read_episodes(folder: Path) -> list[dict[str, Any]]:
    """The finished episodes of an output folder, by task and seed; a half line left by a kill is no episode."""
    path = folder / EPISODES
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return sorted((json.loads(line) for line in lines), key=lambda row: (row["task"], row["seed"]))


class EpisodeLog:
    """The episodes of one run in one output folder, open for appending. A context manager: one process at a time.

    Args:
        folder (`Path`):
            Made if it isn't there.
        run (`dict`):
            The run's identity: `checkpoint`, `checkpoint_hash`, `protocol`; becomes part of every line.
        overwrite (`bool`, *optional*, defaults to `False`):
            Delete the evaluation that is there.

    Raises:
        `ValueError`: the folder holds another run, or another process is writing to it.
    """

    def __init__(self, folder: Path, run: dict[str, Any], overwrite: bool = False):
        self.folder = folder
        self.run = run
        folder.mkdir(parents=True, exist_ok=True)
        # unbuffered: after a full disk, a buffer would try the same line again when it is closed
        self._file = (folder / EPISODES).open("ab", buffering=0)
        try:
            self._claim(overwrite)
        except ValueError:
            self.close()
            raise

    def _claim(self, overwrite: bool) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by the kernel, however we end
        except BlockingIOError:
            raise ValueError(f"another process is evaluating into {self.folder}: wait for it, or stop it") from None
        if overwrite:
            for video in (self.folder / VIDEOS).glob("episode_*.mp4"):
                video.unlink()
            (self.folder / RESULTS).unlink(missing_ok=True)
            self._file.truncate(0)
        text = (self.folder / EPISODES).read_bytes()
        self._file.truncate(text.rfind(b"\n") + 1)  # or the next line would be glued to half a one
        self.episodes = read_episodes(self.folder)
        for row in self.episodes[:1]:
            if any(row[key] != self.run[key] for key in ("checkpoint_hash", "protocol")):
                raise ValueError(
                    f"{self.folder} holds {len(self.episodes)} episodes of another run: {_describe(row, self.run)}; "
                    f"this run: {_describe(self.run, row)}. Give another --output_dir, or --overwrite to delete them"
                )

    def append(self, episode: EpisodeResult) -> dict[str, Any]:
        """Add a line that survives a kill from now on, or raise [`WriteError`]."""
        row = {
            "task": episode.task,
            "seed": episode.seed,
            **episode.result,
            "seconds": episode.model_seconds + episode.environment_seconds,
            "model_seconds": episode.model_seconds,
            "model_calls": episode.model_calls,
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
            raise WriteError(f"could not write {self.folder / EPISODES}: {error.strerror}") from error
        self.episodes.append(row)
        return row

    def missing(self, seeds: list[int]) -> list[int]:
        """Those of `seeds` that no line has yet."""
        done = {row["seed"] for row in self.episodes}
        return [seed for seed in seeds if seed not in done]

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "EpisodeLog":
        return self

    def __exit__(self, *error: object) -> None:
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


def aggregate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates with 95 % intervals and times of at least one episode, in whatever order they finished.

    `ms_per_chunk` is the wall-clock time of the model over the chunks that it gave: batching makes it smaller.
    """
    rows = sorted(rows, key=lambda row: (row["task"], row["seed"]))  # so that float sums are the same after a resume
    successes, n = sum(row["success"] for row in rows), len(rows)
    coverage = np.array([row["max_coverage"] for row in rows])
    model_seconds = sum(row["model_seconds"] for row in rows)
    return {
        "num_episodes": n,
        "successes": successes,
        "success_rate": successes / n,
        "success_rate_interval": wilson_interval(successes, n),
        "mean_max_coverage": float(coverage.mean()),
        "mean_max_coverage_interval": bootstrap_interval(coverage),
        "mean_steps": float(np.mean([row["steps"] for row in rows])),
        "seconds_per_episode": sum(row["seconds"] for row in rows) / n,
        "ms_per_chunk": 1000 * model_seconds / sum(row["model_calls"] for row in rows),
        "model_seconds": model_seconds,
        "environment_seconds": sum(row["seconds"] for row in rows) - model_seconds,
        "model_calls": sum(row["model_calls"] for row in rows),
    }


def aggregate_tasks(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """`aggregate` for each task of `rows`, by name."""
    tasks = sorted({row["task"] for row in rows})
    return {task: aggregate([row for row in rows if row["task"] == task]) for task in tasks}


def write_json(path: Path, data: Any) -> None:
    """Write all of `data`, or leave what was there and raise [`WriteError`]."""
    partial = path.with_name(f".{path.name}.partial")
    text = json.dumps(data, indent=2) + "\n"
    try:
        partial.write_text(text)
        partial.replace(path)
    except OSError as error:
        raise WriteError(f"could not write {path}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


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
    checkout = Path(__file__).parents[1]
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
