"""A check in a process of its own: how it is run, and how its answer comes back past all that libraries print.

Graphics libraries crash, networks hang: a probe that ends without an answer has found a failure all the same.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from vla0_trl.schema import one_line

OK, WARNING, FAILURE = "ok", "warning", "failure"
_MESSAGE = 300  # characters of an exception
_answers = 1  # file descriptor, in a probe's process; its stdout goes to stderr


class Finding(NamedTuple):
    """What a probe found: `OK`, `WARNING` or `FAILURE`; one line; how to fix it, or an empty text."""

    status: str
    text: str
    fix: str = ""


class Check(NamedTuple):
    """A check: its name in the output, its probe, and how to fix it if the probe ends in an unexpected way.

    A probe takes the folder for checkpoints. It returns None if what it is about isn't installed.
    """

    title: str
    probe: Callable[[Path], Finding | None]
    fix: str


def run_probe(name: str, fix: str, output_dir: Path, timeout: float) -> Finding | None:
    """Run the check of this name, for `timeout` seconds at most."""
    # it leads a group, so that what it starts (ffmpeg, ldconfig) ends with it
    with subprocess.Popen(
        [sys.executable, "-m", "vla0_trl.check.checks", name, str(output_dir)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            answers, noise = process.communicate(timeout=timeout)
            end = f"ended with status {process.returncode}"
            if process.returncode < 0:
                end = f"crashed ({signal.Signals(-process.returncode).name})"
            end = ": ".join([end, *noise.strip().splitlines()[-1:]])
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            answers, _ = process.communicate()
            end = f"no answer within {timeout:g} s"
        finally:
            if process.poll() is None:  # Ctrl-C
                os.killpg(process.pid, signal.SIGKILL)
    lines = [json.loads(line) for line in answers.splitlines()]
    if lines[-1:] == [None]:
        return None
    last = Finding(*lines[-1]) if lines else Finding(FAILURE, "", fix)
    return last if last.text else last._replace(text=end)


def answer_for(check: Check, output_dir: Path) -> None:
    """What a probe's process does: run the probe, and write what it found as its only output."""
    global _answers
    _answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print, in C or in Python, is not an answer
    unexpected_end_means(FAILURE, check.fix)
    _answer(check.probe(output_dir))


def unexpected_end_means(status: str, fix: str) -> None:
    """Let a crash, an exception or a timeout of this process count as `status` from here on."""

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        _answer(Finding(status, message(error), fix))

    _answer(Finding(status, "", fix))
    sys.excepthook = report


def message(error: BaseException) -> str:
    """An exception as one line."""
    return one_line(f"{type(error).__name__}: {error}", _MESSAGE)


def _answer(finding: Finding | None) -> None:
    os.write(_answers, json.dumps(finding).encode() + b"\n")
