"""LIBERO from nothing to a table, in the real simulator: record, convert, train, evaluate, with two workers."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from support.backbones import TINY
from support.general import REPOSITORY, check_user_error, libero_assets, load_script

from vla0_trl.config import VLAConfig
from vla0_trl.data.chat_dataset import load_chat_dataset
from vla0_trl.envs.libero.env import LiberoEnv
from vla0_trl.envs.libero.protocol import LiberoEpisode, select_episodes
from vla0_trl.evaluation.episode_log import read_episodes
from vla0_trl.evaluation.report.summary import load_runs, suite_table, tasks

pytestmark = pytest.mark.slow  # LIBERO's simulator in workers

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
LAUNCH = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--mixed_precision", "no"]


@pytest.fixture(scope="module")
def assets() -> str:
    return libero_assets()


def run(*arguments) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=REPOSITORY, env=ENV, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def dataset(assets, tmp_path_factory) -> Path:
    """Two demonstrations of one task, as the README records them."""
    folder = tmp_path_factory.mktemp("libero") / "data"
    what = ["--suite", "libero_object", "--task_ids", 0, "--episodes_per_task", 2, "--assets_dir", assets]
    out = run("data_prep/record_libero.py", *what, "--output_dir", folder)
    assert "2 episodes kept, 0 rejected" in out and "recipes/sft_libero.py" in out
    return folder


@pytest.fixture(scope="module")
def checkpoint(dataset, tmp_path_factory) -> str:
    """The nano backbone after 30 steps on them."""
    folder = tmp_path_factory.mktemp("libero") / "run"
    small = ["--nano", json.dumps(TINY), "--image_size", 48, "--per_device_train_batch_size", 4, "--max_steps", 30]
    recipe = ["recipes/sft_libero.py", "--config", "recipes/libero/debug.yaml", "--dataset_name", dataset]
    run(*LAUNCH, *recipe, "--output_dir", folder, *small)
    return str(folder)


@pytest.fixture
def evaluate(monkeypatch, assets, checkpoint, tmp_path):
    """Runs main() with flags on top of short defaults; gives the output folder."""
    script = load_script("eval/eval_libero.py")

    def call(*flags) -> Path:
        defaults = {"model_name_or_path": checkpoint, "suites": "libero_object", "task_ids": "0"}
        defaults |= {"num_episodes_per_task": 2, "num_envs": 2, "max_steps": 16, "num_videos": 0}
        defaults |= {"assets_dir": assets, "output_dir": tmp_path / "out"}
        words = [word for name, value in defaults.items() for word in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", ["eval/eval_libero.py", *words, *map(str, flags)])
        script.main()
        return tmp_path / "out"

    return call


def test_recorded_demonstrations_succeed_open_loop_in_the_evaluators_environment(dataset, assets):
    rows, config = load_chat_dataset(str(dataset))
    assert (config.cameras, config.state_dim, config.gripper, config.fps) == (["image", "image2"], 8, "sign", 20)
    rows = rows.with_format("numpy")
    first_actions = np.stack(rows["raw_action"][:])[:, :7]
    episode_index = np.asarray(rows["episode_index"][:])
    tokenizer = config.action_tokenizer()
    env = LiberoEnv("libero_object", 0, assets_dir=assets)
    try:
        for episode in (0, 1):
            frames = np.flatnonzero(episode_index == episode)
            env.reset(episode)
            seen = env.observe()
            np.testing.assert_array_equal(seen["state"], rows[int(frames[0])]["raw_state"])
            for camera, stored in zip(config.cameras, rows[int(frames[0])]["images"], strict=True):
                np.testing.assert_array_equal(seen["images"][camera], stored)
            # as a policy would say them: in bins, and with the gripper's sign
            texts = [rows[int(frame)]["action"] for frame in frames]
            spoken = np.stack([tokenizer.decode(str(text))[0] for text in texts])
            np.testing.assert_allclose(spoken, first_actions[frames], atol=1 / config.num_bins + 1e-6)
            any(env.step(action) for action in config.postprocess_actions(spoken))  # up to the one that ends it
            assert env.success and env.steps > 0.9 * len(frames)
    finally:
        env.close()


def test_an_evaluation_leaves_episodes_table_video_and_report(evaluate, checkpoint, capsys):
    folder = evaluate("--num_videos", 1)
    rows = read_episodes(folder)
    assert [(row["suite"], row["task_id"], row["seed"], row["init_state"]) for row in rows] == [
        ("libero_object", 0, 0, 0),
        ("libero_object", 0, 1, 1),
    ]
    assert {row["steps"] for row in rows} == {16} and {row["model_calls"] for row in rows} == {2}
    assert rows[0]["task"] == "pick up the alphabet soup and place it in the basket"
    assert [path.name for path in (folder / "videos").iterdir()] == ["episode_libero_object_0_0_failure.mp4"]
    results = json.loads((folder / "results.json").read_text())
    assert results["suites"]["libero_object"]["num_episodes"] == 2 and results["average_success_rate"] == 0
    assert {"mujoco", "robosuite", "hf-libero", "torch"} <= results["versions"].keys()
    assert results["protocol"]["max_steps"] == 16 and results["checkpoint"] == checkpoint
    printed = capsys.readouterr().out
    assert "Object" in printed and "Avg" in printed and "environment-bound" in printed and "mujoco 3." in printed
    page = (folder / "report.html").read_text()
    assert "data:video/mp4;base64," in page and "initial state 0, failure" in page


def test_the_same_command_runs_only_what_is_missing(evaluate, monkeypatch):
    folder = evaluate("--num_episodes_per_task", 1)
    first = (folder / "episodes.jsonl").read_bytes()
    evaluate()
    both = (folder / "episodes.jsonl").read_bytes()
    assert both.startswith(first) and both.count(b"\n") == 2
    monkeypatch.delattr("vla0_trl.policy.policy.VLAPolicy.from_pretrained")  # loading the model would raise
    evaluate()
    assert (folder / "episodes.jsonl").read_bytes() == both


def test_processes_of_a_launcher_share_the_episodes_and_go_on_after_a_kill(evaluate, checkpoint, assets, tmp_path):
    """As --help says; killed with its launcher, and started again with another number of processes."""
    folder = tmp_path / "out"
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", "accelerate_configs/multi_gpu.yaml", "--main_process_port", "0", "--num_processes"]
    flags = ["eval/eval_libero.py", "--model_name_or_path", checkpoint, "--suites", "libero_object", "--task_ids", "0"]
    flags += ["--num_episodes_per_task", "6", "--num_envs", "1", "--num_videos", "0", "--max_steps", "16"]
    flags += ["--assets_dir", assets, "--output_dir", str(folder)]
    with subprocess.Popen([*command, "2", *flags], cwd=REPOSITORY, env=ENV, start_new_session=True) as launcher:
        while sum(b"\n" in path.read_bytes() for path in folder.glob("episodes-*-[01].jsonl")) < 2:
            assert launcher.poll() is None
            time.sleep(0.01)
        children = psutil.Process(launcher.pid).children(recursive=True)
        for process in (launcher, *children):
            process.kill()
        psutil.wait_procs(children)
    shards = sorted(folder.glob("episodes-*.jsonl"))
    kept = [path.read_text().splitlines() for path in shards]
    assert [{json.loads(line)["seed"] % 2 for line in lines} for lines in kept] == [{0}, {1}]
    assert sum(map(len, kept)) < 6 and not (folder / "results.json").exists()

    run(*command[1:], "2", *flags)
    assert sorted(path.name for path in folder.iterdir()) == ["episodes.jsonl", "report.html", "results.json"]
    lines = (folder / "episodes.jsonl").read_text().splitlines()
    assert [json.loads(line)["seed"] for line in lines] == list(range(6))
    assert {line for part in kept for line in part} <= set(lines)  # not run again
    assert json.loads((folder / "results.json").read_text())["num_episodes"] == 6
    evaluate("--num_episodes_per_task", 6)  # one process finds all of it
    assert (folder / "episodes.jsonl").read_text().splitlines() == lines


def test_ensembling_and_perturbations_stand_beside_the_clean_result(evaluate):
    flags = ["--num_episodes_per_task", 1, "--num_envs", 1, "--max_steps", 4]
    folder = evaluate("--ensemble_size", 8, "--perturb", "no_task", "--perturb", "noise:2", *flags)
    runs = load_runs([folder, folder / "perturbed" / "no_task", folder / "perturbed" / "noise_2"])
    assert [run.episodes[0]["model_calls"] for run in runs] == [4, 4, 4]
    assert [run.episodes[0]["task"] for run in runs][1] == "."
    assert [run.results["protocol"]["perturbation"] for run in runs] == [None, "no_task", "noise:2"]
    header, rows = suite_table(runs)
    assert header == ["run", "episodes", "Object", "Avg"] and [row[0] for row in rows] == ["out", "no_task", "noise_2"]
    assert list(tasks(runs)) == ["libero_object 0: pick up the alphabet soup and place it in the basket"]
    page = (folder / "report.html").read_text()
    assert "no_task" in page and "noise_2" in page


def test_the_speed_of_workers_is_printed_and_nothing_is_written(evaluate, capsys, tmp_path):
    assert not evaluate("--benchmark_envs").exists()
    assert "1 environment: " in (printed := capsys.readouterr().out) and " times that" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--suites", "libero_long"], "--suites libero_long: LIBERO has libero_spatial, "),
        (["--task_ids", "10"], "libero_object has tasks 0 to 9"),
        (["--task_ids", "a"], "libero_object has tasks 0 to 9"),
        (["--num_episodes_per_task", "51"], "a task has 50 initial states"),
        (["--perturb", "fog"], "--perturb fog: there is rotate"),
        (["--assets_dir", "/tmp"], "is not LIBERO's assets folder"),
        (["--n_action_steps", "9"], "n_action_steps=9 is more than chunk_size=8"),
        (["--ensemble_size", "8", "--n_action_steps", "8"], "leave n_action_steps out"),
        (["--num_envs", "0"], "--num_envs 0 must be at least 1"),
    ],
)
def test_a_user_error_is_one_line_and_leaves_nothing(evaluate, tmp_path, capsys, flags, message):
    check_user_error(lambda: evaluate(*flags), message, capsys, tmp_path)


def test_a_checkpoint_of_another_robot_is_refused(evaluate, checkpoint, tmp_path, capsys):
    config = VLAConfig.from_pretrained(checkpoint)
    other = tmp_path / "other"
    other.mkdir()
    for path in Path(checkpoint).iterdir():
        if path.is_file():
            (other / path.name).write_bytes(path.read_bytes())
    config.replace(cameras=["front"]).save_pretrained(other)
    with pytest.raises(SystemExit):
        evaluate("--model_name_or_path", other)
    assert "is not for LIBERO: it has cameras ['front']" in capsys.readouterr().err


def test_episodes_are_chosen_task_by_task():
    assert len(select_episodes("libero_spatial,libero_10", None, 50)) == 1000
    assert select_episodes("libero_90,libero_90", "89,3,3", 1) == [
        LiberoEpisode("libero_90", 89, 0),
        LiberoEpisode("libero_90", 3, 0),
    ]
