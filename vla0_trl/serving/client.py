"""The robot's side: it acts while the server thinks. Needs websockets, msgpack and NumPy, and `codec.py` beside it.

The LeRobot plugin (eval/lerobot_plugin) has copies of these files and of `safety.py`: therefore the relative import.

Without clock or network, [`ChunkStream`] decides when to ask, what the robot is committed to while it waits, and which
actions of a reply to execute. [`RobotClient`] adds clock and network, for a loop that runs at the robot's rate:

    with RobotClient("ws://gpu-machine:8000", api_key=KEY) as client:
        while running:  # metadata["fps"] times per second
            action = client.step({"observation/image": image, "observation/state": state, "prompt": "…"})
            robot.hold() if action is None else robot.execute(action)
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import numpy as np
from websockets.exceptions import WebSocketException
from websockets.sync.client import ClientConnection, connect

from .codec import CodecError, pack, unpack

KEPT_LATENCIES = 50
MARGIN = 1  # steps by which a request is sent earlier than the latency requires
RETRY_S = 1.0  # seconds between attempts to connect again, or to make a message
# Metadata that must be equal after connecting again.
_SAME = ("revision", "units", "fps", "n_action_steps", "ensemble_size")

logger = logging.getLogger(__name__)
Message = dict[str, Any] | Callable[[], dict[str, Any]]


class ServerError(RuntimeError):
    """The server answered with a line of error, or not at all."""


class PolicyConnection:
    """One connection of openpi's protocol: `ask` sends a message and waits.

    Args:
        url (`str`): ws://host:port, or wss://.
        api_key (`str`, *optional*): the server's.
        timeout_s (`float`): for connecting, and for each reply.

    Attributes:
        metadata (`dict`): what the server said first.
        closed (`bool`): it can't be asked any more.

    `ServerError`: there is no server, or it refused the connection.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 10.0):
        self.url, self.timeout_s, self.closed = url, timeout_s, False
        self._stack = ExitStack()
        headers = {"Authorization": f"Api-Key {api_key}"} if api_key else None
        seconds = {"open_timeout": timeout_s, "close_timeout": 0.1}  # a busy or lost server must not delay the robot
        try:
            # Entered, since websockets 17 warns of connections that are opened otherwise; left by `close`.
            opening = connect(url, additional_headers=headers, compression=None, max_size=None, **seconds)
            self._socket: ClientConnection = self._stack.enter_context(opening)
            self.metadata: dict[str, Any] = unpack(self._socket.recv(timeout=timeout_s))
        except (OSError, WebSocketException, CodecError) as error:
            self.close()
            raise ServerError(f"no policy at {url}: {error}") from error

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """The reply, a map with `actions`.

        Raises:
            ServerError: the server says what is wrong with the message; the connection stays open. Or it did not
                answer in time, or has gone; the connection is closed, so that no late reply is taken for the next one.
            CodecError: the message holds something that can't be sent.
        """
        return self.ask_all([message])[0]

    def ask_all(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The replies to several messages, which are all sent first; raises as `ask` does, for the first mistake."""
        frames = [pack(message) for message in messages]
        try:
            for frame in frames:
                self._socket.send(frame)
            replies = [self._socket.recv(timeout=self.timeout_s) for _ in messages]
            wrong = [reply for reply in replies if isinstance(reply, str)]
            if not wrong:
                return [unpack(reply) for reply in replies]
        except (OSError, WebSocketException, CodecError) as error:
            self.close()
            raise ServerError(f"{self.url} did not answer: {str(error) or type(error).__name__}") from error
        raise ServerError(wrong[0])

    def close(self) -> None:
        self.closed = True
        self._stack.close()


class ChunkStream:
    """The actions of one robot: executed one per step, replaced by newer ones while they last.

    Args:
        chunk_size, n_action_steps (`int`): actions in a reply; and how many are executed, at most, once it is there.
        prefetch (`bool`): ask while actions remain; otherwise the robot stops and waits.
        use_prefix (`bool`): send the actions that are executed meanwhile, for the chunk to begin with: no jump where
            old and new actions meet. But a policy that catches up at that point can't do so any more, such as the
            shipped one in PushT (eval/README.md): measure first.

    Attributes:
        executed (`int`): actions given by `next_action` so far.
        left_out (`int`): actions of replies that came too late for them: the robot had executed others meanwhile.
        waiting (`bool`): a request is on its way.
    """

    def __init__(self, chunk_size: int, n_action_steps: int, prefetch: bool = True, use_prefix: bool = False):
        self.chunk_size, self.n_action_steps = chunk_size, n_action_steps
        self.prefetch, self.use_prefix, self.left_out = prefetch, use_prefix, 0
        self.reset()

    def reset(self) -> None:
        """A new episode: nothing is planned, no request is on its way."""
        self.executed, self.waiting = 0, False
        self._actions: deque[np.ndarray] = deque()
        self._asked_at = 0

    def is_due(self, delay_steps: int) -> bool:
        """Whether to ask now, if a reply takes that many steps."""
        return not self.waiting and len(self._actions) <= (delay_steps if self.prefetch else 0)

    def ask(self, delay_steps: int) -> np.ndarray | None:
        """A request goes out with the current observation.

        Returns its prefix, float32 (d, action_dim), or None: what the robot will execute meanwhile.
        """
        self.waiting, self._asked_at = True, self.executed
        committed = min(delay_steps, len(self._actions), self.chunk_size - 1)
        if not (self.prefetch and self.use_prefix and committed):
            return None
        return np.stack([self._actions[step] for step in range(committed)])

    def accept(self, chunk: np.ndarray) -> None:
        """The reply (chunk_size, action_dim): what has been executed since the request is left out.

        Counted are the actions that the robot really executed: while it held its position, none.
        """
        self.waiting = False
        begin = self.executed - self._asked_at
        self.left_out += begin
        self._actions = deque(chunk[begin : begin + self.n_action_steps])

    def give_up(self) -> None:
        """The request failed: its reply, if it ever comes, is not for us. What is planned is still executed."""
        self.waiting = False

    def hold(self) -> None:
        """The server is lost: no new answer would correct what is planned, so it is not executed."""
        self._actions.clear()

    def next_action(self) -> np.ndarray | None:
        """What to execute in this step, (action_dim,); None: hold the position."""
        if not self._actions:
            return None
        self.executed += 1
        return self._actions.popleft()


class RobotClient(AbstractContextManager):
    """A robot that acts while its server thinks; `step` never waits for the network.

    A thread sends a request as soon as the remaining actions last no longer than the 95th percentile of the latencies,
    plus one step. When the server is lost, or does not answer in time, nothing that was planned is executed any more:
    the robot holds its position until it has connected to the same policy again, and has a reply to a newer
    observation.

    Args:
        url, api_key, timeout_s: see [`PolicyConnection`].
        prefetch, use_prefix: see [`ChunkStream`].

    Attributes:
        metadata (`dict`): the server's.
        last_error (`str` or `None`): why the newest request failed, which is logged, too; None if it succeeded.
        latencies_s (`deque[float]`): of the newest replies; the first is what the server said of itself.
        losses (`int`): how often the server was lost.

    `ServerError`: see [`PolicyConnection`]; or the server averages chunks, which it aligns by requests, not by steps.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        timeout_s: float = 2.0,
        prefetch: bool = True,
        use_prefix: bool = False,
    ):
        self._connect = lambda: PolicyConnection(url, api_key, timeout_s)
        self._connection: PolicyConnection | None = self._connect()
        self.metadata = self._connection.metadata
        if self.metadata["ensemble_size"] > 1:
            self._connection.close()
            raise ServerError(f"{url} averages chunks and must be asked at every step: serve with --ensemble_size 1")
        self.stream = ChunkStream(self.metadata["chunk_size"], self.metadata["n_action_steps"], prefetch, use_prefix)
        self.last_error: str | None = None
        self.losses = 0
        first = self.metadata["latency_ms"].get("p95", 0.0) / 1000
        self.latencies_s: deque[float] = deque([first], maxlen=KEPT_LATENCIES)
        self._request: Message | None = None
        self._prefix: np.ndarray | None = None
        self._generation = 0  # of the episode: a reply to an earlier one is dropped
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._ask_on, name="policy client", daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    @property
    def delay_steps(self) -> int:
        """Steps that a reply takes, with 95 % certainty, and the margin."""
        return math.ceil(float(np.percentile(self.latencies_s, 95)) * self.metadata["fps"]) + MARGIN

    def reset(self) -> None:
        """A new episode begins."""
        with self._changed:
            self._generation += 1
            self._request = None
            self.stream.reset()

    def step(self, message: Message) -> np.ndarray | None:
        """The current observation -> the action of this step, float32 (action_dim,); None: hold the position.

        Instead of a message, a function may make it, which the thread calls only for one that is sent: compressing
        pictures takes time. What it raises becomes `last_error` and is logged; the robot holds its position meanwhile.
        """
        with self._changed:
            if self.stream.is_due(self.delay_steps):
                self._prefix, self._request = self.stream.ask(self.delay_steps), message
                self._changed.notify()
            return self.stream.next_action()

    def _ask_on(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._request is not None or self._closed)
                if self._closed:
                    break
                message, generation, self._request = self._request, self._generation, None
                options = {"episode": generation} | ({} if self._prefix is None else {"prefix": self._prefix})
            began = time.perf_counter()
            try:
                self._connection = self._connection or self._connect_again()
                reply = self._connection.ask(options | (message() if callable(message) else message))
                chunk, error = self._chunk(reply), None
            except ServerError as failure:
                chunk, error = None, str(failure)
            # Broad on purpose: making the message may be the robot's own code, and nobody watches this thread.
            except Exception as failure:
                chunk, error = None, f"the message can't be made or sent: {type(failure).__name__}: {failure}"
            with self._changed:
                if error not in (None, self.last_error):
                    logger.warning("no new actions: %s", error)
                self.last_error = error
                if error is None:
                    self.latencies_s.append(time.perf_counter() - began)
                    if generation == self._generation:
                        self.stream.accept(chunk)
                    continue
                if self._connection is not None and self._connection.closed:
                    self._connection = None
                    self.losses += 1
                    self.stream.hold()
                # A server that is restarting is not asked at once; the next request has a newer observation.
                self._changed.wait_for(lambda: self._closed, timeout=RETRY_S)
                self._request = None
                self.stream.give_up()
        if self._connection is not None:
            self._connection.close()

    def _connect_again(self) -> PolicyConnection:
        connection = self._connect()
        changed = [name for name in _SAME if connection.metadata.get(name) != self.metadata.get(name)]
        if changed:
            connection.close()
            raise ServerError(f"another policy is served now ({', '.join(changed)}): start the robot anew")
        return connection

    def _chunk(self, reply: dict[str, Any]) -> np.ndarray:
        chunk, columns = reply.get("actions"), self.metadata["action_dim"]
        if not isinstance(chunk, np.ndarray) or chunk.shape[1:] != (columns,) or not np.isfinite(chunk).all():
            raise ServerError(f"the server answered no chunk of (n, {columns}) finite actions")
        return chunk
