"""The command in an environment of its own."""

import pytest
from support.shell import Shell


@pytest.fixture
def shell(tmp_path) -> Shell:
    return Shell(tmp_path)
