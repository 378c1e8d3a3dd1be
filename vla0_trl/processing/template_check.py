"""Chat templates are programs that come with a checkpoint: they run in a process with limits, once."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from vla0_trl.schema import one_line

SECONDS, BYTES, CHARACTERS = 2, 1 << 30, 100_000  # a real one takes a millisecond and writes a few hundred characters


def within_limits(render: Callable[[], list[str]], name: str) -> list[str]:
    """What `render` returns, computed in a fork of this process that may take `SECONDS` and `BYTES` more.

    Transformers' sandbox keeps a template from files and from Python, not from looping for ever.

    Args:
        name (`str`): of the model that the template is from, for messages.

    Raises:
        ValueError: it ran into a limit, or raised.
    """
    result, answer = os.pipe()
    child = os.fork()
    if not child:
        os.close(result)
        _answer(render, answer)
    os.close(answer)
    with open(result, "rb") as file:
        data = file.read()
    _, status = os.waitpid(child, 0)
    if status or not data:
        raise ValueError(
            f"{name}: its chat template takes more than {SECONDS} s or {BYTES >> 30} GiB for one row: it is damaged "
            "or malicious, take the model from a place that you trust"
        )
    found = json.loads(data)
    if isinstance(found, str):
        raise ValueError(f"{name}: its chat template can't be used: {found}")
    return found


def _answer(render: Callable[[], list[str]], pipe: int) -> None:
    """In the fork: write what `render` returns, or what it raises; never returns."""
    status = 1
    try:
        for number in (signal.SIGALRM, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
        signal.alarm(15 * SECONDS)  # on a busy machine, or if a lock was held when this process was forked
        try:
            found: list[str] | str = render()
            if any(len(text) > CHARACTERS for text in found):
                found = f"it writes more than {CHARACTERS} characters for one row"
        except Exception as error:  # whatever a stranger's program raises
            found = f"{type(error).__name__}: {one_line(error)}"
        with suppress(OSError), open(pipe, "wb") as file:
            file.write(json.dumps(found).encode())
            status = 0
    finally:
        os._exit(status)
