"""Runs as tests start them: in this process, or by `accelerate launch`; and what they leave."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from trl import ModelConfig

from support.backbones import TINY
from support.episodes import DotSource
from support.general import REPOSITORY
from vla0_trl import VLAPolicy
from vla0_trl.training.arguments import DataArguments, VLASFTConfig
from vla0_trl.training.run import prepare, train

ABLATIONS = REPOSITORY / "recipes" / "pusht" / "ablations.yaml"  # changes to a recipe: see test_ablation.py


CONFIGS = REPOSITORY / "accelerate_configs"


ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
ENV |= {"DS_ACCELERATOR": "cpu"}
GLOBAL_BATCH = 8


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs the extra [deepspeed]: pip install -e .[deepspeed]"
)


SHARDED = [*(pytest.param(name, marks=needs_deepspeed) for name in ("zero2", "zero3")), "fsdp2"]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def command(config: str, processes: int, dataset: str, output_dir: Path, *options, machine: tuple[str, ...] = ()):
    """`accelerate launch --config_file … recipes/sft_pusht.py …`; what a CPU needs is in the options alone."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / f"{config}.yaml"]
    if config != "cpu":
        launch += ["--num_processes", processes, *(machine or ["--main_process_port", free_port()])]
    if config == "fsdp2":
        launch += [REPOSITORY / "tests" / "support" / "fsdp_on_cpu.py"]
    sharded = config.startswith(("zero", "fsdp"))
    recipe = {
        "--config": "recipes/pusht/nano.yaml", "--dataset_name": dataset, "--output_dir": output_dir,
        "--nano": json.dumps(TINY), "--image_size": 48, "--chunk_size": 4, "--n_action_steps": 2,
        "--num_eval_episodes": 0, "--eval_strategy": "no", "--logging_steps": 1, "--save_steps": 2, "--max_steps": 4,
        "--report_to": "none",
        "--bf16": "false", "--warmup_steps": 0, "--lr_scheduler_type": "constant", "--learning_rate": 1e-2,
        "--per_device_train_batch_size": GLOBAL_BATCH // processes,
        # Engines that shard know no `use_cpu`: they take what accelerate finds.
        **({"--use_cpu": "false", "--ddp_backend": "gloo"} if sharded else {}),
    }  # fmt: skip
    return [str(part) for part in (*launch, "recipes/sft_pusht.py", *sum(recipe.items(), ()), *options)]


def launch(*args, **kwargs) -> str:
    done = subprocess.run(
        command(*args, **kwargs), cwd=REPOSITORY, env=ENV, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def run(
    dataset: str,
    output_dir: Path,
    model: dict | None = None,
    data: dict | None = None,
    in_simulator: Callable | None = None,
    **training,
) -> Path:
    """A whole run, with defaults for tests."""
    defaults = {"max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1, "seed": 3}
    defaults |= {"report_to": "none", "use_cpu": True, "bf16": False, "lr_scheduler_type": "constant", "nano": TINY}
    plan = prepare(
        DataArguments(dataset_name=dataset, **(data or {})),
        VLASFTConfig(output_dir=str(output_dir), disable_tqdm=True, **{**defaults, **training}),
        ModelConfig(**{"model_name_or_path": "nano", **(model or {})}),
    )
    train(plan, in_simulator)
    return output_dir


def losses(output_dir: Path) -> list[float]:
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def predicts(checkpoint: Path) -> np.ndarray:
    """What a checkpoint, loaded from its path alone, answers to the start of an episode."""
    episode = DotSource().episode(0)
    observation = {"images": {"image": episode.images["image"][0]}, "state": episode.states[0], "task": episode.task}
    return VLAPolicy.from_pretrained(checkpoint).predict_action_chunk([observation])


def run_main(script, monkeypatch, *flags) -> None:
    """The script's main() in this process: importing torch once is enough."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, flags)])
    script.main()
