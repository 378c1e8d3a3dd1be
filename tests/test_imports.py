"""Rooms import in one direction only, and the package opens at once."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.trainer import TRAINER_STATE_NAME

import vla0_trl
from vla0_trl.old_names import MOVED
from vla0_trl.run_folder import STATE_FILE

PACKAGE = Path(vla0_trl.__file__).parent
# A room may import from rooms on lower floors and from itself, never from a room beside it.
FLOORS = [
    {"root"},  # config.py, actions.py, and what else lies in vla0_trl/ itself
    {"processing", "models", "envs"},
    {"data", "policy"},
    {"training", "evaluation"},
    {"benchmarks", "serving"},
    {"check"},  # tries a part of every room, each in a process of its own
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str:
    """The room of a dotted name below `vla0_trl`."""
    first = module.split(".")[0]
    return first if (PACKAGE / first).is_dir() else "root"


def imports_of(path: Path) -> set[str]:
    """The package's modules that a file imports, without the leading `vla0_trl.`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vla0_trl":
            module = node.module.removeprefix("vla0_trl").removeprefix(".")
            names |= {module} if module else {alias.name for alias in node.names}
    return names


def test_rooms_import_in_one_direction():
    for path in PACKAGE.rglob("*.py"):
        room = room_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
        for imported in map(room_of, imports_of(path)):
            assert imported == room or FLOOR[imported] < FLOOR[room], f"{path} ({room}) imports from {imported}"


def test_what_the_lerobot_plugin_carries_needs_nothing_of_the_package():
    for name in ("client", "codec", "safety"):
        path = PACKAGE / "serving" / f"{name}.py"
        assert not imports_of(path), f"{path} is in eval/lerobot_plugin, too, where vla0_trl is not"


def test_scripts_never_import_scripts_and_tests_never_import_tests():
    for folder in ("data_prep", "eval", "recipes", "tests"):
        for path in (PACKAGE.parent / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom):
                    first = (node.module or "").split(".")[0]
                    assert first not in ("data_prep", "eval", "recipes", "conftest"), path
                    assert not first.startswith("test_"), path


def test_import_is_light_and_public_names_resolve():
    code = (
        "import sys, vla0_trl;"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'gymnasium', 'libero'} & set(sys.modules);"
        "assert not heavy, heavy;"
        "[getattr(vla0_trl, name) for name in vla0_trl.__all__];"
        "assert not {'gymnasium', 'libero'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("script", ["eval/summarize.py", "recipes/curves.py"])
def test_scripts_that_draw_what_is_there_need_no_torch(script):
    code = 'import runpy, sys; runpy.run_path(sys.argv[1]); assert "torch" not in sys.modules'
    subprocess.run([sys.executable, "-c", code, PACKAGE.parent / script], check=True, timeout=120)


def test_a_runs_log_is_where_transformers_writes_it():
    assert STATE_FILE == TRAINER_STATE_NAME


def test_old_names_of_submodules_are_the_new_modules():
    from vla0_trl.models import nano

    with pytest.warns(DeprecationWarning, match=r"vla0_trl\.nano is now vla0_trl\.models\.nano"):
        from vla0_trl.nano import build_nano
    assert build_nano is nano.build_nano
    for old, new in MOVED.items():
        assert (PACKAGE / f"{new.replace('.', '/')}.py").is_file(), new
        assert not (PACKAGE / f"{old}.py").exists(), old
