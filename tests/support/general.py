"""What several test files share: real data from outside the repository, scripts as modules, small episodes."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode

REPOSITORY = Path(__file__).resolve().parents[2]
# transformers 5.17 makes the host wait once more per step than 5.23.
ONE_MORE = int(Version(transformers.__version__) < Version("5.23"))
PUSHT_ZARR = "data/pusht_human/pusht_cchi_v7_replay.zarr"


def shared_path(relative: str) -> Path:
    """Real test data, in ../shared or $VLA0_SHARED; skips the test where it is absent."""
    root = Path(os.environ.get("VLA0_SHARED", REPOSITORY.parent / "shared"))
    if not (root / relative).exists():
        pytest.skip(f"{root / relative} is absent: set VLA0_SHARED to the folder with the test data")
    return root / relative


def libero_assets() -> str:
    """LIBERO's assets; skips the test where they, the simulator or something to draw with are absent."""
    pytest.importorskip("libero", reason='LIBERO is not installed: pip install -e ".[libero]"')
    from vla0_trl.envs.libero.setup import LiberoError, choose_renderer

    try:
        choose_renderer()
    except LiberoError as error:
        pytest.skip(str(error))
    return str(shared_path("data/libero/assets"))


def check_user_error(run: Callable[[], object], message: str, capsys: pytest.CaptureFixture, folder: Path) -> None:
    """What a user did wrong is one line with `message`, and nothing is left in `folder`."""
    with pytest.raises(SystemExit) as exit_info:
        run()
    errors = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert errors.startswith("error: ") and message in errors and errors.count("\n") == 1
    assert list(folder.iterdir()) == []


def load_script(relative: str) -> ModuleType:
    """A script of the repository as a module, without running its main()."""
    spec = importlib.util.spec_from_file_location(Path(relative).stem, REPOSITORY / relative)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class HostSyncs(TorchDispatchMode):
    """Counts what makes the host wait for a GPU: values it reads, and shapes that depend on values."""

    names = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = isinstance(args[1], list | tuple) if len(args) > 1 and "index.Tensor" in str(func) else False
        booleans = masks and any(index is not None and index.dtype == torch.bool for index in args[1])
        self.count += booleans or func.overloadpacket.__name__ in self.names
        return func(*args, **(kwargs or {}))


def contents(directory: Path) -> dict[str, bytes]:
    """Name and bytes of every file."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def short_words(value: object) -> str | None:
    """A case's name: words as they are; pytest's own for what is no text, the same in every process."""
    return value[:40] if isinstance(value, str) else None
