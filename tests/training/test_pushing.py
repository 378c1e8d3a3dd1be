"""A training's uploads, and what brings them back."""

import shutil
import threading
from pathlib import Path

import pytest
from support.general import contents

from vla0_trl.training.arguments import VLASFTConfig
from vla0_trl.training.pushing import Uploads, restore_checkpoint


def test_uploads_are_one_after_another_in_the_order_of_their_steps(monkeypatch):
    pushed, first = [], threading.Event()

    def push(folder, *_, **__):
        if folder.name == "checkpoint-1":
            first.wait(1)  # until another has overtaken it
        pushed.append(folder.name)
        first.set()

    monkeypatch.setattr("vla0_trl.training.pushing.push_policy", push)
    settings = {"hub_model_id": "me/policy", "hub_strategy": "every_save", "hub_always_push": True}
    uploads = Uploads(VLASFTConfig(push_to_hub=True, use_cpu=True, bf16=False, **settings))
    for step in (1, 2):
        uploads.begin(Path(f"checkpoint-{step}"), step)
    uploads.finish()
    assert pushed == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("name", ["copytree", "copy"])
def test_a_kill_while_a_checkpoint_is_restored_leaves_no_run_to_go_on_from(name, tmp_path, monkeypatch):
    uploaded, run = tmp_path / "last-checkpoint", tmp_path / "runs" / "job"
    uploaded.mkdir()
    for file in ("run.json", "trainer_state.json", "model.safetensors"):
        (uploaded / file).write_text('{"global_step": 2}')

    def half(source, target, **_):
        Path(target).mkdir(parents=True, exist_ok=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, name, half)
        restore_checkpoint(uploaded, run)
    assert not run.exists()
    restore_checkpoint(uploaded, run)
    assert [path.name for path in run.parent.iterdir()] == ["job"]
    assert set(contents(run)) == {"run.json", "checkpoint-2/trainer_state.json", "checkpoint-2/model.safetensors"}
