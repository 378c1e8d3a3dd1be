"""Measure a server of eval/serve.py from here, and tell whether latency, chunk and control frequency fit.

    python eval/check_server.py ws://127.0.0.1:8000
    python eval/check_server.py ws://gpu-machine:8000 --api_key_file key --num_clients 1 4 8 --json latency.json

Sends pictures of noise, --image_side pixels wide, as arrays. Exit status 1 if a robot would have to wait for replies.
"""

import json
import math
import sys
import threading
import time
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from vla0_trl.command_line import ScriptParser, option, user_errors

ROBOT_KEYS = ("fps", "chunk_size", "n_action_steps", "cameras", "state", "state_dim", "task", "options")


@dataclass(kw_only=True)
class Arguments:
    num_clients: list[int] = option([1], "robots that ask at the same time; several numbers measure each")
    requests: int = option(50, "of each robot (default: %(default)s)")
    image_side: int = option(256, "of the square pictures, in pixels (default: %(default)s)")
    api_key_file: Path | None = option(None, "a file with the server's key")
    timeout_s: float = option(60.0, "for a reply (default: %(default)s)")
    json: Path | None = option(None, "write the numbers to this file, too")


def message_for(metadata: dict, side: int) -> dict:
    """Noise that fits the server's keys; the state, if there is one, is shared out among its keys."""
    rng = np.random.default_rng(0)
    message = {key: rng.integers(0, 256, (side, side, 3), np.uint8) for key in metadata["cameras"].values()}
    if metadata["state"] and metadata["state_dim"]:
        parts = np.split(np.zeros(metadata["state_dim"]), range(1, len(metadata["state"])))
        message |= dict(zip(metadata["state"], parts, strict=True))
    message[metadata["task"]] = "Do the task."
    return message | ({"units": metadata["units"]} if "units" in metadata["options"] else {})


def latencies(connect, count: int, args: Arguments) -> np.ndarray:
    """Milliseconds of all requests of `count` robots, after one each that is not counted."""
    found: list[float] = []
    failures: list[Exception] = []
    start = threading.Barrier(count)

    def ask() -> None:
        try:
            with closing(connect()) as connection:
                message = message_for(connection.metadata, args.image_side) | {"episode": 0}
                connection.ask(message)
                start.wait()
                for _ in range(args.requests):
                    began = time.perf_counter()
                    connection.ask(message)
                    found.append((time.perf_counter() - began) * 1000)
        except (RuntimeError, ValueError) as error:
            failures.append(error)
            start.abort()

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise ValueError(str(failures[0]))
    return np.array(found)


def verdict(metadata: dict, p95_ms: float) -> tuple[bool, str]:
    """Whether a robot that prefetches never stops, and a line that says why."""
    fps, chunk, executed = (metadata[name] for name in ("fps", "chunk_size", "n_action_steps"))
    delay = math.ceil(p95_ms / 1000 * fps) + 1  # as vla0_trl.serving.client counts
    left = max(0, min(executed, chunk - delay))
    words = (
        f"p95 in control steps at {fps:g} Hz: {delay - 1}; asked {delay} ahead, of a chunk of {chunk} remain {left}"
    )
    if left >= delay:
        return True, f"fits: {words}, which last until the next reply"
    stop = f"a robot that prefetches stops for up to {delay - left} steps per chunk"
    return False, f"does not fit: {words}; {stop}: longer chunks, a faster machine or a lower frequency"


def main() -> None:
    parser = ScriptParser(Arguments, __doc__)
    parser.add_argument("url", help="ws://HOST:PORT, or wss://…")
    args, others, _ = parser.parse()
    from vla0_trl.serving.client import PolicyConnection, ServerError

    with user_errors():
        key = args.api_key_file and args.api_key_file.read_text().strip()
        connect = partial(PolicyConnection, others.url, key, args.timeout_s)
        try:
            with closing(connect()) as connection:
                metadata = connection.metadata
        except ServerError as error:
            raise ValueError(str(error)) from error
        if absent := [name for name in ROBOT_KEYS if metadata.get(name) is None]:
            raise ValueError(f"{others.url} is no server of eval/serve.py: its metadata have no {', '.join(absent)}")
        rows = []
        for count in args.num_clients:
            found = latencies(connect, count, args)
            p50, p95, largest = (round(float(value), 1) for value in np.percentile(found, (50, 95, 100)))
            rows.append({"clients": count, "p50_ms": p50, "p95_ms": p95, "max_ms": largest})
            print(f"robots {count}: p50 {p50} ms, p95 {p95} ms, largest {largest} ms of {len(found)} replies")
    fits = True
    for row in rows:
        row["fits"], row["verdict"] = verdict(metadata, row["p95_ms"])
        fits &= row["fits"]
        print(f"robots {row['clients']}: {row['verdict']}")
    if args.json is not None:
        args.json.write_text(json.dumps({"url": others.url, "server": metadata, "latencies": rows}, indent=2) + "\n")
    sys.exit(0 if fits else 1)


if __name__ == "__main__":
    main()
