"""recipes/jobs: the endpoint's handler, called as the toolkit does, and the job's header."""

import base64
import io
import json
import re
import tomllib

import numpy as np
import pytest
from PIL import Image
from support.general import REPOSITORY, load_script

from vla0_trl import VLAPolicy

SHIPPED = REPOSITORY / "recipes/pusht/checkpoint"


@pytest.fixture(scope="module")
def handler():
    return load_script("recipes/jobs/handler.py").EndpointHandler(str(SHIPPED))


def sent(frame: np.ndarray, image_format: str = "PNG") -> str:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, image_format)
    return base64.b64encode(file.getvalue()).decode()


def test_the_handler_answers_as_the_policy_does(handler):
    frames = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3), np.uint8)
    observations = [{"state": [200.0, 100.0], "task": "Push the T-shaped block onto the T-shaped target."}] * 2
    asked = [o | {"images": {"image": sent(frame)}} for o, frame in zip(observations, frames, strict=True)]
    answer = json.loads(json.dumps(handler(json.loads(json.dumps({"inputs": asked})))))  # over the wire
    direct = [o | {"images": {"image": frame}} for o, frame in zip(observations, frames, strict=True)]
    policy = VLAPolicy.from_pretrained(SHIPPED)
    np.testing.assert_allclose(answer["actions"], policy.predict_action_chunk(direct), rtol=1e-6)
    assert (answer["n_action_steps"], answer["fps"]) == (policy.config.n_action_steps, policy.config.fps)
    one = handler({"inputs": asked[1]})  # the second answer of that place in a batch: another draw
    np.testing.assert_allclose(one["actions"], policy.predict_action_chunk(direct[1:]), rtol=1e-6)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"inputs": "Push it."}, 'an observation is {"images"'),
        (
            {"inputs": {"images": {"image": "%%%"}, "state": [1, 2], "task": "x"}},
            "camera 'image': not the base64",
        ),
        (
            {"inputs": {"images": {"image": "AAAA"}, "state": [1, 2], "task": "x"}},
            "camera 'image': not the base64",
        ),
        ({"inputs": {"images": {}, "state": [1, 2], "task": "x"}}, "lacks cameras ['image']"),
    ],
)
def test_what_cannot_be_answered_says_why(handler, data, said):
    answer = handler(data)
    assert answer.keys() == {"error"} and said in answer["error"]


def test_the_job_has_an_inline_header_as_uv_reads_it():
    """The regular expression is PEP 723's own."""
    script = (REPOSITORY / "recipes/jobs/train.py").read_text()
    pattern = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"
    [found] = re.finditer(pattern, script)
    lines = found["content"].splitlines(keepends=True)
    header = tomllib.loads("".join(line[2:] if line.startswith("# ") else line[1:] for line in lines))
    setup = (REPOSITORY / "setup.cfg").read_text()
    assert found["type"] == "script" and f"python_requires = {header['requires-python']}" in setup
    assert all(f"    {dependency}\n" in setup for dependency in header["dependencies"])
