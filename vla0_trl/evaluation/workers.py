"""Environments in processes of their own, all working at the same time, and replaceable when one breaks down."""

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from vla0_trl.evaluation.env_runner import Environment, EnvRunner, EpisodeCrash, Seed, StepResult, local_envs

WORKER_TIMEOUT = 900  # seconds for an answer; the slowest, to a first request, takes about ten


class Worker(EnvRunner):
    """Runs episodes in a process of its own, with one environment for its whole life.

    One environment per process, because simulators that draw on the CPU (OSMesa) draw into each other's pictures. A
    new interpreter, because forking copies the threads and locks that torch or a GL context hold at that moment; not
    one of `multiprocessing`, which would import the main script and with it torch: half a gigabyte and seconds each.
    `make_env`, which builds the environment there, must pickle.
    """

    concurrent = True

    def __init__(self, make_env: Callable[[], Environment]):
        self.make_env = make_env
        self._launch()

    @property
    def pid(self) -> int:
        """The process of now; another one after a crash."""
        return self._process.pid

    def start(self, seed: Seed, record: bool) -> None:
        self._send(("start", seed, record))

    def execute(self, actions: np.ndarray) -> None:
        self._send(("execute", actions))

    def wait(self) -> StepResult:
        try:
            if not self._pipe.poll(WORKER_TIMEOUT):
                raise EpisodeCrash(f"no answer from the simulator in {WORKER_TIMEOUT} s")
            answer = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            code = self._process.wait()
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            raise EpisodeCrash(f"the simulator's process died ({how})") from None
        if isinstance(answer, str):
            raise EpisodeCrash(answer)
        return answer

    def restart(self) -> None:
        self.close()
        self._launch()

    def close(self) -> None:
        """End the process; what it was doing is lost."""
        self._pipe.close()
        self._process.kill()
        self._process.wait()

    def _launch(self) -> None:
        self._pipe, theirs = Pipe()
        # one thread each: as many workers as cores is what makes them fast
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vla0_trl.evaluation.workers", str(theirs.fileno())],
            env=os.environ | threads | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is its owner's to handle
        )
        theirs.close()  # or the end of the process would not end the pipe
        self._send(self.make_env)

    def _send(self, request: Any) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # it died between two requests; `wait` says how
            self._pipe.send(request)


def worker_pool(make_env: Callable[[], Environment], count: int) -> AbstractContextManager[list[Worker]]:
    """`count` workers that end with the block, however it ends."""
    return local_envs(lambda: Worker(make_env), count)


def _serve(pipe: Connection) -> None:
    """A worker's life: run episodes until its owner closes the pipe, or dies."""
    runner: EnvRunner | None = None
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm sends it to every process; this one's owner ends it
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        make_env = pipe.recv()
        while True:
            name, *arguments = pipe.recv()
            try:
                runner = runner or EnvRunner(make_env())
                if name == "start":
                    runner.start(*arguments)
                else:
                    runner.execute(*arguments)
                answer: StepResult | str = runner.wait()
            except Exception as error:  # whatever it is, its owner learns of it: as a crash, never as a result
                answer = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
            pipe.send(answer)
    os._exit(0)  # nothing to save, and simulators may crash while Python takes them apart


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
