"""What tests of the server share."""

import os

import pytest
from support.random_policies import build_policy


@pytest.fixture(scope="module")
def policy():
    return build_policy("nano")


@pytest.fixture(scope="module")
def twin():
    """Answers like the policy, which belongs to the engine's thread."""
    return build_policy("nano")


@pytest.fixture(scope="session")
def lerobot_python() -> str:
    if not (python := os.environ.get("LEROBOT_PYTHON")):
        pytest.skip(
            "set LEROBOT_PYTHON to the Python of an environment with what eval/baselines/serve_lerobot.py lists, and "
            "lerobot[core_scripts] (gigabytes: not made by this test)"
        )
    return python
