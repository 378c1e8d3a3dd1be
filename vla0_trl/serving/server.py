"""openpi's websocket protocol: the server speaks first (metadata), then answers each request by actions or one line.

An error is a text frame of one line, which openpi's client raises as `RuntimeError`; the connection stays open.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import itertools
import logging
import ssl
import time
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response

import vla0_trl
from vla0_trl.schema import one_line
from vla0_trl.serving.codec import pack, unpack
from vla0_trl.serving.engine import Engine, NotAnswered, Reply
from vla0_trl.serving.requests import Request, RequestReader

PROTOCOL = 1  # of what our metadata and options mean; openpi's own messages have no version
HEALTH = "/healthz"
MAX_UNANSWERED = 16  # requests of one connection that are read ahead of their replies
HANDSHAKE_S = 10.0
GOODBYE_S = 5.0  # for the last replies, to clients that read slowly

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ServerOptions:
    """Where the server listens, and who may connect.

    Args:
        host, port: port 0 takes a free one.
        api_key (`str`, *optional*): clients must send `Authorization: Api-Key KEY`.
        tls ([`ssl.SSLContext`], *optional*): for wss://.
        insecure (`bool`): listen beyond this machine without a key.
        max_mb (`int`): MiB of a message.
        max_connections (`int`): at the same time; more are refused with status 503.

    `ValueError`: the address is not of this machine alone, and there is no key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    tls: ssl.SSLContext | None = None
    insecure: bool = False
    max_mb: int = 32
    max_connections: int = 64

    def __post_init__(self):
        if not (self.api_key or self.insecure or _is_loopback(self.host)):
            raise ValueError(
                f"--host {self.host} lets other machines move this robot: give --api_key_file, or --insecure if the "
                "network is trusted"
            )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class PolicyServer:
    """An engine on the network. `async with PolicyServer(…) as server:` listens until the block ends, which stops
    the engine.

    Args:
        engine ([`Engine`]): warm, and started.
        reader ([`RequestReader`]): of its layout.
        revision (`str`): the checkpoint's hash, for the metadata.
        running (`dict`, *optional*): what else may change answers, for the metadata: [`PolicySource`]'s `protocol`.

    Attributes:
        port (`int`): on which it listens.
    """

    def __init__(
        self,
        engine: Engine,
        reader: RequestReader,
        options: ServerOptions,
        revision: str = "",
        running: dict[str, Any] | None = None,
    ):
        self.engine, self.reader, self.options = engine, reader, options
        self.revision, self.running = revision, running or {}
        self._replies: set[asyncio.Queue] = set()  # one of each connection
        self._numbers = itertools.count()
        self._server: Server | None = None

    async def __aenter__(self) -> PolicyServer:
        options = self.options
        self._server = await serve(
            self._converse,
            options.host,
            options.port,
            process_request=self._admit,
            origins=[None],  # a page in a browser could reach loopback, too, but can't hide that it is one
            compression=None,  # costs 10 ms for two pictures, and can be a bomb
            ssl=options.tls,
            max_size=options.max_mb << 20,
            max_queue=1,  # frames in memory, of each connection
            open_timeout=HANDSHAKE_S,
            server_header=None,
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        # What is being computed is answered, what waits is refused, and both are told before connections close.
        await asyncio.to_thread(self.engine.stop)
        if told := [asyncio.create_task(replies.join()) for replies in self._replies]:
            await asyncio.wait(told, timeout=GOODBYE_S)
        self._server.close()
        await self._server.wait_closed()

    def metadata(self) -> dict[str, Any]:
        """The first message."""
        config = self.engine.policy.config
        # Of actions in the demonstrations; relative ones move the state, whose first numbers' range it is then.
        stats = config.state_stats if config.relative_actions else config.action_stats
        names = ("fps", "action_dim", "state_dim", "robot")
        names += ("ensemble_size", "ensemble_decay", "ensemble_weights", "temperature")
        chunk_size = self.reader.layout.chunk_size or config.chunk_size
        return {
            "server": f"vla0_trl {vla0_trl.__version__}",
            "protocol": PROTOCOL,
            "revision": self.revision,
            **self.running,
            **{name: getattr(config, name) for name in names},
            "chunk_size": chunk_size,
            "n_action_steps": min(config.n_action_steps, chunk_size),
            **self.reader.describe(),
            "action_range": [stats.min[: config.action_dim], stats.max[: config.action_dim]],
            "latency_ms": self.engine.percentiles(),
            "max_batch": self.engine.max_batch,
        }

    def _admit(self, connection: ServerConnection, request: HttpRequest) -> Response | None:
        """None opens the connection."""
        if request.path == HEALTH:
            return connection.respond(HTTPStatus.OK, "OK\n")
        if self.options.api_key is not None:
            given = ", ".join(request.headers.get_all("Authorization"))
            if not hmac.compare_digest(given.encode(errors="replace"), f"Api-Key {self.options.api_key}".encode()):
                return connection.respond(HTTPStatus.UNAUTHORIZED, "send Authorization: Api-Key KEY\n")
        if len(self._replies) >= self.options.max_connections:
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "all connections are taken\n")
        return None

    async def _converse(self, connection: ServerConnection) -> None:
        """One client, until it leaves: requests are read ahead, replies come in their order."""
        number, replies = next(self._numbers), asyncio.Queue(MAX_UNANSWERED)
        self._replies.add(replies)
        sender = asyncio.create_task(self._send(connection, replies))
        try:
            await connection.send(pack(self.metadata()))
            async for message in connection:
                arrived = time.perf_counter()
                await replies.put((arrived, await self._submit(number, message)))
        except ConnectionClosed as closed:
            logger.info("a client left: %s", closed)
        finally:
            self._replies.remove(replies)
            sender.cancel()
            while not replies.empty():
                _, reply = replies.get_nowait()
                if not isinstance(reply, str):
                    reply.cancel()

    async def _submit(self, connection: int, message: bytes | str) -> str | asyncio.Future[Reply]:
        """The reply to come, or what is wrong with the message."""
        try:
            # Decoding pictures takes milliseconds: another thread's.
            request = await asyncio.to_thread(self._read, message)
            if self.engine.ensembles and request.episode is None:
                raise ValueError(
                    "this checkpoint averages chunks and must know when an episode begins: send 'episode', or serve "
                    "with --ensemble_size 1"
                )
            if self.engine.ensembles and request.prefix is not None:
                raise ValueError("'prefix' is of no use to a checkpoint that averages chunks: --ensemble_size 1")
        except ValueError as error:
            return one_line(str(error))
        return asyncio.wrap_future(self.engine.submit((connection, request.episode), request))

    def _read(self, message: bytes | str) -> Request:
        if isinstance(message, str):
            raise ValueError("a request is a binary frame of msgpack, this is text")
        return self.reader.read(unpack(message))

    async def _send(self, connection: ServerConnection, replies: asyncio.Queue) -> None:
        total = 0.0
        while True:
            arrived, reply = await replies.get()
            answer: str | bytes
            if isinstance(reply, str):
                answer = reply
            else:
                try:
                    done = await reply
                except (ValueError, NotAnswered) as error:
                    answer = one_line(str(error))
                else:
                    timing = {"queue_ms": done.queue_s * 1000, "infer_ms": done.infer_s * 1000}
                    timing |= {"batch": done.batch, "prev_total_ms": total * 1000}
                    answer = pack({"actions": done.actions[: self.reader.layout.chunk_size], "server_timing": timing})
            try:
                await connection.send(answer)
            except ConnectionClosed:
                return
            replies.task_done()
            total = time.perf_counter() - arrived
