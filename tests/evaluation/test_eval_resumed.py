"""eval/eval_pusht.py stopped, continued and shared: no episode is lost, run twice or counted wrongly."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
from support.general import REPOSITORY
from support.pusht_evaluation import flags_of, results_of, rows_of, save_checkpoint

from vla0_trl.envs.pusht.env import PushTEnv
from vla0_trl.evaluation.report.summary import load_runs
from vla0_trl.policy.policy import VLAPolicy


@pytest.mark.slow
def test_killed_and_continued_gives_the_same_episodes_once(evaluate, checkpoint, tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    more = ["--num_episodes", "24", "--max_steps", "20", "--num_videos", "1"]
    command = [sys.executable, "eval/eval_pusht.py", *flags_of(checkpoint, killed), *more, "--num_envs", "2"]
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
    assert [row["seed"] for row in rows_of(whole)] == list(range(100000, 100024))
    assert rows_of(killed) == rows_of(whole)
    assert results_of(killed) == results_of(whole)


@pytest.mark.slow
def test_processes_of_a_launcher_share_the_episodes(evaluate, checkpoint, tmp_path):
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    command += ["--config_file", "accelerate_configs/multi_gpu.yaml", "eval/eval_pusht.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for _ in range(2):  # the second finds nothing to do
        done = subprocess.run(
            [*command, *flags_of(checkpoint, shared)], cwd=REPOSITORY, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert str(shared) in done.stdout
        assert sorted(path.name for path in shared.iterdir()) == ["episodes.jsonl", "results.json"]
    evaluate("--output_dir", str(alone))
    assert rows_of(shared) == rows_of(alone)
    assert results_of(shared) == results_of(alone)


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
    assert [row["seed"] for row in rows_of(evaluate())] == [100000, 100001, 100002, 100003]


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
    first = rows_of(evaluate("--num_episodes", "2"))
    folder = evaluate("--num_episodes", "3", "--num_envs", "1")
    assert rows_of(folder)[:2] == first
    assert results_of(folder)["num_episodes"] == 3


def test_an_evaluation_counts_what_was_asked(evaluate, capsys):
    folder = evaluate("--num_episodes", "3")
    evaluate("--num_episodes", "2")
    results = results_of(folder)
    assert (results["num_episodes"], results["seeds"]) == (2, {"": [100000, 100001]})
    assert [episode["seed"] for episode in load_runs([folder])[0].episodes] == [100000, 100001]
    assert len(rows_of(folder)) == 3, "what was run stays"
    capsys.readouterr()
    with pytest.raises(SystemExit):
        evaluate("--seed", "100001", "--num_episodes", "2")
    assert "belongs to another run (seed: 100000 there, 100001 here)" in capsys.readouterr().err


def test_results_are_made_again_if_a_kill_came_just_before(evaluate):
    folder = evaluate("--num_episodes", "2")
    results = results_of(folder)
    (folder / "results.json").unlink()
    assert results_of(evaluate("--num_episodes", "2")) == results


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
    assert [row["seed"] for row in rows_of(evaluate())] == [100000, 100001, 100002, 100003]


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
    assert [row["seed"] for row in rows_of(folder)] == [100000, 100001, 100002, 100003]


def test_the_folder_of_another_checkpoint_is_refused_until_overwritten(evaluate, tmp_path, capsys):
    before = (evaluate("--num_episodes", "1") / "episodes.jsonl").read_bytes()
    other = save_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(SystemExit) as exit_info:
        evaluate("--model_name_or_path", other)
    assert exit_info.value.code == 2
    assert "belongs to another run (checkpoint: " in capsys.readouterr().err
    assert (tmp_path / "out" / "episodes.jsonl").read_bytes() == before
    folder = evaluate("--model_name_or_path", other, "--num_episodes", "1", "--overwrite")
    assert [row["checkpoint"] for row in rows_of(folder)] == [other]
