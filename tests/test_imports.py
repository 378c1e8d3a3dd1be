"""Imports point downward only, and the package opens at once."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.trainer import TRAINER_STATE_NAME

import vla0_trl
from vla0_trl.runs import STATE_FILE

PACKAGE = Path(vla0_trl.__file__).parent
# Each module may import from those before it.
ORDER = """
actions files config runs chat tokenization images grammar collator nano modeling forward ensembling
passes answers decoding policy rollout workers
episodes chat_dataset synthetic conversion.card conversion.staging conversion.shards conversion.convert conversion.cli
conversion.pusht
sources.video sources.parquet_images sources.lerobot_meta sources.lerobot sources.lerobot_hub sources.libero_hdf5
inspection
arguments run_report callbacks probes checkpoints not_finite training training_bench recipe memory metrics results
learner evaluation libero_evaluation inference_bench offline report.summary report.charts report.page ablation
""".split()  # noqa: SIM905


def imports_of(path: Path) -> set[str]:
    """The package's modules that a file imports, as named in ORDER; simulators (`envs`) aside."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vla0_trl."):
            name = node.module.removeprefix("vla0_trl.")
            below = {f"{name}.{alias.name}" for alias in node.names} & set(ORDER)
            modules |= below or {name}
    return {name for name in modules if not name.startswith("envs")}


def test_every_module_imports_only_from_below():
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if name.endswith("__init__") or name.startswith("envs."):
            continue
        assert name in ORDER, f"{name}: say in ORDER where it belongs"
        for imported in imports_of(path):
            assert ORDER.index(imported) < ORDER.index(name), f"{name} imports {imported}"


def test_simulators_know_nothing_of_models():
    for path in (PACKAGE / "envs").glob("*.py"):
        assert not imports_of(path), path


def test_scripts_never_import_scripts():
    for folder in ("data_prep", "eval", "recipes"):
        for path in (PACKAGE.parent / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom):
                    assert (node.module or "").split(".")[0] not in ("data_prep", "eval", "recipes"), path


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
