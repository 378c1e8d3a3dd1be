"""The recipes as users start them: every YAML is complete, every key is known, and the commands run."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from support.backbones import TINY
from support.general import REPOSITORY, load_script
from support.runs import ABLATIONS, ENV
from support.runs import command as command_line
from trl import ModelConfig

from vla0_trl.training.arguments import DataArguments, VLASFTConfig, parse_recipe
from vla0_trl.training.fields import check_recipe_words, recipe_fields
from vla0_trl.training.run import main

RECIPES = sorted(path for path in (REPOSITORY / "recipes").rglob("*.yaml") if path != ABLATIONS)


def launch(*arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    """`accelerate launch recipes/…`."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        *map(str, arguments),
    ]
    done = subprocess.run(command, cwd=REPOSITORY, env=ENV, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def parse(monkeypatch, *arguments: str):
    monkeypatch.setattr(sys, "argv", ["sft", *map(str, arguments)])
    return parse_recipe(REPOSITORY / "recipes" / "pusht" / "nano.yaml", "")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_yaml_parses_and_says_what_it_needs(path, monkeypatch):
    values = yaml.safe_load(path.read_text())
    on_cpu = [] if values.get("use_cpu") else ["--use_cpu", "true"]
    data, training, model = parse(monkeypatch, "--config", path, *on_cpu)
    parsed = {**vars(data), **vars(training), **vars(model)}
    for key, value in values.items():
        # Lists and enumerations come back as such; nothing is overridden behind the user's back.
        assert (
            parsed[key] == value
            or str(getattr(parsed[key], "value", parsed[key])) == str(value)
            or (isinstance(parsed[key], list) and parsed[key] == [value])
        ), key
    header = "".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert "Hardware:" in header and "Time:" in header and "accelerate launch recipes/" in header
    assert values["output_dir"].startswith("runs/") and values["dataset_name"].startswith("data/")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_every_yaml_describes_a_run_completely(path):
    """What is predicted, what is executed and how it is written: none of it is left to the dataset."""
    values = yaml.safe_load(path.read_text())
    assert values.keys() >= {"chunk_size", "num_bins", "use_state", "relative_actions", "image_size", "crop_ratio"}
    assert len({"n_action_steps", "ensemble_size"} & values.keys()) == 1
    assert values.keys() >= {"mask_max", "mask_skip", "max_steps", "learning_rate", "optim", "seed"}
    # VLA-0 hides up to 40 % of an answer's characters; VLA-0-Smol up to 15 % of its values. From scratch: more.
    if values["model_name_or_path"] != "nano":
        unit, bins = values.get("mask_unit", "value"), values["num_bins"]
        assert (unit, values["mask_max"], bins) in {("character", 0.4, 1000), ("value", 0.15, 511)}


def test_the_command_line_wins_over_the_yaml(monkeypatch):
    data, training, model = parse(
        monkeypatch, "--learning_rate", "0.5", "--chunk_size", "4", "--use_peft", "--normalization", "-1,1",
        "--nano", json.dumps(TINY), "--relative_actions", "false",
    )  # fmt: skip
    assert training.learning_rate == 0.5 and training.nano == TINY and model.use_peft
    assert data.overrides()["normalization"] == [-1.0, 1.0] and data.overrides()["chunk_size"] == 4
    assert data.overrides()["relative_actions"] is False and "tile_images" not in data.overrides()


def test_a_yaml_may_be_given_either_way(monkeypatch):
    path = REPOSITORY / "recipes" / "pusht" / "lora.yaml"
    assert parse(monkeypatch, f"--config={path}", "--use_cpu", "true")[2].use_peft


def test_averaging_replaces_the_datasets_steps_of_a_chunk(monkeypatch, example_config):
    path = REPOSITORY / "recipes" / "libero" / "full.yaml"
    data, *_ = parse(monkeypatch, "--config", path, "--use_cpu", "true")
    config = example_config.replace(n_action_steps=2).replace(**data.overrides())
    assert (config.ensemble_size, config.n_action_steps) == (8, 1)


def test_unknown_keys_raise(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="chunk_sise"):
        parse(monkeypatch, "--chunk_sise", "4")
    path = tmp_path / "typo.yaml"
    path.write_text("dataset_name: data/x\nlerning_rate: 1.0\n")
    with pytest.raises(ValueError, match="lerning_rate"):
        parse(monkeypatch, "--config", path, "--use_cpu", "true", "--bf16", "false")


@pytest.mark.parametrize("known", [True, False])
def test_bfloat16_is_the_default_where_the_cpu_has_it(monkeypatch, known):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": known}, raising=False)
    command = ["--config", "recipes/pusht/nano.yaml"]
    assert [parse(monkeypatch, *command, *more)[1].bf16 for more in ((), ("--bf16", "true"))] == [known, True]
    assert parse(monkeypatch, *command, "--bf16", "false")[1].bf16 is False


@pytest.mark.slow
def test_a_recipe_runs_as_the_readme_says(dot_dataset, tmp_path):
    out = tmp_path / "run"
    small = ["--nano", json.dumps(TINY), "--max_steps", 2, "--save_steps", 2, "--eval_steps", 2, "--image_size", 48]
    small += ["--num_eval_episodes", 1, "--chunk_size", 4, "--n_action_steps", 2, "--per_device_train_batch_size", 4]
    command = ["recipes/sft_pusht.py", "--config", "recipes/pusht/nano.yaml", "--dataset_name", dot_dataset]
    launch(*command, "--output_dir", out, *small)
    assert (out / "checkpoint-2" / "vla_config.json").exists() and (out / "initial" / "vla_config.json").exists()
    assert list(out.rglob("events.out.tfevents.*")), "report_to tensorboard works out of the box"
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert any("eval_mean_token_accuracy" in entry for entry in history)
    again = launch(*command, "--output_dir", out, *small)
    assert "already trained" in again.stdout + again.stderr


def test_user_errors_are_one_line(dot_dataset, tmp_path, monkeypatch):
    """Without a process each: `main` is all that the script calls."""
    small = ["--dataset_name", dot_dataset, "--chunk_size", "4", "--n_action_steps", "2", "--image_size", "48"]
    small += ["--nano", json.dumps(TINY), "--num_eval_episodes", "0", "--eval_strategy", "no"]
    for arguments, message in (
        (["--dataset_name", tmp_path / "nothing"], "no folder"),
        (["--dataset_name", dot_dataset, "--chunk_size", "99"], "chunk_size=99"),
        (["--dataset_name", dot_dataset, "--lerning_rate", "1"], "--lerning_rate"),
        ([*small, "--rollout_steps", "5"], "no simulator"),
        ([*small, "--use_peft", "--lora_target_modules", "nowhere"], "nowhere"),
        ([*small, "--max_length", "512"], "max_length=512"),
        ([*small, "--optim", "adamm"], "adamm"),
    ):
        monkeypatch.setattr(sys, "argv", ["sft", *map(str, arguments), "--output_dir", str(tmp_path / "r")])
        with pytest.raises(SystemExit) as error:
            main(REPOSITORY / "recipes" / "pusht" / "nano.yaml", "")
        assert str(error.value).startswith("error: ") and message in str(error.value)
        assert "\n" not in str(error.value)


def test_a_missing_teacher_is_one_line(dot_dataset, tmp_path, monkeypatch):
    """Found where the trainer is built: `main` with the recipe's own simulator."""
    small = ["--dataset_name", dot_dataset, "--chunk_size", 4, "--n_action_steps", 2, "--image_size", 48]
    small += ["--nano", json.dumps(TINY), "--num_eval_episodes", 0, "--eval_strategy", "no", "--dagger_steps", 2]
    small += ["--dagger_teacher", "nowhere.safetensors", "--output_dir", tmp_path / "r"]
    monkeypatch.setattr(sys, "argv", ["sft", *map(str, small)])
    with pytest.raises(SystemExit, match=r"^error: nowhere.safetensors: no such file: make a teacher with"):
        main(REPOSITORY / "recipes" / "pusht" / "nano.yaml", "", load_script("recipes/sft_pusht.py").in_simulator)


@pytest.mark.slow  # several processes
@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGTERM, 2)])
def test_a_signal_saves_and_the_same_command_goes_on(number, workers, dot_dataset, tmp_path):
    """To the whole group, as Ctrl-C and Slurm do it: workers must not die before the checkpoint is there."""
    out = tmp_path / "run"
    command = command_line("cpu", 1, dot_dataset, out, "--save_steps", 100000, "--dataloader_num_workers", workers)
    command = [sys.executable, *command[command.index("recipes/sft_pusht.py") :], "--max_steps"]
    process = subprocess.Popen(
        [*command, "100000"], cwd=REPOSITORY, env=ENV, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    for line in process.stdout:
        if "'loss'" in line:
            os.killpg(process.pid, number)
            break
    assert "the same command goes on" in process.communicate(timeout=120)[0]
    assert process.returncode == 128 + number
    (checkpoint,) = out.glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    assert not (out / "vla_config.json").exists() and (checkpoint / "vla_config.json").exists()
    if workers:
        return
    done = subprocess.run(
        [*command, str(step + 1)], cwd=REPOSITORY, env=ENV, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and f"continuing from {checkpoint}" in done.stdout, done.stderr[-2000:]
    assert "missing keys" not in done.stderr
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == step + 1


@pytest.mark.slow
@pytest.mark.parametrize("everyone", [False, True])
def test_sigterm_to_the_launcher_saves_all_ranks(everyone, dot_dataset, tmp_path):
    """`accelerate launch` of two processes passes SIGTERM on, also where Slurm has sent it to all of them."""
    out = tmp_path / "run"
    command = command_line("multi_gpu", 2, dot_dataset, out, "--save_steps", 100000, "--max_steps", 100000)
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    for line in process.stdout:
        if "'loss'" in line:
            ranks = psutil.Process(process.pid).children(recursive=True) if everyone else []
            for each in (*ranks, process):
                each.terminate()
            break
    assert "the same command goes on" in process.communicate(timeout=120)[0]
    (checkpoint,) = out.glob("checkpoint-*")
    assert (checkpoint / "vla_config.json").exists()


def test_fields_read_from_sources_are_those_of_the_parser(monkeypatch):
    known = {f.name for kind in (DataArguments, VLASFTConfig, ModelConfig) for f in fields(kind) if f.init}
    found = recipe_fields()
    assert found.keys() == known
    assert float(found["learning_rate"].default) == VLASFTConfig.learning_rate
    assert found["mask_unit"].help.startswith("Hide whole values") and found["lora_r"].default == str(
        ModelConfig.lora_r
    )


def test_mistyped_flags_and_keys_are_found_without_the_parser(tmp_path):
    config = REPOSITORY / "recipes" / "pusht" / "nano.yaml"
    check_recipe_words(config, "", ["--learning_rate", "0.5", "--use_peft", "--normalization", "-1,1", "--lora-r=4"])
    with pytest.raises(SystemExit, match="unknown argument --lerning_rate: did you mean --learning_rate"):
        check_recipe_words(config, "", ["--lerning_rate", "1"])
    path = tmp_path / "typo.yaml"
    path.write_text("chunk_sise: 4\n")
    with pytest.raises(SystemExit, match="unknown argument chunk_sise: did you mean --chunk_size"):
        check_recipe_words(config, "", ["--config", str(path)])


def test_help_lists_our_fields_and_trls():
    done = subprocess.run(
        [sys.executable, "recipes/sft_pusht.py", "--help"],
        cwd=REPOSITORY,
        env=ENV,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0
    for flag in ("--mask_max", "--chunk_size", "--rollout_steps", "--learning_rate", "--lora_r", "--config"):
        assert flag in done.stdout


@pytest.mark.slow
def test_plain_trl_trains_on_a_chat_dataset(dot_dataset, tiny_nano, tmp_path):
    command = ["trl", "sft", "--model_name_or_path", tiny_nano, "--dataset_name", dot_dataset, "--max_steps", "1"]
    command += ["--output_dir", str(tmp_path / "trl"), "--per_device_train_batch_size", "2", "--report_to", "none"]
    path = f"{Path(sys.executable).parent}:{ENV['PATH']}"
    done = subprocess.run(
        [*command, "--use_cpu", "true", "--bf16", "false"],
        cwd=REPOSITORY, env={**ENV, "PATH": path}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "trl" / "model.safetensors").exists()


@pytest.mark.slow
def test_rollouts_during_training_are_logged_and_the_best_is_kept(tmp_path):
    """PushT's own simulator, a policy that has seen two recorded episodes for two steps."""
    out = tmp_path / "run"
    subprocess.run(
        [sys.executable, "data_prep/record_pusht.py", "--num_episodes", "2", "--output_dir", tmp_path / "data"],
        cwd=REPOSITORY, env=ENV, check=True, timeout=120,
    )  # fmt: skip
    launch(
        "recipes/sft_pusht.py", "--config", "recipes/pusht/nano.yaml", "--dataset_name", tmp_path / "data",
        "--output_dir", out, "--max_steps", 2, "--rollout_steps", 2, "--rollout_episodes", 2, "--num_eval_episodes", 0,
        "--eval_strategy", "no", "--logging_steps", 2,
        "--nano", json.dumps({**TINY, "image_size": 96, "patch_size": 24}),
    )  # fmt: skip
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert any("loss" in entry and entry["step"] == 2 for entry in history), "training's own log was lost"
    (logged,) = (entry for entry in history if "rollout/success_rate" in entry)
    assert logged["step"] == 2 and 0 <= logged["rollout/mean_max_coverage"] <= 1
    assert (out / "best" / "vla_config.json").exists() and not list(out.glob("best.*"))
