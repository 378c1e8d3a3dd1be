"""Two real commands in one folder at once: nothing is lost, nothing is half, and the second says who is first.

Each command is the script itself in a process of its own, forked so that importing torch is paid for once.
`RACE_TRIALS=20 pytest tests/test_races.py` repeats every race.
"""

import json
import multiprocessing
import os
import runpy
import sys
import traceback
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.backbones import TINY
from support.general import PUSHT_ZARR, REPOSITORY, shared_path
from support.runs import free_port, losses

from vla0_trl.actions import NormStats
from vla0_trl.config import VLAConfig
from vla0_trl.evaluation.episode_log import read_episodes
from vla0_trl.manifest import damage
from vla0_trl.models.nano import NanoConfig, build_nano
from vla0_trl.run_folder import checkpoints

pytestmark = pytest.mark.slow
TRIALS = range(int(os.environ.get("RACE_TRIALS", 1)))
FORK = multiprocessing.get_context("fork")
NUM_FRAMES = 1133  # of the first 8 human demonstrations


def _run(script: str, flags: list, environment: dict[str, str], delay: float, start, log: Path) -> None:
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.chdir(REPOSITORY)
        os.environ |= environment
        sys.argv = [script, *map(str, flags)]
        start.wait()
        if delay:
            FORK.Event().wait(delay)
        code = 0
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
            print(end.code if isinstance(end.code, str) else "", file=sys.stderr)
        except BaseException:  # whatever it is, it must not run on in the forked copy of pytest
            traceback.print_exc()
            code = 70
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def race(folder: Path, *commands: tuple[str, list, dict], delay: float = 0.0) -> list[tuple[int, str]]:
    """Run commands at the same time, or all but the first a little later; exit status and output of each."""
    start = FORK.Barrier(len(commands))
    logs = [folder / f"log{number}" for number in range(len(commands))]
    racers = [
        FORK.Process(target=_run, args=(*command, delay * (number > 0), start, log))
        for number, (command, log) in enumerate(zip(commands, logs, strict=True))
    ]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(timeout=180)
        assert racer.exitcode is not None, "a command hangs"
    outcome = [(racer.exitcode, log.read_text()) for racer, log in zip(racers, logs, strict=True)]
    for log in logs:
        log.unlink()
    for code, text in outcome:
        assert "Traceback" not in text and (code == 0 or "is at work in" in text or "belongs to another" in text), text
    return outcome


def convert(output_dir: Path, *flags) -> tuple[str, list, dict]:
    source = ["--source", shared_path(PUSHT_ZARR), "--episodes", "0:8", "--output_dir", output_dir]
    return "data_prep/convert_pusht_zarr.py", [*source, *flags], {}


def rows(dataset: Path) -> int:
    return sum(pq.read_metadata(path).num_rows for path in dataset.glob("data/*.parquet"))


@pytest.mark.parametrize("trial", TRIALS)
def test_conversion_against_conversion(tmp_path, trial):
    out = tmp_path / "out"
    outcome = race(tmp_path, convert(out), convert(out), delay=0.05 * trial)
    assert 0 in [code for code, _ in outcome]
    assert rows(out) == NUM_FRAMES and damage(out) is None
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("trial", TRIALS)
def test_conversion_against_overwrite(tmp_path, trial):
    out = tmp_path / "out"
    outcome = race(tmp_path, convert(out), convert(out, "--num_bins", "255", "--overwrite"), delay=0.05 * trial)
    assert rows(out) == NUM_FRAMES and damage(out) is None
    last = 255 if outcome[1][0] == 0 else 511
    assert VLAConfig.from_pretrained(out).num_bins == last
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "nano"
    stats = NormStats([-60.0] * 2, [60.0] * 2, [-60.0] * 2, [60.0] * 2, [0.0] * 2, [1.0] * 2, 9)
    config = VLAConfig(
        action_dim=2, state_dim=2, chunk_size=2, image_size=48, num_bins=99, action_stats=stats, state_stats=stats
    )
    for part in (*build_nano(NanoConfig(**TINY)), config):
        part.save_pretrained(folder)
    return folder


def evaluate(checkpoint: Path, output_dir: Path, environment: dict | None = None, *flags) -> tuple[str, list, dict]:
    flags = ["--model_name_or_path", checkpoint, "--output_dir", output_dir, "--device", "cpu", *flags]
    flags += ["--max_steps", "4", "--num_episodes", "8", "--num_envs", "2", "--num_videos", "0"]
    return "eval/eval_pusht.py", flags, environment or {}


@pytest.mark.parametrize("trial", TRIALS)
def test_evaluation_against_sharded_evaluation(tmp_path, checkpoint, trial):
    out = tmp_path / "out"
    launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shards = [evaluate(checkpoint, out, launch | {"RANK": str(rank)}) for rank in range(2)]
    single = evaluate(checkpoint, out)
    commands = [single, *shards] if trial % 2 else [*shards, single]
    outcome = race(tmp_path, *commands, delay=0.02 * trial)
    seen = read_episodes(out)
    assert any("results, episodes and videos" in text for _, text in outcome) == (len(seen) == 8)
    [(code, text)] = race(tmp_path, single)
    assert code == 0 and "results, episodes and videos" in text
    assert [row["seed"] for row in read_episodes(out)] == [100000 + i for i in range(8)]
    kept = {row["seed"]: row["seconds"] for row in read_episodes(out)}
    assert all(kept[row["seed"]] == row["seconds"] for row in seen), "a finished episode was run again"
    assert json.loads((out / "results.json").read_text())["num_episodes"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def train(dataset: str, output_dir: Path, learning_rate: float) -> tuple[str, list, dict]:
    flags = {
        "--config": "recipes/pusht/nano.yaml", "--dataset_name": dataset, "--output_dir": output_dir,
        "--nano": json.dumps(TINY), "--image_size": 48, "--chunk_size": 4, "--n_action_steps": 2,
        "--num_eval_episodes": 0, "--eval_strategy": "no", "--logging_steps": 1, "--save_steps": 2, "--max_steps": 4,
        "--report_to": "none",
        "--bf16": "false", "--learning_rate": learning_rate, "--per_device_train_batch_size": 4,
    }  # fmt: skip
    return "recipes/sft_pusht.py", sum(flags.items(), ()), {}


@pytest.fixture(scope="module")
def reference(dot_dataset, tmp_path_factory) -> dict[float, list[float]]:
    """The losses of undisturbed runs."""
    found = {}
    for rate in (1e-2, 1e-3):
        folder = tmp_path_factory.mktemp("reference")
        [(code, text)] = race(folder, train(dot_dataset, folder / "run", rate))
        assert code == 0, text
        found[rate] = losses(folder / "run")
    return found


@pytest.mark.parametrize("trial", TRIALS)
def test_training_against_training(tmp_path, dot_dataset, reference, trial):
    out = tmp_path / "out"
    rates = (1e-2, 1e-2 if trial % 2 else 1e-3)
    outcome = race(tmp_path, *(train(dot_dataset, out, rate) for rate in rates), delay=0.1 * trial)
    winners = [rate for rate, (code, _) in zip(rates, outcome, strict=True) if code == 0]
    assert winners and losses(out) == reference[winners[0]]
    assert [damage(path) for path in (out, *checkpoints(out))] == [None] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
