"""Signals that ask a program to stop."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
from support.general import REPOSITORY

from vla0_trl import stopping
from vla0_trl.stopping import Stopped, on_first_signal, raising_stopped


@pytest.mark.parametrize("numbers", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)])
def test_signals_that_come_together_are_one_stop(numbers):
    """As when Slurm reaches a process itself, and its launcher passes the same on."""
    seen = []
    with on_first_signal(seen.append):
        for number in numbers:
            os.kill(os.getpid(), number)
    assert seen == [numbers[0]]


def test_a_stop_is_raised_once():
    with raising_stopped():
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # while it saves
    assert (stopped.value.number, stopped.value.status) == (signal.SIGTERM, 143)


def test_a_later_signal_ends_the_program_at_once():
    code = f"""
        import os, time
        from vla0_trl import stopping
        stopping.ONE_STOP_S = {stopping.ONE_STOP_S / 20}
        with stopping.on_first_signal(lambda number: print("saving", flush=True)):
            os.kill(os.getpid(), 15)
            time.sleep(2 * stopping.ONE_STOP_S)
            os.kill(os.getpid(), 15)
            print("still here")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "saving\n")
