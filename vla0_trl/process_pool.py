"""A pool of processes that leave signals to their parent, and end with it."""

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import Any

from vla0_trl.stopping import blocked_in_workers


class ProcessPool(ProcessPoolExecutor):
    """Runs functions in `num_proc` new interpreters. A context manager: an error in its block kills what is running.

    New interpreters ("spawn"), because forking copies the threads and locks that zarr, torch or a GL context hold at
    that moment. Each process calls `begin(*arguments)` once before its first function.
    """

    def __init__(self, num_proc: int, begin: Callable[..., None] | None = None, *arguments: Any):
        self._others = set(multiprocessing.active_children())
        context = multiprocessing.get_context("spawn")
        super().__init__(num_proc, context, initializer=_start, initargs=(begin, *arguments))

    def submit(self, *call: Any, **keywords: Any) -> Future:
        with blocked_in_workers():  # this may start a process
            return super().submit(*call, **keywords)

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is not None:
            # What runs may take a minute. And an executor that loses a process while it is starting the next one would
            # wait for that one forever (CPython 3.11).
            for worker in set(multiprocessing.active_children()) - self._others:
                worker.kill()
        self.shutdown(cancel_futures=True)


def _start(begin: Callable[..., None] | None, *arguments: Any) -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    if begin is not None:
        begin(*arguments)


def _exit_with_parent() -> None:
    """A killed parent would leave workers that wait for work forever."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
