"""Imports point downward only, and the package opens at once."""

import ast
import subprocess
import sys
from pathlib import Path

import vla0_trl

PACKAGE = Path(vla0_trl.__file__).parent
# Each module may import from those left of it.
ORDER = (
    "actions config chat tokenization images grammar collator nano modeling ensembling policy rollout episodes "
    "chat_dataset staging shards dataset_card conversion conversion_cli inspection arguments training recipe results "
    "offline summary charts report"
).split()


def test_every_module_imports_only_from_below():
    for path in PACKAGE.glob("*.py"):
        if path.stem == "__init__":
            continue
        assert path.stem in ORDER, f"{path.name}: say in ORDER where it belongs"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vla0_trl."):
                imported = node.module.split(".")[1]
                if imported != "envs":
                    assert ORDER.index(imported) < ORDER.index(path.stem), f"{path.name} imports {imported}"


def test_scripts_never_import_scripts():
    for folder in ("data_prep", "eval", "recipes"):
        for path in (PACKAGE.parent / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom):
                    assert (node.module or "").split(".")[0] not in ("data_prep", "eval", "recipes"), path


def test_import_is_light_and_public_names_resolve():
    code = (
        "import sys, time; t = time.perf_counter(); import vla0_trl; seconds = time.perf_counter() - t;"
        "assert not {'torch', 'gymnasium', 'libero'} & set(sys.modules), sorted(sys.modules);"
        "assert seconds < 2, seconds;"
        "[getattr(vla0_trl, name) for name in vla0_trl.__all__];"
        "assert not {'gymnasium', 'libero'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
