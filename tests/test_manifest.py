"""Checkpoints and their manifests: what counts as whole, what is ever deleted, what a kill leaves."""

import json
from pathlib import Path

import pytest
from support.general import contents

from vla0_trl.manifest import CHECKPOINT_FILE, damage, delete_claimed, files_of, replace_folder
from vla0_trl.run_folder import checkpoints, last_checkpoint


def checkpoint(folder: Path, weights: str = "weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text(weights)
    (folder / "vla_config.json").write_text("{}")
    (folder / CHECKPOINT_FILE).write_text(json.dumps({"files": files_of(folder)}))
    return folder


def test_a_checkpoint_counts_if_all_that_its_manifest_lists_is_there(tmp_path):
    for step in (2, 4, 10):
        checkpoint(tmp_path / f"checkpoint-{step}")
    checkpoint(tmp_path / "checkpoint-best")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-4", "checkpoint-2"]
    (tmp_path / "checkpoint-10" / "model.safetensors").write_text("weig")
    assert damage(tmp_path / "checkpoint-10") == "model.safetensors has 4 bytes instead of 7"
    (tmp_path / "checkpoint-4" / "model.safetensors").unlink()
    assert damage(tmp_path / "checkpoint-4") == "model.safetensors is missing"
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    (tmp_path / "checkpoint-2" / CHECKPOINT_FILE).write_text("{")
    assert damage(tmp_path / "checkpoint-2") == "checkpoint.json is damaged" and last_checkpoint(tmp_path) is None
    assert damage(tmp_path / "checkpoint-3") == "there is no such folder"


def test_a_checkpoint_of_an_earlier_version_counts_by_its_last_file(tmp_path):
    (checkpoint(tmp_path / "checkpoint-2") / CHECKPOINT_FILE).unlink()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    (tmp_path / "checkpoint-2" / "vla_config.json").unlink()
    assert last_checkpoint(tmp_path) is None


def test_only_what_a_manifest_lists_is_deleted(tmp_path):
    (tmp_path / "outside").write_text("precious")
    folder = checkpoint(tmp_path / "checkpoint-2")
    listed = files_of(folder) | {"../outside": 8}
    (folder / CHECKPOINT_FILE).write_text(json.dumps({"files": listed}))
    (folder / "eval").mkdir()
    (folder / "eval" / "results.json").write_text("{}")
    delete_claimed(folder)
    assert contents(tmp_path) == {"outside": b"precious", "checkpoint-2/eval/results.json": b"{}"}
    delete_claimed(folder)
    (folder / "notes.txt").write_text("mine")
    delete_claimed(folder)
    assert (folder / "notes.txt").exists()


@pytest.mark.parametrize("left", ["nothing", "old", "old and new"])
def test_best_is_replaced_whatever_a_kill_left(tmp_path, left):
    best = tmp_path / "best"
    if left != "old":
        checkpoint(best, "first")
    if left != "nothing":
        checkpoint(tmp_path / "best.old", "before")
    replace_folder(checkpoint(tmp_path / "best.partial", "second"), best)
    assert (best / "model.safetensors").read_text() == "second" and damage(best) is None
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
