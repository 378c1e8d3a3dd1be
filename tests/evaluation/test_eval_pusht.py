"""eval/eval_pusht.py with a real nano checkpoint in the real simulator."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from support.backbones import TINY
from support.general import REPOSITORY, check_user_error, load_script

from vla0_trl.actions import NormStats
from vla0_trl.command_line import parse
from vla0_trl.config import VLAConfig
from vla0_trl.envs.pusht.env import PushTEnv
from vla0_trl.evaluation.arguments import EvaluationArguments, LiberoArguments
from vla0_trl.evaluation.driver import execution_config, execution_protocol
from vla0_trl.evaluation.report.summary import load_runs
from vla0_trl.internals import FallbackWarning
from vla0_trl.models.nano import NanoConfig, build_nano
from vla0_trl.policy.policy import VLAPolicy
from vla0_trl.policy.speculative.tree_forward import TreeForward

TIMES = {"seconds", "model_seconds", "seconds_per_episode", "ms_per_chunk", "environment_seconds"}
RUN_BY = {"command", "git_commit"}


def _save_checkpoint(folder: Path, seed: int, **changes) -> str:
    def stats(low: float, high: float, dim: int) -> NormStats:
        return NormStats([low] * dim, [high] * dim, [low] * dim, [high] * dim, [0.0] * dim, [1.0] * dim, 9)

    fields = {"action_dim": 2, "state_dim": 2, "chunk_size": 2, "image_size": 48, "num_bins": 99}
    fields |= {"use_state": True, "relative_actions": True} | changes
    config = VLAConfig(action_stats=stats(-60, 60, 2), state_stats=stats(0, 512, fields["state_dim"]), **fields)
    model, processor = build_nano(NanoConfig(**TINY), seed=seed)
    for part in (model, processor, config):
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return _save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "nano", seed=0)


@pytest.fixture
def evaluate(monkeypatch, checkpoint, tmp_path):
    """Runs main() with flags on top of short defaults; gives the output folder."""
    script = load_script("eval/eval_pusht.py")

    def run(*flags: str) -> Path:
        monkeypatch.setattr(sys, "argv", ["eval/eval_pusht.py", *_flags(checkpoint, tmp_path / "out"), *flags])
        script.main()
        return tmp_path / "out"

    run.script = script
    return run


def _flags(checkpoint: str, output_dir: Path) -> list[str]:
    flags = ["--model_name_or_path", checkpoint, "--output_dir", str(output_dir), "--max_steps", "6"]
    return [*flags, "--num_episodes", "4", "--num_envs", "4", "--num_videos", "0"]


def _read(text: str) -> dict:
    # of the same polygons, GEOS's intersection area differs in its last bit with the heap's layout: coverage does, too
    return json.loads(text, parse_float=lambda number: round(float(number), 9))


def _rows(folder: Path) -> list[dict]:
    rows = [_read(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]
    return [_without(row, TIMES) for row in sorted(rows, key=lambda row: row["seed"])]


def _without(data: dict, keys: set[str]) -> dict:
    return {key: value for key, value in data.items() if key not in keys}


def _results(folder: Path) -> dict:
    return _without(_read((folder / "results.json").read_text()), TIMES | RUN_BY)


def test_an_evaluation_leaves_episodes_results_and_videos(evaluate, checkpoint, capsys):
    folder = evaluate("--num_videos", "1")
    rows = _rows(folder)
    assert [row["seed"] for row in rows] == [100000, 100001, 100002, 100003]
    assert [(row["steps"], row["model_calls"]) for row in rows] == [(6, 3)] * 4
    assert {row["checkpoint"] for row in rows} == {checkpoint}
    assert [path.name for path in (folder / "videos").iterdir()] == ["episode_100000_failure.mp4"]
    results = _results(folder)
    assert results["num_episodes"] == 4 and results["successes"] == 0
    assert results["protocol"] == {
        "env": "gym_pusht/PushT-v0",
        "state": "agent",
        "simulator": ", ".join(f"{name} {version(name)}" for name in ("gym-pusht", "pymunk", "shapely")),
        "seed": 100000,
        "max_steps": 6,
        "success_coverage": 0.95,
        "n_action_steps": 2,
        "ensemble_size": 1,
        "ensemble_decay": None,
        "dtype": "float32",
    }
    assert results["versions"].keys() == {"python", "torch", "transformers", "gym-pusht", "pymunk", "numpy"}
    table = capsys.readouterr().out
    assert "success %" in table and "0.0 – 49.0" in table and str(folder) in table


def test_with_a_broken_decoder_an_evaluation_finishes_and_says_so(evaluate, monkeypatch, tmp_path):
    right = _rows(evaluate("--num_videos", "0"))
    assert [row["decoding"] for row in right] == ["fast"] * 4 and _results(tmp_path / "out")["decoding"] == "fast"
    monkeypatch.setattr(TreeForward, "step", lambda self, tokens: np.zeros((*tokens.shape[:2], len(self.token_ids))))
    with pytest.warns(FallbackWarning, match="fast decoding of SmolVLMForConditionalGeneration does not work with"):
        evaluate("--output_dir", str(tmp_path / "stock"))
    assert _results(folder := tmp_path / "stock")["decoding"] == "stock"
    assert _rows(folder) == [row | {"decoding": "stock"} for row in right]


def test_parallel_decoding_is_another_protocol(evaluate, tmp_path, capsys):
    exact, stock = tmp_path / "exact", tmp_path / "stock"
    evaluate("--output_dir", str(exact))
    evaluate("--output_dir", str(stock), "--decoding", "stock")
    assert _results(stock) == _results(exact) | {"decoding": "stock"}
    folder = evaluate("--decoding", "parallel", "--refine", "1")
    assert {row["decoding"] for row in _rows(folder)} == {"parallel"} and _results(folder)["decoding"] == "parallel"
    assert _results(folder)["protocol"] == _results(exact)["protocol"] | {"decoding": "parallel", "refine": 1}
    with pytest.raises(SystemExit):
        evaluate("--num_episodes", "5")
    assert "belongs to another run (decoding: parallel" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_and_continued_gives_the_same_episodes_once(evaluate, checkpoint, tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    more = ["--num_episodes", "24", "--max_steps", "20", "--num_videos", "1"]
    command = [sys.executable, "eval/eval_pusht.py", *_flags(checkpoint, killed), *more, "--num_envs", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE) as process:
        path = killed / "episodes.jsonl"
        while not path.exists() or path.read_bytes().count(b"\n") < 3:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.kill()
    kept = path.read_bytes()
    kept = kept[: kept.rindex(b"\n") + 1]
    assert 3 <= kept.count(b"\n") < 24
    assert not (killed / "results.json").exists()

    evaluate(*more, "--num_envs", "8", "--output_dir", str(killed))
    assert path.read_bytes().startswith(kept)
    evaluate(*more, "--num_envs", "8", "--output_dir", str(whole))
    assert [row["seed"] for row in _rows(whole)] == list(range(100000, 100024))
    assert _rows(killed) == _rows(whole)
    assert _results(killed) == _results(whole)


@pytest.mark.slow
def test_processes_of_a_launcher_share_the_episodes(evaluate, checkpoint, tmp_path):
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    command += ["--config_file", "accelerate_configs/multi_gpu.yaml", "eval/eval_pusht.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for _ in range(2):  # the second finds nothing to do
        done = subprocess.run(
            [*command, *_flags(checkpoint, shared)], cwd=REPOSITORY, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert str(shared) in done.stdout
        assert sorted(path.name for path in shared.iterdir()) == ["episodes.jsonl", "results.json"]
    evaluate("--output_dir", str(alone))
    assert _rows(shared) == _rows(alone)
    assert _results(shared) == _results(alone)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_loses_nothing(number, evaluate, monkeypatch, capsys, tmp_path):
    class Interrupted(PushTEnv):
        def reset(self, seed):
            if seed == 100002:
                signal.raise_signal(number)
            super().reset(seed)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate.script, "PushTEnv", Interrupted)
        with pytest.raises(SystemExit) as exit_info:
            evaluate("--num_envs", "1")
    assert exit_info.value.code == 128 + number
    assert f"stopped: 2 episodes are in {tmp_path / 'out'}; run it again to go on" in capsys.readouterr().err
    assert [row["seed"] for row in _rows(evaluate())] == [100000, 100001, 100002, 100003]


def test_a_finished_evaluation_returns_at_once_even_without_its_videos(evaluate, monkeypatch, capsys):
    folder = evaluate("--num_videos", "2")
    shutil.rmtree(folder / "videos")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    table = capsys.readouterr().out
    monkeypatch.delattr(VLAPolicy, "from_pretrained")  # loading the model would raise
    evaluate("--num_videos", "2")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert capsys.readouterr().out == table


def test_seeds_may_grow(evaluate):
    first = _rows(evaluate("--num_episodes", "2"))
    folder = evaluate("--num_episodes", "3", "--num_envs", "1")
    assert _rows(folder)[:2] == first
    assert _results(folder)["num_episodes"] == 3


def test_an_evaluation_counts_what_was_asked(evaluate, capsys):
    folder = evaluate("--num_episodes", "3")
    evaluate("--num_episodes", "2")
    results = _results(folder)
    assert (results["num_episodes"], results["seeds"]) == (2, {"": [100000, 100001]})
    assert [episode["seed"] for episode in load_runs([folder])[0].episodes] == [100000, 100001]
    assert len(_rows(folder)) == 3, "what was run stays"
    capsys.readouterr()
    with pytest.raises(SystemExit):
        evaluate("--seed", "100001", "--num_episodes", "2")
    assert "belongs to another run (seed: 100000 there, 100001 here)" in capsys.readouterr().err


def test_results_are_made_again_if_a_kill_came_just_before(evaluate):
    folder = evaluate("--num_episodes", "2")
    results = _results(folder)
    (folder / "results.json").unlink()
    assert _results(evaluate("--num_episodes", "2")) == results


def test_ensembling_asks_at_every_step(evaluate, tmp_path):
    folder = evaluate("--num_episodes", "2", "--ensemble_size", "2", "--ensemble_decay", "0.1")
    assert [row["model_calls"] for row in _rows(folder)] == [6, 6]
    protocol = _results(folder)["protocol"]
    assert [protocol[key] for key in ("n_action_steps", "ensemble_size", "ensemble_decay")] == [1, 2, 0.1]


ENSEMBLE = {"ensemble_size": 4, "ensemble_decay": 0.1}


@pytest.mark.parametrize("arguments", [load_script("eval/eval_pusht.py").Arguments, LiberoArguments])
@pytest.mark.parametrize(
    ("saved", "flags", "expected"),
    [
        (ENSEMBLE, "--n_action_steps 8", (8, 1, None, None)),
        (ENSEMBLE, "--n_action_steps 1", (1, 1, None, None)),
        (ENSEMBLE, "", (1, 4, 0.1, None)),
        (ENSEMBLE, "--ensemble_size 2", (1, 2, 0.1, None)),
        (ENSEMBLE, "--ensemble_size 1", (8, 1, None, None)),
        (ENSEMBLE, "--ensemble_weights vla0_v1", (1, 4, None, "vla0_v1")),
        (ENSEMBLE, "--ensemble_decay 0", (1, 4, 0.0, None)),
        ({"n_action_steps": 5}, "--ensemble_size 8", (1, 8, None, None)),
        ({"n_action_steps": 5}, "--ensemble_size 8 --ensemble_weights vla0_v2", (1, 8, None, "vla0_v2")),
        ({"n_action_steps": 5}, "--ensemble_size 1", (5, 1, None, None)),
        (ENSEMBLE, "--n_action_steps 8 --ensemble_size 4", "leave n_action_steps out, or set ensemble_size=1"),
        (ENSEMBLE, "--n_action_steps 8 --ensemble_decay 0.1", "ensemble_size=1 keeps only the newest"),
    ],
)
def test_flags_replace_the_checkpoints_way_to_execute_chunks(arguments, saved, flags, expected):
    args = parse(arguments, "", ["--model_name_or_path", "m", "--output_dir", "o", *flags.split()])
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            execution_config(VLAConfig(**saved), args)
        return
    config = execution_config(VLAConfig(**saved), args)
    names = ("n_action_steps", "ensemble_size", "ensemble_decay", "ensemble_weights")
    assert tuple(getattr(config, name) for name in names) == expected
    protocol = execution_protocol(config)
    assert [protocol.get(name) for name in names] == list(expected)


def test_a_checkpoint_with_the_full_state_gets_it(evaluate, tmp_path):
    full = _save_checkpoint(tmp_path / "full", seed=0, state_dim=5)
    folder = evaluate("--model_name_or_path", full, "--num_episodes", "1")
    assert _results(folder)["protocol"]["state"] == "full"


def test_a_crash_of_the_simulator_is_no_episode(evaluate, monkeypatch):
    class Crashing(PushTEnv):
        def reset(self, seed):
            if seed == 100002:
                raise RuntimeError("physics exploded")
            super().reset(seed)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate.script, "PushTEnv", Crashing)
        with pytest.raises(RuntimeError, match="physics exploded"):
            evaluate("--num_envs", "1")
    assert [row["seed"] for row in _rows(evaluate())] == [100000, 100001, 100002, 100003]


def test_a_full_disk_is_one_clear_error_and_keeps_what_was_there(evaluate, capsys):
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))  # files end in the middle of the third line
    try:
        with pytest.raises(SystemExit) as exit_info:
            evaluate()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert exit_info.value.code == 1
    assert "error: could not write" in capsys.readouterr().err
    folder = evaluate()  # space again
    assert [row["seed"] for row in _rows(folder)] == [100000, 100001, 100002, 100003]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n_action_steps", "3"], "n_action_steps=3 is more than the chunk_size=2"),
        (["--ensemble_size", "3"], "ensemble_size=3 must be between 1 and chunk_size=2"),
        (["--ensemble_size", "2", "--n_action_steps", "2"], "leave n_action_steps out"),
        (["--ensemble_decay", "0.1"], "ensemble_size=1 keeps only the newest"),
        (["--model_name_or_path", "/nowhere"], "no folder '/nowhere'"),
        (["--refine", "1"], "refine=1 with exact decoding"),
        (["--decoding", "parallel", "--refine", "4"], "an answer of 4 numbers has at most 3 rounds"),
        (["--num_envs", "0"], "--num_envs 0 must be at least 1"),
        (["--output_dir", __file__], "File exists"),
    ],
)
def test_a_user_error_is_one_line_and_leaves_nothing(evaluate, tmp_path, capsys, flags, message):
    check_user_error(lambda: evaluate(*flags), message, capsys, tmp_path)


def test_a_checkpoint_of_another_robot_is_refused(evaluate, tmp_path, capsys):
    libero = _save_checkpoint(tmp_path / "libero", seed=0, cameras=["front", "wrist"])
    with pytest.raises(SystemExit):
        evaluate("--model_name_or_path", libero)
    assert "is not for PushT: it has cameras ['front', 'wrist']" in capsys.readouterr().err


def test_the_folder_of_another_checkpoint_is_refused_until_overwritten(evaluate, tmp_path, capsys):
    before = (evaluate("--num_episodes", "1") / "episodes.jsonl").read_bytes()
    other = _save_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(SystemExit) as exit_info:
        evaluate("--model_name_or_path", other)
    assert exit_info.value.code == 2
    assert "belongs to another run (checkpoint: " in capsys.readouterr().err
    assert (tmp_path / "out" / "episodes.jsonl").read_bytes() == before
    folder = evaluate("--model_name_or_path", other, "--num_episodes", "1", "--overwrite")
    assert [row["checkpoint"] for row in _rows(folder)] == [other]


def test_an_evaluation_has_a_folder_of_its_checkpoints_name_by_default():
    assert EvaluationArguments(model_name_or_path="recipes/pusht/checkpoint").output_dir == Path(
        "runs/eval/recipes_pusht_checkpoint"
    )
    assert EvaluationArguments(model_name_or_path="USER/NAME", output_dir=Path("a")).output_dir == Path("a")
