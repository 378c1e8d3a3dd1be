"""LIBERO's official demonstrations: one HDF5 file per task, `data/demo_i/{actions, obs/…}`.

Liu et al., "LIBERO" (2023), https://libero-project.github.io; written by its `scripts/create_dataset.py`. That appends
what `env.step(actions[t])` returned as `obs[t]`: what was seen before an action is `obs[t - 1]`, and what was seen
before the first was not kept. Files that OpenVLA's `regenerate_libero_dataset.py` made have the same layout, and in
`obs[t]` what was seen before `actions[t]`. `states`, which both take before the action, tells them apart.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vla0_trl import pip_install
from vla0_trl.data.episodes import Episode, EpisodeError, SourceInfo, check_frame_size
from vla0_trl.data.sources.gripper import as_sign
from vla0_trl.data.staging import ConversionError
from vla0_trl.envs.libero.protocol import ACTION_DIM, UNITS
from vla0_trl.envs.libero.setup import instruction
from vla0_trl.schema import one_line

if TYPE_CHECKING:
    import h5py

# As the Hub's LIBERO datasets name them, HuggingFaceVLA/libero for one.
CAMERAS = {"image": "agentview_rgb", "image2": "eye_in_hand_rgb"}
STATE = {"ee_states": 6, "gripper_states": 2}  # position and axis-angle of the gripper, then its two fingers
FPS = 20.0  # robosuite's control_freq in LIBERO's environments
NOOP_NORM = 1e-4  # OpenVLA, experiments/robot/libero/regenerate_libero_dataset.py, is_noop
# How LIBERO's file stores pictures (robosuite.macros.IMAGE_CONVENTION) -> what makes them those of its evaluation,
# which turns robosuite's own, upside-down ones by 180°: upright, and mirrored.
TURNS = {"opengl": np.s_[:, ::-1, ::-1], "opencv": np.s_[:, :, ::-1]}
_ARM = slice(1, 8)  # of a simulator state (time, positions, velocities): the arm's joints
_BLOCK_FRAMES, _BLOCK_BYTES = 64, 256 << 20  # in memory at once, whichever is less
_MAX_FRAMES, _MAX_STATE = 1_000_000, 10_000  # of a demonstration; numbers in a simulator's state
_FIX = "fetch it again, or leave the episode out with --skip_bad_episodes"


@dataclass
class _Demo:
    path: Path
    key: str
    task: str
    turn: tuple[slice, ...]


class LiberoDemos:
    """The demonstrations of LIBERO files, file by file in the order of their names.

    Args:
        paths (`list[Path]`): .hdf5 files, or folders with them.
        drop_noops (`bool`): leave out frames that do nothing, as OpenVLA's data has them left out; see [`moves`].
        gripper (`str`): one of [`gripper.CONVENTIONS`].
    """

    def __init__(self, paths: list[Path], drop_noops: bool, gripper: str = "sign"):
        self.drop_noops, self.gripper = drop_noops, gripper
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
                "an action is paired with what was seen before it, and a demonstration's first action, for which the "
                "files hold no picture, is left out; both cameras are rotated by 180°, as in LIBERO's usual "
                f"evaluation{noops}."
            ),
            options={"drop_noops": drop_noops, "gripper": gripper, "pairs": "action with the frame before it"},
            units=UNITS,
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
            if group.file.filename != file.filename:
                raise EpisodeError(f"{name}: lies in another file: {_FIX}")
            actions = as_sign(_vectors(group, "actions", name, ACTION_DIM)[:], self.gripper, name)
            frames = len(actions)
            state = [_vectors(group, f"obs/{key}", name, dim, frames)[:] for key, dim in STATE.items()]
            for key in CAMERAS.values():
                _check_pictures(_dataset(group, f"obs/{key}", name, frames), f"{name}: {key}")
            late = 0 if _seen_before(group, frames) else 1
        chosen = moves(actions) if self.drop_noops else np.arange(frames)
        chosen = chosen[chosen >= late]
        seen = chosen - late
        if not len(chosen):
            raise EpisodeError(f"{name}: no frame is left of {frames}: leave it out with --skip_bad_episodes")
        images = {
            camera: _frames(demo.path, f"data/{demo.key}/obs/{key}", seen, demo.turn, name)
            for camera, key in CAMERAS.items()
        }
        return Episode(demo.task, actions[chosen], images, np.concatenate(state, axis=1)[seen], name)


def moves(actions: np.ndarray) -> np.ndarray:
    """Indices of the actions (T, 7) that are not no-ops.

    A no-op moves the arm by less than `NOOP_NORM` and leaves the gripper as the last chosen frame has it.
    """
    chosen: list[int] = []
    for frame, action in enumerate(actions):
        still = np.linalg.norm(action[:-1]) < NOOP_NORM
        if not still or (chosen and action[-1] != actions[chosen[-1]][-1]):
            chosen.append(frame)
    return np.array(chosen, np.int64)


def _seen_before(group: h5py.Group, frames: int) -> bool:
    """Whether `obs[t]` is from before `actions[t]`, as `states[t]` is: not in LIBERO's own, nor if nothing tells."""
    from h5py import Dataset

    states, joints = group.get("states"), group.get("obs/joint_states")
    for found, least in ((states, _ARM.stop), (joints, _ARM.stop - _ARM.start)):
        fits = isinstance(found, Dataset) and found.ndim == 2 and found.dtype.kind in "fiu"
        if not fits or len(found) != frames or not least <= found.shape[1] <= _MAX_STATE:
            return False
    arm, seen = states[:, _ARM], joints[:]
    if arm.shape != seen.shape or len(arm) < 2:
        return False
    before, after = np.abs(seen - arm)[1:].mean(), np.abs(seen[:-1] - arm[1:]).mean()
    return bool(before < after / 4)  # one of the two is about 0


def _frames(path: Path, key: str, seen: np.ndarray, turn: tuple[slice, ...], name: str) -> Iterator[np.ndarray]:
    """A camera's frames `seen`, as evaluation shows them."""
    with _opened(path, name) as file:
        frames = file[key]
        block = max(1, min(_BLOCK_FRAMES, _BLOCK_BYTES // math.prod(frames.shape[1:])))
        for start in range(0, len(seen), block):
            yield from frames[seen[start : start + block]][turn]


@contextmanager
def _opened(path: Path, name: str) -> Iterator[h5py.File]:
    """The open file; what can't be read of it is an [`EpisodeError`] that begins with `name`."""
    try:
        import h5py
    except ImportError as error:
        raise ConversionError(f"reading this format needs h5py: {pip_install('convert')}") from error
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (EpisodeError, ConversionError):
        raise
    except (OSError, RuntimeError, KeyError, ValueError) as error:  # h5py raises all of these for damaged files
        raise EpisodeError(
            f"{name}: can't be read, it is absent, cut off or no HDF5: fetch it again ({one_line(error)})"
        ) from error


def _demos(path: Path) -> list[_Demo]:
    with _opened(path, str(path)) as file:
        from h5py import Group

        data = file.get("data")
        # other entries beside them are not demonstrations
        keys = [key for key in (data if isinstance(data, Group) else ()) if re.fullmatch(r"demo_\d+", key)]
        if not keys:
            raise ConversionError(f"{path} has no data/demo_*: it is not a file of LIBERO demonstrations")
        convention = _text(data.attrs.get("macros_image_convention", "opengl"))
        if convention not in TURNS:
            raise ConversionError(
                f"{path}: macros_image_convention is {convention!r}, wanted {' or '.join(TURNS)}: which way up its "
                "pictures are is not known"
            )
        task = _task(path, data)
    return [_Demo(path, key, task, TURNS[convention]) for key in sorted(keys, key=lambda key: int(key[5:]))]


def _task(path: Path, data: h5py.Group) -> str:
    """The instruction as evaluation words it, from the file's name: `problem_info` and the BDDL often differ from it.

    From the name of the BDDL file if the file was renamed, and from `problem_info` if that is missing, too.
    """
    if path.stem.endswith("_demo"):
        return instruction(path.stem.removesuffix("_demo"))
    bddl = _text(data.attrs.get("bddl_file_name", ""))
    if bddl.endswith(".bddl"):
        return instruction(Path(bddl).stem)
    try:
        problem = json.loads(_text(data.attrs.get("problem_info", "{}")))
    except json.JSONDecodeError:
        problem = {}
    text = problem.get("language_instruction") if isinstance(problem, dict) else None
    if isinstance(text, list) and all(isinstance(letter, str) for letter in text):
        text = "".join(text)  # some of LIBERO's files hold it as a list of letters
    return (text.strip().strip('"') if isinstance(text, str) else "") or instruction(path.stem)


def _text(attribute: object) -> str:
    return attribute.decode(errors="replace") if isinstance(attribute, bytes) else str(attribute)


def _vectors(group: h5py.Group, key: str, name: str, dim: int, frames: int | None = None) -> h5py.Dataset:
    """`key` of a demonstration, checked to be (`frames`, `dim`) numbers."""
    found = _dataset(group, key, name, frames)
    if found.shape[1:] != (dim,) or found.dtype.kind not in "fiu":
        raise EpisodeError(
            f"{name}: {key} is {found.dtype} of shape {found.shape}, wanted (frames, {dim}) numbers: {_FIX}"
        )
    return found


def _check_pictures(found: h5py.Dataset, where: str) -> None:
    if found.dtype != np.uint8 or found.ndim != 4 or found.shape[3] != 3 or 0 in found.shape:
        shape = "(frames, height, width, 3)"
        raise EpisodeError(f"{where} is {found.dtype} of shape {found.shape}, wanted uint8 {shape}: {_FIX}")
    check_frame_size(found.shape[2], found.shape[1], where)


def _dataset(group: h5py.Group, key: str, name: str, frames: int | None = None) -> h5py.Dataset:
    """`key` of a demonstration, whose every block is there, and which has `frames` rows, if they are given."""
    from h5py import Dataset, Group

    found, there = None, "no group"
    if isinstance(group, Group):
        found, obs = group.get(key), group.get("obs")
        there = f"{sorted(group)} and obs/{sorted(obs if isinstance(obs, Group) else [])}"
    if not isinstance(found, Dataset) or not found.shape:
        raise EpisodeError(f"{name}: has no {key}, it has {there}: {_FIX}")
    if found.file.filename != group.file.filename or found.is_virtual or found.external:
        raise EpisodeError(f"{name}: {key} lies in another file, which a dataset from elsewhere must not read: {_FIX}")
    if frames not in (None, len(found)):
        raise EpisodeError(f"{name}: {key} has {len(found)} frames, actions has {frames}: {_FIX}")
    if len(found) > _MAX_FRAMES:
        raise EpisodeError(f"{name}: {key} has {len(found)} frames, at most {_MAX_FRAMES} are read: {_FIX}")
    if 0 in found.shape:
        raise EpisodeError(f"{name}: {key} is of shape {found.shape}, and holds nothing: {_FIX}")
    blocks = math.prod(-(-size // part) for size, part in zip(found.shape, found.chunks or found.shape, strict=True))
    if found.chunks and found.id.get_num_chunks() < blocks:
        raise EpisodeError(f"{name}: {key} lacks blocks, which would read as zeros: {_FIX}")
    if not found.chunks and found.size and not found.id.get_storage_size():
        raise EpisodeError(f"{name}: {key} was never written, and would read as zeros: {_FIX}")
    return found
