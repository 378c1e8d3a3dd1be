"""LIBERO made to run unattended: renderer, assets, its first-import question, tasks and initial states.

hf-libero is used as installed. What has no setting there is changed from outside, only here:

- `MUJOCO_GL` and `PYOPENGL_PLATFORM` before mujoco is imported: EGL with an NVIDIA driver, OSMesa without.
- `LIBERO_CONFIG_PATH` at its first import: a config file there keeps it from asking a question on stdin. We read tasks
  and initial states from the package's own folders, so nothing in that file matters, and `~/.libero` stays untouched.
- `libero.libero._assets_path_cache`, the variable in which it remembers the assets folder once it has been found: its
  own ways to find one are a folder beside its code, and a download that fails with huggingface_hub 1 and later.
"""

import ctypes.util
import hashlib
import importlib.util
import logging
import os
import pickle
import runpy
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np

from vla0_trl import pip_install
from vla0_trl.envs.libero.protocol import MAX_STEPS, NUM_TASKS, TESTED_MUJOCO

DEVICES = Path("/dev")
NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")  # a folder for each, with its UUID and number
ASSETS_VARIABLE = "LIBERO_ASSETS"
ASSETS_REPOSITORY = "lerobot/libero-assets"  # hf-libero: HF_ASSETS_REPO_ID
_ASSET_FOLDERS = (
    "articulated_objects",
    "scenes",
    "stable_hope_objects",
    "stable_scanned_objects",
    "textures",
    "turbosquid_objects",
)


class LiberoError(OSError):
    """LIBERO can't run here; the message says what to install or where to point."""


def package_folder() -> Path:
    """hf-libero's `libero/libero`, found without importing it."""
    spec = importlib.util.find_spec("libero")
    if spec is None:
        raise LiberoError(f"LIBERO is not installed: {pip_install('libero')}")
    return Path(spec.submodule_search_locations[0]) / "libero"


def find_assets(assets_dir: str | Path | None = None, download: bool = True) -> Path:
    """The folder of meshes and textures: `assets_dir`, else `$LIBERO_ASSETS`, else the Hub's (cached) download.

    `LiberoError` if it is another folder, or there is none. Without `download`, only an earlier download counts.
    """
    given = assets_dir or os.environ.get(ASSETS_VARIABLE)
    if given:
        folder = Path(given).resolve()
        missing = [name for name in _ASSET_FOLDERS if not (folder / name).is_dir()]
        if missing:
            raise LiberoError(
                f"{folder} is not LIBERO's assets folder, it has no {missing[0]}/: give the one that holds "
                f"{', '.join(_ASSET_FOLDERS)} with --assets_dir or ${ASSETS_VARIABLE}"
            )
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(ASSETS_REPOSITORY, repo_type="dataset", local_files_only=not download))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise LiberoError(
            f"no LIBERO assets: neither --assets_dir nor ${ASSETS_VARIABLE} is given, and {ASSETS_REPOSITORY} could "
            f"not be downloaded ({type(error).__name__})"
        ) from error


def assets_fingerprint(folder: Path) -> str:
    """Tells one assets folder from another, by its files' names and sizes; in a fraction of a second."""
    paths = (path for name in _ASSET_FOLDERS for path in (folder / name).rglob("*.*"))
    files = sorted((str(path.relative_to(folder)), path.stat().st_size) for path in paths)
    return hashlib.sha256(repr(files).encode()).hexdigest()[:16]


def choose_renderer() -> str:
    """`$MUJOCO_GL`, else egl where there is an NVIDIA driver, else osmesa; `LiberoError` if nothing renders here."""
    if os.environ.get("MUJOCO_GL"):
        return os.environ["MUJOCO_GL"]
    if (DEVICES / "nvidiactl").exists() and ctypes.util.find_library("EGL"):
        return "egl"
    if ctypes.util.find_library("OSMesa"):
        return "osmesa"
    raise LiberoError("nothing to render with: apt-get install libosmesa6 (CPU), or libegl1 with an NVIDIA driver")


def egl_device() -> str:
    """The GPU to draw on: each process of a launcher gets another one, where robosuite takes the first for all.

    Without an NVIDIA driver, the first of EGL's devices, which is Mesa's.
    """
    gpus = sorted((path.name.removeprefix("nvidia") for path in DEVICES.glob("nvidia[0-9]*")), key=int)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if gpus and visible != [""]:
        by_uuid = _gpus_by_uuid()
        gpus = [gpu if gpu.isdigit() else by_uuid.get(gpu, "0") for gpu in map(str.strip, visible)]
    return gpus[int(os.environ.get("LOCAL_RANK", 0)) % len(gpus)] if gpus else "0"


def _gpus_by_uuid() -> dict[str, str]:
    """What CUDA_VISIBLE_DEVICES may hold instead of a number -> the number."""
    gpus = {}
    for path in NVIDIA_GPUS.glob("*/information"):
        told = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
        gpus[told.get("GPU UUID", "").strip()] = told.get("Device Minor", "0").strip()
    return gpus


def prepare_simulator(assets_dir: str | Path | None = None) -> None:
    """Make this process ready to build LIBERO environments, at any time and any number of times.

    `LiberoError`: see [`find_assets`], [`choose_renderer`] and [`package_folder`].
    """
    assets = find_assets(assets_dir)
    package_folder()
    os.environ["MUJOCO_GL"] = choose_renderer()
    if os.environ["MUJOCO_GL"] in ("egl", "osmesa"):
        os.environ["PYOPENGL_PLATFORM"] = os.environ["MUJOCO_GL"]
    if os.environ["MUJOCO_GL"] == "egl" and not os.environ.get("MUJOCO_EGL_DEVICE_ID"):
        os.environ["MUJOCO_EGL_DEVICE_ID"] = egl_device()
    os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa draws small pictures faster without threads of its own
    # robosuite tells every process that it found no file with private settings; that is how it is meant to be
    logging.getLogger("robosuite_logs").addFilter(lambda record: "macro" not in record.getMessage())
    if os.environ["MUJOCO_GL"] == "egl":
        with _variable("CUDA_VISIBLE_DEVICES", ""):  # robosuite refuses a device that is not in it
            import robosuite.utils.binding_utils  # noqa: F401
    with tempfile.TemporaryDirectory() as folder, _variable("LIBERO_CONFIG_PATH", folder):
        (Path(folder) / "config.yaml").write_text("{}\n")
        import libero.libero
    libero.libero._assets_path_cache = str(assets)


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable within the block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def check_mujoco() -> None:
    """Warn if MuJoCo is not the version that was tested: scores move with it."""
    found = version("mujoco")
    if found != TESTED_MUJOCO:
        warnings.warn(
            f"MuJoCo {found}, but {TESTED_MUJOCO} is what was tested: colours and contacts differ between versions, "
            "and scores with them",
            stacklevel=2,
        )


def task_names(suite: str) -> list[str]:
    """LIBERO's names of a suite's tasks, which are file names, in the order of their ids."""
    if suite not in MAX_STEPS:
        raise ValueError(f"no suite {suite!r}: LIBERO has {', '.join(MAX_STEPS)}")
    # `libero.libero.benchmark` itself would import torch into every worker
    names = runpy.run_path(str(package_folder() / "benchmark" / "libero_suite_task_map.py"))["libero_task_map"][suite]
    if len(names) != NUM_TASKS[suite]:
        raise LiberoError(f"{suite} has {len(names)} tasks instead of {NUM_TASKS[suite]}: another hf-libero?")
    return names


def instruction(name: str) -> str:
    """What a policy is told, in training as in evaluation: a task's name in words, without the scene.

    LIBERO's benchmark and all datasets on the Hub do so. The BDDL files, and with them `problem_info` in LIBERO's
    HDF5 files, word 25 of the 40 tasks differently ("Pick the akita black bowl …").
    """
    words = name.split("_")
    if name[:1].isupper():  # KITCHEN_SCENE3_turn_on_…, LIVING_ROOM_SCENE2_put_…
        scene = next((at for at, word in enumerate(words) if word.startswith("SCENE")), -1)
        words = words[scene + 1 :]
    return " ".join(words).strip()


def initial_states(suite: str, name: str) -> np.ndarray:
    """A task's initial simulator states, float64[50, n]: time, positions, velocities.

    They are in torch's zip format around one pickled array, which torch's own safe loading refuses. This reads them
    from the installed package alone, and unpickles nothing but an array.
    """
    path = package_folder() / "init_files" / suite / f"{name}.pruned_init"
    with zipfile.ZipFile(path) as archive, archive.open("archive/data.pkl") as file:
        states = _ArrayUnpickler(file, encoding="latin1").load()
    if not isinstance(states, np.ndarray) or states.ndim != 2:
        raise LiberoError(f"{path} does not hold an array of states")
    return states


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles NumPy arrays of numbers, and refuses everything else."""

    def find_class(self, module: str, name: str) -> object:
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
            ("numpy._core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a file of initial states")
        return allowed[module, name]
