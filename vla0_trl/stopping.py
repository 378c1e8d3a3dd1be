"""Stopping well: SIGTERM, by which Slurm, Kubernetes and spot machines end a program, does what Ctrl-C does.

The exit status says which it was: 130 after Ctrl-C, 143 after SIGTERM. A second signal ends a program at once, but not
one that comes with the first: Slurm sends SIGTERM to every process of a step, and `accelerate launch` passes it on.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ONE_STOP_S = 2.0  # signals within this time are one


class Stopped(KeyboardInterrupt):
    """A signal asked the program to stop: its `number`, and the `status` that it shall exit with."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number, self.status = number, exit_status(number)


def exit_status(number: int) -> int:
    """What shells report of a program that this signal ended."""
    return 128 + number


@contextmanager
def on_first_signal(act: Callable[[int], None]) -> Iterator[None]:
    """Within the block, the first SIGINT or SIGTERM calls `act` with its number; a later one ends the process."""
    began: float | None = None

    def handle(number: int, frame: object) -> None:
        nonlocal began
        if began is None:
            began = time.monotonic()
            act(number)
        elif time.monotonic() - began > ONE_STOP_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    previous = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def raising_stopped() -> Iterator[None]:
    """Within the block, the first SIGINT or SIGTERM raises [`Stopped`]."""

    def stop(number: int) -> None:
        raise Stopped(number)

    with on_first_signal(stop):
        yield


@contextmanager
def blocked_in_workers() -> Iterator[None]:
    """Processes that are started within the block never get SIGINT or SIGTERM: their parent ends them itself.

    Ctrl-C reaches the whole process group, Slurm's SIGTERM all processes of a step.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@cache
def leave_signals_to_parent() -> None:
    """In a worker process: only its parent can end it with SIGINT or SIGTERM.

    Slurm sends SIGTERM to every process of a step; workers must live on while the parent finishes what it does.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    parent = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo(SIGNALS).si_pid != parent:
            pass
        os._exit(exit_status(signal.SIGTERM))

    threading.Thread(target=wait, daemon=True).start()
