"""A tiny checkpoint for PushT and its evaluation; test_eval_libero.py has its own of both names."""

import sys
from pathlib import Path

import pytest
from support.general import load_script
from support.pusht_evaluation import flags_of, save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "nano", seed=0)


@pytest.fixture
def evaluate(monkeypatch, checkpoint, tmp_path):
    """Runs main() with flags on top of short defaults; gives the output folder."""
    script = load_script("eval/eval_pusht.py")

    def run(*flags: str) -> Path:
        monkeypatch.setattr(sys, "argv", ["eval/eval_pusht.py", *flags_of(checkpoint, tmp_path / "out"), *flags])
        script.main()
        return tmp_path / "out"

    run.script = script
    return run
