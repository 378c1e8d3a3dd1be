"""Whose a training's folder is, what `--overwrite` deletes, and from where a killed run goes on."""

import json
import resource
import shutil
import signal
from dataclasses import fields
from pathlib import Path

import pytest
from support.runs import losses, predicts, run
from trl import ModelConfig, SFTConfig

from vla0_trl import VLAConfig
from vla0_trl.envs.libero.protocol import LiberoEpisode
from vla0_trl.evaluation.policy_source import seeds_trained_on
from vla0_trl.manifest import damage, trained_on, write_manifest
from vla0_trl.run_folder import FolderError, RunFolder, checkpoints
from vla0_trl.training import claim
from vla0_trl.training.arguments import DataArguments, VLASFTConfig
from vla0_trl.training.run import SetupError


@pytest.fixture(scope="module")
def whole_run(dot_dataset, tmp_path_factory) -> Path:
    return run(dot_dataset, tmp_path_factory.mktemp("runs") / "whole", max_steps=4, save_steps=2)


@pytest.fixture
def finished(whole_run, tmp_path) -> Path:
    """A copy of the run that a test may damage."""
    return Path(shutil.copytree(whole_run, tmp_path / "run"))


def unfinish(folder: Path) -> None:
    """As if killed before the final policy was written."""
    for name in ("checkpoint.json", "vla_config.json", "trainer_state.json", "model.safetensors"):
        (folder / name).unlink()


def identity(tmp_path, data=None, model=None, **training) -> dict:
    defaults = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    arguments = VLASFTConfig(**defaults | training)
    data = DataArguments(**{"dataset_name": "nowhere"} | (data or {}))
    return claim.run_identity(data, arguments, ModelConfig(**model or {}), VLAConfig())


@pytest.mark.parametrize(
    "change",
    [
        {"lr_scheduler_kwargs": {"num_cycles": 2}},
        {"loss_type": "dft"},
        {"label_smoothing_factor": 0.1},
        {"optim_args": "betas=0.1"},
        {"neftune_noise_alpha": 5.0},
        {"data_seed": 3},
        {"dataloader_drop_last": True},
        {"model": {"lora_modules_to_save": ["lm_head"]}},
        {"model": {"lora_r": 4}},
        {"data": {"num_eval_episodes": 1}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_the_learning_is_another_run(tmp_path, change):
    assert identity(tmp_path, **change) != identity(tmp_path)


def test_what_does_not_change_the_learning_is_the_same_run(tmp_path):
    changes = {"max_steps": 9, "logging_steps": 3, "save_steps": 7, "dataloader_num_workers": 2, "report_to": "none"}
    changes |= {
        "push_to_hub": True,
        "hub_token": "secret",
        "gradient_checkpointing": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    halves = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    assert identity(tmp_path, **changes, **halves) == identity(tmp_path, per_device_train_batch_size=8)


def test_a_field_that_trl_adds_counts_unless_it_is_named_here(tmp_path):
    known = {f.name for arguments in (SFTConfig, VLASFTConfig, ModelConfig, DataArguments) for f in fields(arguments)}
    assert known >= claim._MAY_CHANGE | claim._COUNTS, "a name of no field"
    left_out = {name for name in known if name in claim._MAY_CHANGE or name.startswith(claim._FAMILIES)}
    assert known - left_out < identity(tmp_path).keys()


def test_another_dataset_at_the_same_path_is_another_run(tmp_path):
    found = []
    for revision in "ab":
        (tmp_path / "conversion.json").write_text(json.dumps({"revision": revision}))
        found.append(identity(tmp_path, data={"dataset_name": str(tmp_path)}))
    assert [key for key in found[0] if found[0][key] != found[1][key]] == ["dataset_conversion"]


def test_a_run_of_an_earlier_version_goes_on(finished, dot_dataset, capsys):
    record = json.loads((finished / "run.json").read_text())
    old = {name: record[name] for name in ("dataset_name", "learning_rate", "seed", "global_batch")}
    (finished / "run.json").write_text(json.dumps(old))
    run(dot_dataset, finished, max_steps=4, save_steps=2)
    assert "is another version's and does not say: adam_beta1, " in capsys.readouterr().out
    with pytest.raises(FolderError, match=r"belongs to another run \(learning_rate: 0.01 there, 0.5 here\)"):
        run(dot_dataset, finished, learning_rate=0.5)


def test_a_damaged_record_of_the_run_is_called_that(finished, dot_dataset):
    (finished / "run.json").write_text("{")
    with pytest.raises(FolderError, match=r"has a damaged run\.json: choose another --output_dir"):
        run(dot_dataset, finished, max_steps=6)


def test_a_second_training_is_told_who_is_at_work(finished, dot_dataset, monkeypatch):
    monkeypatch.setattr("vla0_trl.run_folder._SHORT_WAIT", 0.1)
    with RunFolder(finished), pytest.raises(FolderError, match=r"another command is at work in .*: pid "):
        run(dot_dataset, finished, max_steps=6, save_steps=2)


def test_a_mistake_in_a_setting_claims_nothing(dot_dataset, tmp_path):
    for model in ({}, {"use_peft": True, "lora_target_modules": ["all-linear"]}):
        with pytest.raises(SetupError, match="image_size=50"):
            run(dot_dataset, tmp_path / "run", model, data={"image_size": 50})
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="optim_args=a must be NAME=VALUE"):
        run(dot_dataset, tmp_path / "run", optim_args="a")
    with pytest.raises(SetupError, match="nowhere_proj"):
        run(dot_dataset, tmp_path / "run", {"use_peft": True, "lora_target_modules": ["nowhere_proj"]})
    assert run(dot_dataset, tmp_path / "run", max_steps=1)


def test_a_link_as_output_leads_to_the_run(dot_dataset, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "run")
    run(dot_dataset, tmp_path / "link", max_steps=1)
    assert damage(tmp_path / "disk" / "run") is None and (tmp_path / "link").is_symlink()


def test_overwrite_deletes_the_run_and_nothing_else(finished, dot_dataset):
    for name in ("notes.txt", "eval/results.json", "checkpoint-2/eval/results.json", "checkpoint-best/notes.txt"):
        (finished / name).parent.mkdir(exist_ok=True)
        (finished / name).write_text("mine")
    (finished / "best.old").mkdir()
    (finished / ".run.json.4711.partial").write_text("{")
    run(dot_dataset, finished, max_steps=2, save_steps=2, learning_rate=0.5, overwrite=True)
    assert sorted(path.read_text() for path in finished.rglob("*") if path.suffix == ".txt") == ["mine", "mine"]
    assert [(finished / name / "eval/results.json").read_text() for name in ("", "checkpoint-2")] == ["mine", "mine"]
    assert [path.name for path in checkpoints(finished)] == ["checkpoint-2"] and len(losses(finished)) == 2
    assert not (finished / "best.old").exists() and not list(finished.glob(".run*"))
    assert damage(finished) is None and damage(finished / "checkpoint-2") is None


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(whole_run, finished, dot_dataset, capsys):
    unfinish(finished)
    (finished / "checkpoint-4" / "optimizer.pt").write_bytes(b"cut")
    (finished / "checkpoint-4" / ".tmpHI2s8K").write_bytes(b"half")
    shutil.copytree(finished / "checkpoint-2", finished / "checkpoint-best")
    run(dot_dataset, finished, max_steps=4, save_steps=2)
    printed = capsys.readouterr().out
    assert "checkpoint-4 is passed over: optimizer.pt has 3 bytes instead of" in printed
    assert f"continuing from {finished}/checkpoint-2" in printed and losses(finished) == losses(whole_run)
    assert damage(finished / "checkpoint-4") is None and not list((finished / "checkpoint-4").glob(".*"))


def test_without_the_optimizers_state_it_never_goes_on_silently(finished, dot_dataset):
    unfinish(finished)
    for checkpoint in checkpoints(finished):
        (checkpoint / "optimizer.pt").unlink()
        record = json.loads((checkpoint / "checkpoint.json").read_text())
        del record["files"]["optimizer.pt"]  # as save_only_model leaves it
        (checkpoint / "checkpoint.json").write_text(json.dumps(record))
    with pytest.raises(FolderError, match=r"no optimizer's state.*--overwrite, .*--model_name_or_path .*checkpoint-4"):
        run(dot_dataset, finished, max_steps=6, save_steps=2)
    asked = str(finished / "checkpoint-2")
    with pytest.raises(FolderError, match=r"checkpoint-2 can't be resumed from"):
        run(dot_dataset, finished, max_steps=6, save_steps=2, resume_from_checkpoint=asked)


def test_a_kill_during_the_final_save_costs_no_further_step(whole_run, finished, dot_dataset):
    unfinish(finished)
    (finished / "model.safetensors").write_bytes(b"half")
    (finished / ".checkpoint.json.4711.partial").write_text("{")
    (finished / ".tmpHI2s8K").write_bytes(b"half")  # safetensors' own
    run(dot_dataset, finished, max_steps=4, save_steps=2)
    state = json.loads((finished / "trainer_state.json").read_text())
    assert state["global_step"] == 4 and losses(finished) == losses(whole_run)
    assert (finished / "model.safetensors").read_bytes() == (whole_run / "model.safetensors").read_bytes()
    assert (predicts(finished) == predicts(whole_run)).all() and damage(finished) is None
    assert not (finished / "optimizer.pt").exists() and not list(finished.glob(".*"))


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"max_steps": 1}, {"max_steps": -1, "num_train_epochs": 0.4}),
        ({"max_steps": -1, "num_train_epochs": 0.1}, {"max_steps": -1, "num_train_epochs": 0.4}),
        ({"stop_at_token_accuracy": 0.0}, {}),
        ({"stop_at_token_accuracy": 0.0}, {"stop_at_token_accuracy": 0.99}),
    ],
)
def test_a_run_that_ended_before_what_is_asked_now_goes_on(first, then, dot_dataset, tmp_path, capsys):
    for again in (first, first, then, then):
        run(dot_dataset, tmp_path / "run", **again)
    assert capsys.readouterr().out.count("already trained") == 2
    learnt = losses(tmp_path / "run")
    assert learnt == losses(run(dot_dataset, tmp_path / "whole", **then)) and len(learnt) > 1


def test_the_best_policy_is_the_final_one_after_a_kill_too_and_the_last_checkpoint_stays(dot_dataset, tmp_path):
    options = {"load_best_model_at_end": True, "greater_is_better": True}  # by eval_loss: the first is the best
    options |= {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_total_limit": 1}
    out = run(dot_dataset, tmp_path / "run", data={"num_eval_episodes": 1}, **options)
    assert [path.name for path in checkpoints(out)] == ["checkpoint-3", "checkpoint-1"]
    weights = (out / "model.safetensors").read_bytes()
    assert weights == (out / "checkpoint-1" / "model.safetensors").read_bytes()
    unfinish(out)
    run(dot_dataset, out, data={"num_eval_episodes": 1}, **options)
    assert (out / "model.safetensors").read_bytes() == weights and damage(out) is None
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 3


def test_an_evaluation_during_the_final_save_is_no_part_of_the_policy(dot_dataset, tmp_path):
    others = [tmp_path / "run" / name for name in (".eval.lock", "eval/checkpoint-2/episodes.jsonl")]

    def begin_evaluation(trainer):
        save = trainer.save_state

        def save_state():
            save()
            others[1].parent.mkdir(parents=True)
            for path in others:
                path.write_text("")

        trainer.save_state = save_state
        return []

    run(dot_dataset, tmp_path / "run", max_steps=1, in_simulator=begin_evaluation)
    listed = json.loads((tmp_path / "run" / "checkpoint.json").read_text())["files"]
    assert listed.keys() >= {"model.safetensors", "trainer_state.json"}
    assert not [name for name in listed if "eval" in name]
    others[0].unlink()
    others[1].write_text("{}\n")
    assert damage(tmp_path / "run") is None


def test_an_evaluation_says_what_was_trained_on(whole_run, tmp_path):
    assert trained_on(whole_run)["episodes"] == [0, 1, 2, 3, 4, 5] and trained_on(whole_run)["seeds"] == []
    (tmp_path / "conversion.json").write_text(
        json.dumps({"staging": {"source": {"options": {"seed": 100, "expert_mix": 0.0}}}})
    )
    known = claim.episodes_trained_on(str(tmp_path), [0, 2])
    write_manifest(tmp_path, {}, known)
    assert known["seeds"] == [100, 102] and seeds_trained_on(tmp_path) == {100, 102}
    libero = {"episodes": [["libero_object", 3, 0], ["libero_object", 3, 1]]}
    (tmp_path / "conversion.json").write_text(json.dumps({"staging": {"source": {"options": libero}}}))
    write_manifest(tmp_path, {}, claim.episodes_trained_on(str(tmp_path), [1]))
    assert seeds_trained_on(tmp_path) == {LiberoEpisode("libero_object", 3, 1)}
    assert seeds_trained_on(tmp_path / "nowhere") == set()


def test_old_checkpoints_go_but_no_copy_of_the_users(dot_dataset, tmp_path):
    mine = tmp_path / "run" / "checkpoint-best"
    run(dot_dataset, tmp_path / "run", max_steps=1)
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    run(dot_dataset, tmp_path / "run", max_steps=4, save_steps=1, save_total_limit=1)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-4"] and (mine / "notes.txt").exists()


@pytest.mark.parametrize(
    ("limit", "named"), [(1_000, "run.json"), (100_000, "could not be written"), (1_000_000, "could not be written")]
)
def test_a_full_disk_is_one_error_and_the_same_command_goes_on(whole_run, dot_dataset, tmp_path, limit, named):
    """A limit of files' sizes stands for the disk: while run.json, the weights or the optimizer are written."""
    usual, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, usual[1]))
    try:
        with pytest.raises(OSError, match=named) as error:
            run(dot_dataset, tmp_path / "run", max_steps=4, save_steps=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "\n" not in str(error.value)
    run(dot_dataset, tmp_path / "run", max_steps=4, save_steps=2)
    assert losses(tmp_path / "run") == losses(whole_run) and damage(tmp_path / "run") is None
