"""A policy served in this process, on a free port of the loopback address."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from websockets.sync.client import ClientConnection, connect
from websockets.sync.server import ServerConnection
from websockets.sync.server import serve as serve_websocket

from vla0_trl import VLAPolicy
from vla0_trl.serving.codec import pack, unpack
from vla0_trl.serving.engine import Engine
from vla0_trl.serving.layouts import LAYOUTS, Layout
from vla0_trl.serving.requests import RequestReader
from vla0_trl.serving.server import PolicyServer, ServerOptions


@contextmanager
def served(
    policy: VLAPolicy, layout: Layout = LAYOUTS["plain"], units: str | None = None, warm: bool = False, **options: Any
) -> Iterator[PolicyServer]:
    """Options are those of [`ServerOptions`], and the engine's `max_batch` and `window_s`."""
    engine_options = {name: options.pop(name) for name in ("max_batch", "window_s") if name in options}
    engine, reader = Engine(policy, **engine_options), RequestReader(layout, policy.config, units)
    server = PolicyServer(engine, reader, ServerOptions(**{"port": 0} | options), "revision")
    listening, stop = threading.Event(), threading.Event()

    async def serve() -> None:
        async with server:
            listening.set()
            await asyncio.to_thread(stop.wait)

    if warm:
        engine.warm_up(reader.read(reader.example()))
    engine.start()
    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert listening.wait(30)
        yield server
    finally:
        stop.set()
        thread.join(30)
        engine.stop()
        assert not thread.is_alive()


@contextmanager
def websocket_server(converse: Callable[[ServerConnection], None]) -> Iterator[str]:
    """Another server than ours, which converses so; gives its address."""
    with serve_websocket(converse, "127.0.0.1", 0, compression=None, max_size=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()
            thread.join()


def open_connection(server: PolicyServer, **options: Any) -> ClientConnection:
    """A connection whose metadata have not been read."""
    options = {"compression": None, "max_size": None} | options
    return connect(f"ws://127.0.0.1:{server.port}", **options)


def ask(connection: ClientConnection, message: Any) -> Any:
    """The reply: a message, or a line of text."""
    connection.send(message if isinstance(message, bytes | str) else pack(message))
    reply = connection.recv(timeout=60)
    return reply if isinstance(reply, str) else unpack(reply)


def plain_message(observation: dict) -> dict[str, Any]:
    """A policy's observation as the layout "plain" sends it."""
    images = {f"observation/{camera}": image for camera, image in observation["images"].items()}
    return images | {"observation/state": observation["state"], "prompt": observation["task"]}
