"""Small policies of LeRobot's own classes, saved by LeRobot, measured by our PushT evaluator."""

import json
import os
import subprocess
import sys

import pytest
from support.general import REPOSITORY

pytestmark = pytest.mark.slow  # several processes, and an environment of its own


@pytest.fixture(scope="module")
def checkpoints(lerobot_python, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lerobot")
    script = REPOSITORY / "tests" / "support" / "lerobot_checkpoints.py"
    subprocess.run([lerobot_python, script, folder], check=True, env=os.environ | {"PYTHONPATH": ""}, timeout=300)
    return folder


@pytest.mark.parametrize("name, steps", [("act", 5), ("diffusion", 4)])
def test_a_policy_of_lerobot_is_evaluated(lerobot_python, checkpoints, tmp_path, name, steps):
    script = REPOSITORY / "eval" / "baselines" / "serve_lerobot.py"
    words = [lerobot_python, str(script), "--policy_path", str(checkpoints / name), "--port", "0", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": "", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            line = next(line for line in server.stdout if line.startswith("serving"))
            url = line.split(" on ")[1].split(";")[0]
            evaluation = [
                sys.executable,
                "eval/eval_pusht.py",
                "--policy",
                url,
                "--num_episodes",
                "2",
                "--num_envs",
                "2",
            ]
            evaluation += ["--max_steps", "20", "--num_videos", "0", "--output_dir", str(tmp_path / "out")]
            done = subprocess.run(
                evaluation,
                cwd=REPOSITORY,
                env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
                capture_output=True,
                text=True,
                timeout=300,
            )
        finally:
            server.terminate()
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["checkpoint"] == url and len(results["checkpoint_hash"]) == 64
    assert (
        results["num_episodes"] == 2
        and results["protocol"]["n_action_steps"] == steps
        and results["decoding"] == "remote"
    )
    episodes = [json.loads(line) for line in (tmp_path / "out" / "episodes.jsonl").read_text().splitlines()]
    assert [episode["model_calls"] for episode in episodes] == [20 // steps] * 2
