"""DAgger during training, with PushT's own simulator and an untrained teacher."""

import json
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file
from support.backbones import TINY
from support.general import load_script
from support.runs import run

from vla0_trl.config import VLAConfig
from vla0_trl.data.convert import convert
from vla0_trl.data.episodes import SourceInfo
from vla0_trl.data.pusht_rows import TeacherRows
from vla0_trl.envs.pusht.env import PushTEnv
from vla0_trl.envs.pusht.teacher import PushTTeacher
from vla0_trl.evaluation.callbacks import DAGGER_SEED, StateRecorder

SETTINGS = {"max_steps": 4, "save_steps": 2, "dagger_steps": 2, "dagger_episodes": 2, "dagger_fraction": 1.0}
SETTINGS |= {"nano": {**TINY, "image_size": 96, "patch_size": 24}, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    PushTTeacher(width=8, depth=1).save(path)
    return str(path)


@pytest.fixture(scope="module")
def rows(teacher, tmp_path_factory) -> str:
    pool = np.random.default_rng(0).uniform(100, 400, (20, 5)).astype(np.float32)
    info = SourceInfo("states", "1", "mit", "none", 10.0, "Drawn.")
    config = VLAConfig(action_dim=2, state_dim=2, chunk_size=8, use_state=True, relative_actions=True)
    config = config.replace(normalization=[-160, 160])
    source = TeacherRows(PushTTeacher.load(teacher), pool, 24, 0, "agent", info)
    return str(convert(source, config, tmp_path_factory.mktemp("rows") / "rows"))


def dagger_run(rows, teacher, out, **settings):
    return run(
        rows, out, in_simulator=load_script("recipes/sft_pusht.py").in_simulator, data={"image_size": 96},
        **{**SETTINGS, "dagger_teacher": teacher, **settings},
    )  # fmt: skip


def test_visited_states_become_rows_and_a_resumed_run_is_the_same_run(rows, teacher, tmp_path):
    out = dagger_run(rows, teacher, tmp_path / "whole")
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    (logged,) = (entry for entry in history if "dagger/rows" in entry)
    assert logged["step"] == 2 and logged["dagger/success_rate"] == 0
    assert logged["dagger/rows"] == 2 * 300  # an untrained policy drives to the end: every state but the last
    again = tmp_path / "resumed"
    shutil.copytree(out, again)
    shutil.rmtree(again / "checkpoint-4")
    for final in ("model.safetensors", "trainer_state.json", "vla_config.json"):
        (again / final).unlink()
    (again / "dagger" / "round-00000004.parquet").write_bytes(b"of a step that the resumed run has not reached")
    dagger_run(rows, teacher, again)
    assert not (again / "dagger" / "round-00000004.parquet").exists()
    whole, resumed = (load_file(folder / "model.safetensors") for folder in (out, again))
    assert all((whole[name] == resumed[name]).all() for name in whole)


def test_the_recorder_keeps_every_state_that_a_policy_could_act_in():
    states = []
    env = StateRecorder(PushTEnv(max_episode_steps=3), states)
    env.reset(DAGGER_SEED)
    position = env.observe()["state"]
    while not env.step(position):
        pass
    assert len(states) == 3 and env.result()["steps"] == 3
    np.testing.assert_array_equal(states[0][:2].astype(np.float32), position)
    env.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"dagger_teacher": None}, "no dagger_teacher"), ({"dataloader_num_workers": 1}, "dataloader_num_workers=0")],
)
def test_settings_that_cannot_work_are_refused(rows, teacher, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        dagger_run(rows, teacher, tmp_path / "r", **settings)
