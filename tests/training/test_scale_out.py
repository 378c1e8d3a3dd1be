"""The shipped accelerate configs launch the recipe in two processes on a CPU, and it stays the run of one process.

Everything runs for real over gloo: DDP on one and two machines, DeepSpeed's ZeRO stages, FSDP2, kills and resumes.
"""

import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from support.general import REPOSITORY
from support.runs import CONFIGS, ENV, SHARDED, command, free_port, launch, losses, predicts

from vla0_trl import VLAPolicy
from vla0_trl.run_folder import last_checkpoint

pytestmark = pytest.mark.slow  # two processes each

GLOBAL_BATCH = 8
LORA = ["--use_peft", "--lora_r", "4", "--lora_dropout", "0", "--lora_target_modules", "all-linear"]


@pytest.fixture(scope="module")
def single(dot_dataset, tmp_path_factory) -> Path:
    """The run that all others must repeat: one process, full fine-tuning."""
    out = tmp_path_factory.mktemp("single") / "full"
    printed = launch("cpu", 1, dot_dataset, out, "--max_steps", 6)
    assert "8 samples = 8 at once × 1 accumulated × 1 process" in printed
    return out


@pytest.fixture(scope="module")
def single_lora(dot_dataset, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("single") / "lora"
    launch("cpu", 1, dot_dataset, out, *LORA)
    return out


def same_run(out: Path, reference: Path, steps: int = 4) -> None:
    """Losses of a run of one process, and a checkpoint that acts like that run's and like its own last one."""
    np.testing.assert_allclose(losses(out), losses(reference)[:steps], rtol=2e-4)
    expected = predicts(reference / f"checkpoint-{steps}")
    # Integers out of 512 levels: rounding in another order of summation may turn a close call, not the action.
    np.testing.assert_allclose(predicts(out), expected, atol=0.2)
    assert np.array_equal(predicts(out / f"checkpoint-{steps}"), predicts(out))


def test_every_config_is_launched_here():
    configs = {path.stem: yaml.safe_load(path.read_text()) for path in CONFIGS.glob("*.yaml")}
    launched = {"cpu", "multi_gpu", "multi_node", "zero2", "zero3", "fsdp2"}
    assert configs.keys() == launched | {"single_gpu", "zero1"}
    # Those two are others but for a word: cpu.yaml on a GPU, and the stage that shards less than zero2.yaml.
    assert configs["single_gpu"] | {"use_cpu": True} == configs["cpu"]
    configs["zero1"]["deepspeed_config"]["zero_stage"] += 1
    assert configs["zero1"] == configs["zero2"]
    assert {config["mixed_precision"] for config in configs.values()} == {"no"}, "precision is the recipe's"


@pytest.mark.parametrize("config", SHARDED)
def test_sharded_training_is_the_run_of_one_process(config, single, dot_dataset, tmp_path):
    """Accumulated and in two halves: the second resumes from the first one's shards."""
    out = tmp_path / config
    half = ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2]
    printed = launch(config, 2, dot_dataset, out, *half, "--max_steps", 2)
    assert "8 samples = 2 at once × 2 accumulated × 2 processes" in printed
    assert np.array_equal(predicts(out / "initial"), predicts(single / "initial"))
    assert f"continuing from {out}/checkpoint-2" in launch(config, 2, dot_dataset, out, *half)
    same_run(out, single)


@pytest.mark.parametrize("config", SHARDED)
def test_sharded_lora_is_the_run_of_one_process(config, single_lora, dot_dataset, tmp_path):
    launch(config, 2, dot_dataset, tmp_path / config, *LORA)
    same_run(tmp_path / config, single_lora)
    policy = VLAPolicy.from_pretrained(tmp_path / config)
    assert type(policy.model).__name__.startswith("Peft")
    assert not (tmp_path / config / "model.safetensors").exists()


def test_two_machines_are_one_run(single_lora, dot_dataset, tmp_path):
    """One process on each, as `--machine_rank 0` and `1`; they meet on the loopback interface."""
    port, out = free_port(), tmp_path / "run"
    machines = []
    for rank in (0, 1):
        where = ["--num_machines", 2, "--machine_rank", rank, "--main_process_ip", "127.0.0.1"]
        words = command("multi_node", 2, dot_dataset, out, *LORA, machine=(*where, "--main_process_port", port))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        machines.append(subprocess.Popen(words, cwd=REPOSITORY, env=ENV, **pipes))
    printed = [machine.communicate(timeout=300)[0] for machine in machines]
    assert not any(machine.returncode for machine in machines), printed[0][-2000:] + printed[1][-2000:]
    assert all("policy saved" in text for text in printed)
    same_run(out, single_lora)


def test_a_run_goes_on_with_another_number_of_processes(single, dot_dataset, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(single / "checkpoint-2", out / "checkpoint-2")
    shutil.copy(single / "run.json", out)
    assert "continuing from" in launch("multi_gpu", 2, dot_dataset, out)
    same_run(out, single)


@pytest.mark.parametrize(("config", "processes"), [("cpu", 1), ("multi_gpu", 2)])
def test_kill_9_while_saving_costs_nothing_but_time(config, processes, single, dot_dataset, tmp_path):
    """Killed as soon as checkpoint-4 appears; the same command gives the losses of the uninterrupted run."""
    out = tmp_path / "run"
    words = command(config, processes, dot_dataset, out, "--max_steps", 6)
    process = psutil.Popen(words, cwd=REPOSITORY, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (out / "checkpoint-4").exists():
        time.sleep(0.001)
    family = [process, *process.children(recursive=True)]
    for member in family:
        member.kill()
    psutil.wait_procs(family)
    assert not (out / "checkpoint-6").exists()

    resumed_from = last_checkpoint(out)
    whole = {path.name for path in (out / "checkpoint-2").iterdir()}
    # Whether the kill came in time for a half-written checkpoint-4 is up to the disk; if so, it is passed over.
    assert resumed_from.name in ("checkpoint-2", "checkpoint-4")
    assert {path.name for path in resumed_from.iterdir()} == whole
    assert f"continuing from {resumed_from}" in launch(config, processes, dot_dataset, out, "--max_steps", 6)
    same_run(out, single, steps=6)
    assert {path.name for path in (out / "checkpoint-4").iterdir()} == whole
