"""The real LeRobot, in an environment of its own, records and drives a fake SO-100: tests/support/fake_so100.

lerobot-record → convert_lerobot.py → training → serve.py → lerobot-rollout with the plugin, as the README says.
"""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from support.arm_server import HIGH, LOW, STEP
from support.backbones import TINY
from support.general import REPOSITORY, load_script
from support.runs import free_port, run, run_main

from vla0_trl.data.chat_dataset import load_chat_dataset

pytestmark = pytest.mark.slow  # several processes, and an environment of its own

FAKE = REPOSITORY / "tests" / "support" / "fake_so100"
TASK = "put the gripper above the block"
FPS = 30


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """LeRobot's processes find the fake arm, and the plugin as pip installs it."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(REPOSITORY / "eval" / "lerobot_plugin", folder / "eval" / "lerobot_plugin")
    shutil.copytree(REPOSITORY / "vla0_trl" / "serving", folder / "vla0_trl" / "serving")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run(
        [*install, "--target", folder / "site", folder / "eval" / "lerobot_plugin"], check=True, timeout=300
    )
    return os.environ | {
        "PYTHONPATH": f"{FAKE}:{folder / 'site'}",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "OMP_NUM_THREADS": "1",
    }


@contextmanager
def server(*words: object) -> Iterator[subprocess.Popen]:
    """A server of ours, which says in a line that it listens."""
    paths = {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | paths)
    try:
        assert any(re.match(r"serving on|\d+$", line) for line in process.stdout), process.wait()
        yield process
    finally:
        process.kill()
        process.wait()


class Rollout:
    """lerobot-rollout in a terminal of its own: its targets, its key, and what the plugin says in the end."""

    def __init__(self, python: str, environment: dict, url: str, folder: Path, seconds: float, *options: str):
        self.log = folder / "targets.jsonl"
        self.terminal, inside = pty.openpty()
        command = [
            python, "-m", "lerobot.scripts.lerobot_rollout", "--strategy.type=base", "--policy.type=vla0",
            f"--policy.url={url}", "--robot.type=fake_so100", f"--robot.log={self.log}", f"--task={TASK}",
            f"--fps={FPS}", f"--duration={seconds}", "--return_to_initial_position=false", *options,
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command, stdin=inside, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        os.close(inside)

    def targets(self) -> np.ndarray:
        """(ticks so far, 6)."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return np.array([json.loads(line)["target"] for line in lines]).reshape(-1, 6)

    def wait_for(self, ticks: int) -> None:
        while len(self.targets()) < ticks:
            assert self.process.poll() is None, self.process.stdout.read()
            time.sleep(0.1)

    def press(self, key: str) -> None:
        os.write(self.terminal, key.encode())

    def end(self) -> dict[str, int]:
        output = self.process.communicate(timeout=120)[0]
        os.close(self.terminal)
        assert self.process.returncode == 0, output
        words = (
            r"vla0: (\d+) ticks, .* (\d+) empty before the first action, (\d+) after; .* p50 (\d+), .* lost (\d+) time"
        )
        names = ("ticks", "empty before", "empty", "latency_ms", "lost")
        return dict(zip(names, map(int, re.findall(words, output)[-1]), strict=True))


def test_no_tick_is_empty_and_no_action_is_executed_twice_or_late(lerobot_python, environment, tmp_path):
    """Also over the death of the server: the arm holds, and goes on from there when another one has come."""
    port = free_port()
    command = [REPOSITORY / "tests" / "support" / "arm_server.py", port, "ramp"]
    with server(*command) as first:
        # An arm that is where it shall be after each tick: then the next action is STEP from the last target.
        rollout = Rollout(
            lerobot_python,
            environment,
            f"ws://127.0.0.1:{port}",
            tmp_path,
            30,
            "--robot.speed=1",
            "--policy.timeout_s=5",
        )
        rollout.wait_for(5 * FPS)
        first.send_signal(signal.SIGKILL)
        killed = len(rollout.targets())
    time.sleep(2)
    with server(*command):
        figures = rollout.end()
    targets = rollout.targets()
    steps = np.diff(targets[:, 0])
    moved = np.abs(steps - STEP) < 1e-4
    assert (moved | (steps == 0)).all() and (targets[:, 1:] == targets[0, 1:]).all()
    began = int(np.argmax(moved))
    assert moved[began : killed - 1].all(), "an empty tick after the start"
    held = np.flatnonzero(~moved[began:]) + began
    assert len(held) >= 2 * FPS and (np.diff(held) == 1).all(), "it held more than once"
    assert moved[-3 * FPS :].all() and figures["lost"] == 1
    assert figures["ticks"] == len(targets) and figures["empty"] == len(held) and figures["latency_ms"] >= 200


def test_a_wild_policy_moves_the_arm_within_limits_and_the_stop_key_ends_that(lerobot_python, environment, tmp_path):
    port = free_port()
    with server(REPOSITORY / "tests" / "support" / "arm_server.py", port, "wild"):
        rollout = Rollout(
            lerobot_python, environment, f"ws://127.0.0.1:{port}", tmp_path, 12, "--policy.max_step=7.5",
            "--policy.margin=0.1",
        )  # fmt: skip
        rollout.wait_for(5 * FPS)
        rollout.press("x")
        rollout.wait_for(6 * FPS)
        rollout.press(" ")
        pressed = len(rollout.targets())
        rollout.end()
    targets = rollout.targets()
    room = 0.1 * (HIGH - LOW)
    jumps = np.abs(np.diff(targets, axis=0))
    assert targets.max() <= HIGH + room + 1e-4 and targets.min() >= LOW - room - 1e-4
    assert jumps.max() == pytest.approx(7.5, abs=1e-4)
    assert jumps[: pressed - 2].any(axis=1).sum() > 3 * FPS
    assert len(targets) > pressed + FPS and (targets[pressed + 3 :] == targets[-1]).all()


@pytest.mark.parametrize("units", ["degrees", "normalized"])
def test_from_a_recording_to_a_driven_arm(lerobot_python, environment, tmp_path, monkeypatch, capsys, units):
    use_degrees = f"use_degrees={'true' if units == 'degrees' else 'false'}"
    recording, dataset, trained = tmp_path / "recording", tmp_path / "data", tmp_path / "run"
    record = [
        lerobot_python, "-m", "lerobot.scripts.lerobot_record", "--robot.type=fake_so100", f"--robot.{use_degrees}",
        "--teleop.type=fake_leader", f"--teleop.{use_degrees}", "--dataset.repo_id=me/arm", "--dataset.no_stamp=true",
        f"--dataset.root={recording}", f"--dataset.single_task={TASK}", "--dataset.num_episodes=2",
        "--dataset.episode_time_s=2.5", "--dataset.reset_time_s=0", "--dataset.push_to_hub=false",
        "--play_sounds=false",
    ]  # fmt: skip
    subprocess.run(record, check=True, env=environment, timeout=300, capture_output=True)

    convert = load_script("data_prep/convert_lerobot.py")
    words = ["--source", recording, "--output_dir", dataset, "--chunk_size", "30"]
    if units == "degrees":
        with pytest.raises(SystemExit, match="reaches 110, which no joint in normalized does: see --units"):
            run_main(convert, monkeypatch, *words, "--units", "normalized")
    run_main(convert, monkeypatch, *words, "--units", units, "--overwrite")
    assert "recipes/sft_so100.py" in capsys.readouterr().out
    config = load_chat_dataset(dataset)[1]
    assert (config.units, config.robot, config.fps, config.cameras) == (units, "so100_follower", 30, ["front"])
    lift, roll = [config.action_stats.min[1], config.action_stats.max[4]]
    assert (lift, roll) == pytest.approx((-104, 110) if units == "degrees" else (-104 / 1.05, 110 / 1.6), abs=1e-3)

    data = {"chunk_size": 30, "n_action_steps": 30, "waypoints": [0, 10, 20, 29], "image_size": 48}
    run(str(dataset), trained, data=data, max_steps=4, nano=TINY)
    port = free_port()
    with server("eval/serve.py", "--model_name_or_path", trained, "--layout", "so100", "--port", port):
        url = f"ws://127.0.0.1:{port}"
        refused = Rollout(
            lerobot_python,
            environment,
            url,
            tmp_path,
            5,
            f"--policy.units={'normalized' if units == 'degrees' else 'degrees'}",
        )
        output = refused.process.communicate(timeout=120)[0]
        assert refused.process.returncode and f"but the policy's joints are in {units}" in output
        rollout = Rollout(
            lerobot_python, environment, url, tmp_path, 8, f"--policy.units={units}", f"--robot.{use_degrees}"
        )
        figures = rollout.end()
    assert figures["ticks"] > 5 * FPS and figures["empty"] == 0 and figures["lost"] == 0
    low, high = np.array(config.action_stats.min), np.array(config.action_stats.max)
    targets, room = rollout.targets(), 0.05 * (high - low) + 1e-3
    assert (targets >= low - room).all() and (targets <= high + room).all()
