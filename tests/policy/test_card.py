"""The model card: what it says, and that names can't break it."""

import json
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard
from support.general import REPOSITORY, load_script
from support.runs import run_main

from vla0_trl.config import VLAConfig
from vla0_trl.manifest import damage, files_of, write_manifest
from vla0_trl.models.fingerprint import checkpoint_hash
from vla0_trl.policy.card import write_model_card
from vla0_trl.templating import markdown_line

SHIPPED = REPOSITORY / "recipes/pusht/checkpoint"


@pytest.fixture
def folder(tmp_path, example_config):
    """Of a checkpoint without weights."""
    example_config.replace(base_model="org/base", robot="arm | <b>", units="metres").save_pretrained(tmp_path)
    return tmp_path


def read(folder) -> ModelCard:
    return ModelCard((folder / "README.md").read_text())


def test_a_name_in_a_card_is_no_link_picture_or_code():
    assert markdown_line("![a](http://x) `b` c|d\n<i>") == r"!\[a\](http://x) \`b\` c\|d &lt;i>"


def test_metadata_and_rows_are_the_files_own(folder):
    settings = {"global_batch": 64, "optim": "adamw_bnb_8bit", "weight_decay": 0.01, "max_grad_norm": 1.0, "seed": 3}
    settings |= {"learning_rate": 2e-4, "lr_scheduler_type": "cosine", "warmup_steps": 5, "dtype": "bfloat16"}
    settings |= {"mask_max": 0.15, "mask_skip": 0.1, "bf16": True, "freeze_vision": False, "use_peft": True}
    settings |= {"lora_r": 32, "lora_alpha": 64, "cotrain_dataset_name": "org/questions", "cotrain_fraction": 0.2}
    (folder / "adapter_config.json").write_text("{}")
    write_model_card(folder, "me/policy", settings, {"dataset": "me/data", "episodes": [0, 1, 5]}, step=70)
    card = read(folder)
    assert yaml.safe_load(card.data.to_yaml()) == {
        "library_name": "peft",
        "pipeline_tag": "robotics",
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "datasets": ["me/data", "org/questions"],
        "tags": ["vla0_trl", "VLA", "robotics", "trl"],
    }
    rows = {
        r"| robot | arm \| &lt;b> |",
        "| dataset | me/data, 3 episodes |",
        "| steps | 70 |",
        "| samples per step | 64 |",
        "| co-training | 0.2 of each step from org/questions |",
        "| LoRA | rank 32, alpha 64 |",
        "| learning rate | 0.0002, cosine, warmup 5 |",
        "| precision | weights bfloat16, autocast to bfloat16 |",
        "| units | metres |",
    }
    assert rows <= {*card.text.splitlines()}
    assert "Not evaluated yet" in card.text and 'from_pretrained("me/policy")' in card.text


def test_what_is_not_known_is_not_claimed(folder):
    VLAConfig(action_dim=2, base_model="nano").save_pretrained(folder)
    write_model_card(folder, "runs", {}, {})
    card = read(folder)
    assert card.data.base_model is None and card.data.datasets is None and card.data.library_name == "transformers"
    assert {"| dataset | not recorded |", "| settings | not recorded |"} <= {*card.text.splitlines()}


def evaluation(folder, **changes):
    """The results.json of an evaluation of the shipped policy."""
    folder.mkdir()
    results = {"checkpoint": "x", "checkpoint_hash": checkpoint_hash(SHIPPED), "num_episodes": 500, "successes": 447}
    results |= {"success_rate": 0.894, "success_rate_interval": [0.864, 0.918], "seeds": {"": [3000000, 3000499]}}
    results |= {"mean_max_coverage": 0.912, "mean_max_coverage_interval": [0.9, 0.92]}
    results["protocol"] = {"env": "gym_pusht/PushT-v0", "n_action_steps": 5, "ensemble_size": 1}
    (folder / "results.json").write_text(json.dumps(results | changes))
    return folder


@pytest.fixture
def shipped(tmp_path):
    """A copy of the shipped policy, as training leaves one."""
    copy = shutil.copytree(SHIPPED, tmp_path / "policy")
    write_manifest(copy, files_of(copy), {"dataset": "data/x"})
    return copy


def test_results_are_in_the_hubs_format_with_seeds_and_n(shipped, tmp_path, monkeypatch):
    script = load_script("eval/push_policy.py")
    found = evaluation(tmp_path / "eval")
    run_main(script, monkeypatch, "--model_name_or_path", shipped, "--evaluations", found)
    success, coverage = read(shipped).data.eval_results
    assert (success.metric_type, success.metric_value) == ("success_rate", 89.4)
    assert success.metric_args == {"n": 500, "interval_95": [86.4, 91.8]}
    assert success.dataset_args == {"seeds": "3000000 to 3000499", "execution": "5 steps of each answer"}
    assert (coverage.metric_type, coverage.metric_value) == ("mean_max_coverage", 0.912)
    row = "| gym_pusht/PushT-v0 | 89.4 % | 86.4 to 91.8 % | 500 | 3000000 to 3000499 | 5 steps of each answer |"
    assert row in read(shipped).text.splitlines()
    assert damage(shipped) is None  # the new card is in the manifest


def test_results_of_other_weights_are_refused(shipped, tmp_path, monkeypatch, capsys):
    found = evaluation(tmp_path / "eval", checkpoint_hash="ff" * 32)
    before = (shipped / "README.md").read_bytes()
    with pytest.raises(SystemExit):
        words = ("--model_name_or_path", shipped, "--evaluations", found)
        run_main(load_script("eval/push_policy.py"), monkeypatch, *words)
    assert "is an evaluation of other weights (x)" in capsys.readouterr().err
    assert (shipped / "README.md").read_bytes() == before
