"""openpi-client as it is on the index, in an environment of its own: it needs NumPy below 2."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
from support.backbones import observations
from support.general import REPOSITORY
from support.random_policies import build_policy
from support.serving import served

pytestmark = pytest.mark.slow  # makes an environment; starts processes

PACKAGES = ("openpi-client==0.1.2", "numpy<2", "typing_extensions")  # the last of which it forgets to ask for
ROBOT = REPOSITORY / "tests" / "support" / "openpi_robot.py"


@pytest.fixture(scope="session")
def openpi_python(tmp_path_factory) -> str:
    """The Python of $OPENPI_PYTHON, or of an environment made now; skips the test where the index is out of reach."""
    if given := os.environ.get("OPENPI_PYTHON"):
        return given
    folder = tmp_path_factory.mktemp("openpi") / "venv"
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    done = subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"openpi-client can't be installed, nor is $OPENPI_PYTHON set: {done.stderr[-300:]}")
    return python


def robot(python: str, folder: Path, port: int, batch: list[dict], horizon: int, steps: int, key: str = "") -> dict:
    path = folder / "observations.npz"
    arrays = {"images": [o["images"]["image"] for o in batch], "states": [o["state"] for o in batch]}
    np.savez(path, tasks=[o["task"] for o in batch], **arrays)
    words = [python, str(ROBOT), str(port), key, str(path), str(horizon), str(steps)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_unmodified_client_broker_and_runtime(openpi_python, tmp_path):
    policy, twin, batch = build_policy("nano"), build_policy("nano"), observations(6, seed=3)
    with served(policy, warm=True, api_key="0123456789abcdef") as server:
        found = robot(openpi_python, tmp_path, server.port, batch, 3, 5, key="0123456789abcdef")
    chunks = [twin.predict_action_chunk([observation])[0] for observation in batch]
    assert found["actions"] == [chunk.tobytes().hex() for chunk in chunks] and found["shape"] == [4, 2]
    assert found["metadata"]["chunk_size"] == 4 and found["metadata"]["cameras"] == {"image": "observation/image"}
    unknown, empty = found["errors"]
    assert unknown.endswith(
        "has unknown keys ['observation/depth']; this server takes ['observation/image', "
        "'observation/state', 'prompt']"
    )
    assert "the request lacks ['observation/image', 'observation/state', 'prompt']" in empty
    # Two episodes of five steps: three actions of the first chunk, two of the one that is asked for then.
    episode = [*chunks[0][:3], *chunks[3][:2]]
    assert np.array_equal(np.float32(found["applied"]), np.float32([*episode, *episode]))


def test_the_shipped_policy_by_the_script(openpi_python, tmp_path):
    words = [sys.executable, "eval/serve.py", "--model_name_or_path", "recipes/pusht/checkpoint", "--layout", "pusht"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [*words, "--port", "0", "--max_batch", "2"],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            line = next(line for line in process.stdout if line.startswith("serving on"))
            port = int(line.split(",")[0].rsplit(":", 1)[1])
            batch = observations(2)
            found = robot(openpi_python, tmp_path, port, batch, 5, 1)
        finally:
            process.terminate()
    assert process.returncode == 0
    from vla0_trl import VLAPolicy

    policy = VLAPolicy.from_pretrained(REPOSITORY / "recipes/pusht/checkpoint")
    expected = [policy.predict_action_chunk([observation])[0].tobytes().hex() for observation in batch]
    assert found["actions"] == expected and found["metadata"]["n_action_steps"] == 5
