"""Ten thousand messages that mean harm: the server says what is wrong, serves on, and stays as large as it was."""

import io
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import msgpack
import numpy as np
import pytest
from PIL import Image
from support.general import REPOSITORY
from support.serving import ask
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from vla0_trl.serving.codec import pack

pytestmark = pytest.mark.slow  # a server in a process of its own, whose memory is measured

MAX_GROWTH_MB = 200  # over the warm server: a few messages of 8 MiB, and what they become
IMAGE = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
VALID = {"observation/image": IMAGE, "observation/state": np.array([250.0, 250.0]), "prompt": "Push."}


@pytest.fixture(scope="module")
def process():
    words = [sys.executable, "eval/serve.py", "--model_name_or_path", "recipes/pusht/checkpoint", "--layout", "pusht"]
    words += ["--temperature", "0"]  # one request, one answer, at any time
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [*words, "--port", "0", "--max_batch", "1", "--max_mb", "8"],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        line = next(line for line in process.stdout if line.startswith("serving on"))
        process.port = int(line.split(",")[0].rsplit(":", 1)[1])
        yield process
        process.terminate()


def peak_mb(process) -> float:
    """The largest that the process has been."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) / 1024


def array(dtype="|u1", shape=(8,), data=b"\0" * 8) -> dict:
    return {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": list(shape)}


def with_image(image) -> bytes:
    return msgpack.packb({"observation/image": image, "observation/state": array("<f8", (1,)), "prompt": "Push."})


def bomb(kind: str) -> bytes:
    stream = io.BytesIO()
    side = 30_000 if kind == "PNG" else 10_000
    Image.new("1" if kind == "PNG" else "L", (side, side)).save(stream, kind)
    return stream.getvalue()


def kinds(rng: np.random.Generator) -> dict:
    """Name -> how many, and a function that makes one: its line of error must come."""
    valid, png, jpeg = pack(VALID), bomb("PNG"), bomb("JPEG")
    dtypes = ["|O", "|V8", "|S8", "<U2", "<M8[ns]", "<c8", "|V999999999"]

    def mutated() -> bytes:
        data = bytearray(valid)
        for place in rng.integers(0, 300, 3):
            data[place] = rng.integers(256)
        return bytes(data)

    return {
        "dtype object and others": (2000, lambda: with_image(array(rng.choice(dtypes)))),
        "shape bomb": (1500, lambda: with_image(array(shape=rng.integers(2**20, 2**40, 3).tolist()))),
        "100,000 lists in each other": (300, lambda: b"\x91" * 100_000),
        "900 maps in each other": (500, lambda: b"\x81\xa1a" * 900 + b"\x80"),
        "1000 lists that claim 4096 entries": (300, lambda: b"\xdc\x0f\xff" * 1000),
        "a list that claims 2^32 entries": (500, lambda: b"\xdd\xff\xff\xff\xff" + b"\xc0" * 8),
        "8 million empty maps": (20, lambda: b"\xdd\x00\x80\x00\x00" + b"\x80" * (8 * 2**20 - 100)),
        "2000 lists of 4000 empty maps": (20, lambda: b"\xdc\x07\xd0" + (b"\xdc\x0f\xa0" + b"\x80" * 4000) * 2000),
        "PNG of 900 million pixels": (60, lambda: with_image(png)),
        "JPEG of 100 million pixels": (20, lambda: with_image(jpeg)),
        "a random picture of 8 MB": (30, lambda: with_image(array("|u1", (1, 7_000_000), bytes(7_000_000)))),
        "half a message": (1500, lambda: valid[: rng.integers(len(valid) - 1)]),
        "random bytes": (1500, lambda: rng.bytes(rng.integers(1, 2000))),
        "bytes of a valid message changed": (1500, mutated),
        "text": (300, lambda: "a" * int(rng.integers(2000))),
    }  # fmt: skip


def test_ten_thousand_hostile_messages(process, capsys):
    rng, url = np.random.default_rng(1), f"ws://127.0.0.1:{process.port}"
    options = {"compression": None, "max_size": None}
    with connect(url, **options) as connection:
        connection.recv()
        expected = ask(connection, VALID)["actions"]
    base, answered, table = peak_mb(process), Counter(), []
    loris = [socket.create_connection(("127.0.0.1", process.port)) for _ in range(20)]
    for number, slow in enumerate(loris):
        slow.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n"[: 5 + number])

    with connect(url, **options) as robot:  # asks between the others' messages
        robot.recv()
        for name, (count, make) in kinds(rng).items():
            with connect(url, **options) as connection:
                connection.recv()
                for _ in range(count):
                    reply = ask(connection, make())
                    # Some changed bytes still are a request: another pixel, another letter of the task.
                    assert isinstance(reply, str) or name.startswith("bytes of a valid")
                    assert not isinstance(reply, str) or (reply.isprintable() and len(reply) < 1000)
                    answered[name] += 1
            assert np.array_equal(ask(robot, VALID)["actions"], expected)
            table.append((name, count, peak_mb(process) - base))
        for _ in range(30):
            with connect(url, **options) as connection, pytest.raises(ConnectionClosed):
                connection.recv()
                connection.send(bytes(9 << 20))
                connection.recv()
        table.append(("9 MiB where 8 are allowed", 30, peak_mb(process) - base))
        for number in range(200):  # a frame that announces more than comes
            with connect(url, **options) as connection:
                connection.recv()
                connection.socket.sendall(b"\x82\xfe\x10\x00" + bytes(4 + number))
                connection.socket.shutdown(socket.SHUT_RDWR)
        table.append(("half a frame, then gone", 200, peak_mb(process) - base))
        assert np.array_equal(ask(robot, VALID)["actions"], expected)
    assert sum(count for _, count, _ in table) >= 10_000 and sum(answered.values()) >= 9_000
    for slow in loris:
        slow.close()
    with capsys.disabled():
        print(f"\nwarm server: {base:.0f} MB at its peak")
        for name, count, growth in table:
            print(f"{count:6d} × {name}: + {growth:.1f} MB")
    assert peak_mb(process) - base < MAX_GROWTH_MB


def test_who_only_holds_the_line_is_let_go(process):
    """A handshake that never ends is closed after 10 seconds."""
    with socket.create_connection(("127.0.0.1", process.port)) as slow:
        slow.sendall(b"GET / HTTP/1.1\r\n")
        slow.settimeout(30)
        began = time.perf_counter()
        while slow.recv(4096):
            pass
        assert 5 < time.perf_counter() - began < 20
