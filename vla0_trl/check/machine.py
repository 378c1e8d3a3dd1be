"""Probes of the machine and of what is installed: versions, disk, Hub, GPU, 8-bit Adam.

Everything but the standard library is imported inside the probe that needs it: starting is instant, and a broken
library fails its own check and no other.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import vla0_trl
from vla0_trl import pip_install
from vla0_trl.check.process import FAILURE, OK, WARNING, Finding, message

if TYPE_CHECKING:
    from packaging.requirements import Requirement

LOCK = "requirements.lock"
BASE_MODEL = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"  # what most recipes ask the Hub for
ADAM_FIX = "choose another bitsandbytes, or --optim adamw_torch_fused"
_HUB_TIMEOUT = 10  # seconds
_NAMED = 4  # of many packages, the line names this many
_MIN_TENSOR = 4096  # elements; bitsandbytes keeps smaller states in 32 bits


def packages(_: Path) -> Finding:
    """Installed versions against setup.cfg's bounds and against the lock."""
    from packaging.requirements import Requirement

    try:
        declared = [Requirement(text) for text in requires("vla0_trl") or []]
    except PackageNotFoundError:
        declared = []
    broken = _differences(declared, needed=True)
    if broken:
        return Finding(FAILURE, _shortened(broken), f"pip install -c {LOCK} -e .")
    lock = Path(vla0_trl.__file__).parents[1] / LOCK
    if not lock.exists():
        found = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
        return Finding(OK, f"there is no {LOCK} to compare with (only a checkout has it): {found}")
    lines = (line.split(" --hash")[0].split(" #")[0].rstrip("\\ \n") for line in lock.read_text().splitlines())
    locked = [Requirement(line) for line in lines if line and line[0] not in "-# "]
    different = _differences(locked, needed=False)
    if different:
        text = f"{len(different)} differ from {LOCK}: {_shortened(different)}"
        return Finding(WARNING, text, f"pip install -c {LOCK} -e . installs what was tested")
    return Finding(OK, f"those that are installed have the versions of {LOCK} ({len(locked)} packages)")


def _differences(requirements: Iterable[Requirement], needed: bool) -> list[str]:
    """Packages whose version isn't what is required here, and if all are `needed`, those that are not installed."""
    found = []
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            found += [f"{requirement.name} is not installed"] if needed else []
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            found.append(f"{requirement.name} {installed} (needs {requirement.specifier})")
    return found


def _shortened(names: list[str]) -> str:
    more = [f"and {len(names) - _NAMED} more"] if len(names) > _NAMED else []
    return ", ".join(names[:_NAMED] + more)


def disk(output_dir: Path) -> Finding:
    """Room for checkpoints, and a file really written."""
    from vla0_trl.benchmarks.memory_table import GIB, checkpoint_gib, load_table

    folder = next(path for path in (output_dir.resolve(), *output_dir.resolve().parents) if path.exists())
    free = shutil.disk_usage(folder).free / GIB
    fix = f"free some space for {output_dir}, or give another disk with --output_dir, here and to the recipes"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Finding(FAILURE, f"1 MiB can't be written into {folder} ({error.strerror}), {free:.1f} GiB free", fix)
    sizes = {checkpoint_gib(figures): name for name, figures in load_table().items()}
    largest = max(sizes)
    checkpoint = f"the largest checkpoint of the 12 GB recipes ({sizes[largest]}) takes {largest:.1f} GiB"
    text = f"{free:.1f} GiB free for {output_dir}; {checkpoint}"
    # a recipe keeps two, and writes the next one before it deletes the oldest
    return Finding(OK, text) if free >= 3 * largest else Finding(WARNING, text, fix)


def hub(_: Path) -> Finding:
    """The Hub answers, and to whom; or we are offline on purpose."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    if constants.is_offline_mode():
        return Finding(OK, "offline on purpose (HF_HUB_OFFLINE): models and datasets come from folders and the cache")
    try:
        HfApi(token=False).model_info(BASE_MODEL, timeout=_HUB_TIMEOUT)
    except (HTTPError, OSError) as error:
        fix = "check network, proxy and HF_ENDPOINT; or export HF_HUB_OFFLINE=1 to work offline on purpose"
        return Finding(FAILURE, f"{constants.ENDPOINT} can't be reached: {message(error)}", fix)
    if get_token() is None:
        fix = "hf auth login, if you need --push_to_hub or private repositories"
        return Finding(WARNING, f"{constants.ENDPOINT} answers, nobody is logged in", fix)
    try:
        name = HfApi().whoami()["name"]
    except HfHubHTTPError as error:
        return Finding(FAILURE, f"the Hub refuses the token: {message(error)}", "hf auth login")
    return Finding(OK, f"{constants.ENDPOINT} answers, logged in as {name}")


def gpu(_: Path) -> Finding:
    """GPUs that torch computes on, and the recipes that fit their free memory."""
    import torch

    from vla0_trl.benchmarks.memory_table import GIB, load_table

    table = load_table()
    if not torch.cuda.is_available():
        return _no_gpu(torch.version.cuda, min(figures["peak_gib"] for figures in table.values()))
    free = []
    for index in range(torch.cuda.device_count()):
        torch.ones(64, 64, device=f"cuda:{index}").square().sum().item()  # a torch built for other GPUs ends here
        free.append(torch.cuda.mem_get_info(index)[0] / GIB)
    name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    fits = [recipe for recipe, figures in table.items() if figures["peak_gib"] <= min(free)]
    text = (
        f"{len(free)} × {name}, compute capability {major}.{minor}, {'bf16' if bf16 else 'no bf16'}, "
        f"{min(free):.1f} GiB free; by the estimates in recipes/README.md fit: {', '.join(fits) or 'none'}"
    )
    if not bf16:
        return Finding(WARNING, text, "the recipes compute in bf16: give them --bf16 false (slower, never fp16)")
    if not fits:
        return Finding(WARNING, text, "end what else uses the GPU (nvidia-smi lists it), or take a larger one")
    return Finding(OK, text)


def _no_gpu(cuda: str | None, smallest: float) -> Finding:
    from vla0_trl.envs.libero.setup import DEVICES
    from vla0_trl.training.settings import CPU_RECIPES

    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return Finding(WARNING, "hidden: CUDA_VISIBLE_DEVICES is empty", "unset CUDA_VISIBLE_DEVICES to use it")
    if (DEVICES / "nvidiactl").exists():
        if cuda is None:
            return Finding(
                FAILURE, "there is an NVIDIA driver, but this torch is built for CPUs", "install torch for CUDA"
            )
        fix = "update the driver, or install a torch for its CUDA version (nvidia-smi names it)"
        return Finding(FAILURE, f"there is an NVIDIA driver, but torch (CUDA {cuda}) can't use it", fix)
    text = f"none: of the recipes, {CPU_RECIPES} are for a CPU"
    fix = f"nothing to fix for `make demo`; to fine-tune SmolVLM2, take a GPU with {smallest:.1f} GiB free or more"
    return Finding(WARNING, text, fix)


def adam_8bit(_: Path) -> Finding:
    """A step of 8-bit Adam on a tensor."""
    if find_spec("bitsandbytes") is None:
        return Finding(WARNING, "bitsandbytes is not installed", pip_install("train8bit"))
    import torch
    from bitsandbytes.optim import AdamW8bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.nn.Parameter(torch.zeros(_MIN_TENSOR, device=device))
    optimizer = AdamW8bit([weight], lr=0.5)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    bits = optimizer.state[weight]["state1"].element_size() * 8
    # Adam's first step is the learning rate, against the gradient
    if bits != 8 or not torch.allclose(weight, torch.full_like(weight, -0.5), atol=0.01):
        return Finding(FAILURE, f"a wrong step on {device}: {weight[0].item():.3f}, {bits} bits", ADAM_FIX)
    return Finding(OK, f"bitsandbytes {version('bitsandbytes')} steps a tensor on {device}")
