"""The command `python -m vla0_trl.check`: how it starts, what it shows on a terminal."""

import contextlib
import os
import pty
import subprocess
import sys

import pytest
from support.general import REPOSITORY
from support.shell import COMMAND

pytestmark = pytest.mark.slow  # every check is a process


def test_an_unknown_check_is_one_line(shell):
    done = shell.run("disc")
    assert done.returncode == 2 and "there is no check 'disc'; there are packages, disk, hub" in done.stderr


def _read_all(terminal: int) -> str:
    """What was written to a terminal whose other end is closed: reading its end fails on Linux."""
    shown = b""
    with contextlib.suppress(OSError):
        while piece := os.read(terminal, 2**16):
            shown += piece
    os.close(terminal)
    return shown.decode()


def test_colors_and_progress_are_for_terminals(shell):
    assert "\033" not in shell.run("disk").stdout
    for no_color in (False, True):
        shell.env |= {"NO_COLOR": "1"} if no_color else {}
        ours, theirs = pty.openpty()
        subprocess.run([*COMMAND, "disk"], env=shell.env, cwd=shell.home, stdout=theirs, check=True)
        os.close(theirs)
        shown = _read_all(ours)
        assert "disk …" in shown and ("\033[3" in shown) != no_color


def test_it_starts_without_any_library():
    code = "import sys, vla0_trl.check.__main__; assert not {'numpy', 'torch', 'huggingface_hub'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)
