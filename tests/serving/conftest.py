"""What tests of the server share."""

import pytest
from support.random_policies import build_policy


@pytest.fixture(scope="module")
def policy():
    return build_policy("nano")


@pytest.fixture(scope="module")
def twin():
    """Answers like the policy, which belongs to the engine's thread."""
    return build_policy("nano")
