"""LIBERO's official demonstrations: an HDF5 file a task, `data/demo_i/{actions, obs/…}`.

Liu et al., "LIBERO" (2023), https://libero-project.github.io; written by its `scripts/create_dataset.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vla0_trl.data.episodes import Episode, EpisodeError, SourceInfo
from vla0_trl.data.staging import ConversionError

if TYPE_CHECKING:
    import h5py

# As the Hub's LIBERO datasets name them, HuggingFaceVLA/libero for one.
CAMERAS = {"image": "agentview_rgb", "image2": "eye_in_hand_rgb"}
STATE = {"ee_states": 6, "gripper_states": 2}  # position and axis-angle of the gripper, then its two fingers
ACTION_DIM, STATE_DIM = 7, 8
FPS = 20.0  # robosuite's control_freq in LIBERO's environments
NOOP_NORM = 1e-4  # OpenVLA, experiments/robot/libero/regenerate_libero_dataset.py, is_noop
_BLOCK_FRAMES = 64  # in memory at once
_FIX = "fetch it again, or leave the episode out with --skip_bad_episodes"


@dataclass
class _Demo:
    path: Path
    key: str
    task: str


class LiberoDemos:
    """The demonstrations of LIBERO files, file by file in the order of their names.

    Args:
        paths (`list[Path]`): .hdf5 files, or folders with them.
        drop_noops (`bool`): leave out frames that do nothing, as OpenVLA's data has them left out; see [`moves`].

    Raises:
        ConversionError: no file there, or one that is no LIBERO HDF5.
    """

    def __init__(self, paths: list[Path], drop_noops: bool):
        self.drop_noops = drop_noops
        files = [file for path in paths for file in (sorted(path.rglob("*.hdf5")) if path.is_dir() else [path])]
        if not files:
            raise ConversionError(f"{', '.join(map(str, paths))}: no .hdf5 files there")
        self.demos: list[_Demo] = []
        digest = hashlib.sha256()
        for path in files:
            demos = _demos(path)
            self.demos += demos
            digest.update(f"{path.name} {path.stat().st_size} {len(demos)} {demos[0].task} ".encode())
        self.tasks = list(dict.fromkeys(demo.task for demo in self.demos))
        noops = "; frames in which the robot is told to stand still are left out" if drop_noops else ""
        self.info = SourceInfo(
            source=f"LIBERO, {paths[0].resolve().name}" if len(paths) == 1 else f"LIBERO, {len(files)} files",
            revision=f"sha256 of names and sizes: {digest.hexdigest()[:16]}",
            license="cc-by-4.0",
            robot="Franka Panda in LIBERO (robosuite, OSC_POSE)",
            fps=FPS,
            how=(
                "The demonstrations that [LIBERO](https://libero-project.github.io) publishes, recorded by people; "
                f"both cameras are rotated by 180°, as in its usual evaluation{noops}."
            ),
            options={"drop_noops": drop_noops},
        )

    def __len__(self) -> int:
        return len(self.demos)

    def task(self, index: int) -> str:
        return self.demos[index].task

    def episode(self, index: int) -> Episode:
        demo = self.demos[index]
        name = f"{demo.path}, {demo.key}"
        with _opened(demo.path, name) as file:
            group = file["data"][demo.key]
            actions = _dataset(group, "actions", name, ACTION_DIM)[:]
            frames = len(actions)
            state = [_dataset(group, f"obs/{key}", name, dim, frames)[:] for key, dim in STATE.items()]
            for key in CAMERAS.values():
                _dataset(group, f"obs/{key}", name, frames=frames)
        states = np.concatenate(state, axis=1)
        kept = moves(actions) if self.drop_noops else np.arange(len(actions))
        images = {
            camera: _frames(demo.path, f"data/{demo.key}/obs/{key}", kept, name) for camera, key in CAMERAS.items()
        }
        return Episode(demo.task, actions[kept], images, states[kept], name)


def moves(actions: np.ndarray) -> np.ndarray:
    """The numbers of the frames (T, 7) that are no no-ops.

    A no-op moves the arm by less than `NOOP_NORM` and leaves the gripper as the last frame that was kept had it.
    """
    kept: list[int] = []
    for frame, action in enumerate(actions):
        still = np.linalg.norm(action[:-1]) < NOOP_NORM
        if not still or (kept and action[-1] != actions[kept[-1]][-1]):
            kept.append(frame)
    return np.array(kept, np.int64)


def instruction_of(file_name: str) -> str:
    """The instruction that LIBERO reads off a task's file name, for "KITCHEN_SCENE1_open_the_drawer_demo.hdf5" too."""
    stem = Path(file_name).stem.removesuffix("_demo")
    if stem[:1].isupper():  # LIBERO-100's begin with their scene
        scene = stem.find("SCENE")
        stem = stem[stem.find("_", scene) + 1 :] if scene >= 0 else stem
    return stem.replace("_", " ").strip()


def _frames(path: Path, key: str, kept: np.ndarray, name: str) -> Iterator[np.ndarray]:
    """A camera's frames `kept`, upright."""
    with _opened(path, name) as file:
        for start in range(0, len(kept), _BLOCK_FRAMES):
            # robosuite renders upside down, and LIBERO stores it so. The data that policies are trained on, and the
            # evaluation protocol, have it rotated by 180°, which mirrors it as well.
            yield from file[key][kept[start : start + _BLOCK_FRAMES]][:, ::-1, ::-1]


@contextmanager
def _opened(path: Path, name: str) -> Iterator[h5py.File]:
    """The open file; what can't be read of it is an [`EpisodeError`] that begins with `name`."""
    try:
        import h5py
    except ImportError as error:
        raise ConversionError('reading this format needs h5py: pip install -e ".[convert]"') from error
    try:
        with h5py.File(path, "r") as file:
            yield file
    except OSError as error:
        raise EpisodeError(
            f"{name}: can't be read, it is absent, cut off or no HDF5: fetch it again ({error})"
        ) from error


def _demos(path: Path) -> list[_Demo]:
    with _opened(path, str(path)) as file:
        if "data" not in file or not len(file["data"]):
            raise ConversionError(f"{path} has no data/demo_*: it is no file of LIBERO demonstrations")
        problem = json.loads(file["data"].attrs.get("problem_info", "{}"))
        task = "".join(problem.get("language_instruction", "")).strip().strip('"') or instruction_of(path.name)
        keys = sorted(file["data"], key=lambda key: (len(key), key))  # demo_2 before demo_10
    return [_Demo(path, key, task) for key in keys]


def _dataset(
    group: h5py.Group, key: str, name: str, dim: int | None = None, frames: int | None = None
) -> h5py.Dataset:
    """`key` of a demonstration, checked to be (`frames`, `dim`), where they are given."""
    if key not in group:
        raise EpisodeError(
            f"{name}: has no {key}, it has {sorted(group)} and obs/{sorted(group.get('obs', []))}: {_FIX}"
        )
    dataset = group[key]
    if frames not in (None, len(dataset)):
        raise EpisodeError(f"{name}: {key} has {len(dataset)} frames, actions has {frames}: {_FIX}")
    if dim is not None and dataset.shape[1:] != (dim,):
        raise EpisodeError(f"{name}: {key} has shape {dataset.shape}, expected (frames, {dim}): {_FIX}")
    return dataset
