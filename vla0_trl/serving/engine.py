"""One thread asks the policy, for all robots: the event loop never waits for a model, and robots share its batches.

A session is one episode of one connection. It has at most one observation waiting: the newest wins.
"""

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from vla0_trl.policy.execution import ChunkExecutor
from vla0_trl.policy.policy import VLAPolicy
from vla0_trl.schema import one_line
from vla0_trl.serving.requests import Request

MAX_SESSIONS = 4096  # whose executors are remembered; the one that has been silent for longest is forgotten
RECENT_S = 10.0  # a session that asked within this time may ask again soon: others wait a moment to share its batch
KEPT_LATENCIES = 1000
WARM_ROUNDS = 5

logger = logging.getLogger(__name__)


class NotAnswered(RuntimeError):
    """A request got no actions: a newer one came, its time was over, or the policy failed; one line."""


@dataclass
class Reply:
    """What the policy answered.

    Attributes:
        actions (`np.ndarray`): float32 (n, action_dim), ready to execute: the chunk, or an ensemble's next action.
        queue_s, infer_s (`float`): waited; and the time of the policy's call, which served `batch` sessions.
    """

    actions: np.ndarray
    queue_s: float
    infer_s: float
    batch: int


@dataclass
class _Waiting:
    session: Hashable
    request: Request
    arrived: float
    reply: Future[Reply] = field(default_factory=Future)

    def refuse(self, why: str) -> None:
        """Answer by this error, unless the client has gone."""
        if self.reply.set_running_or_notify_cancel():
            self.reply.set_exception(NotAnswered(f"not answered: {why}"))


class Engine:
    """A policy behind a queue. `start` it; `submit` from any thread; `stop` it.

    Args:
        policy ([`VLAPolicy`]): used by the engine's thread alone from now on.
        max_batch (`int`): sessions in one call of the policy, at most.
        window_s (`float`): how long a request waits for others to share its batch, if they have asked recently.
    """

    def __init__(self, policy: VLAPolicy, max_batch: int = 8, window_s: float = 0.005):
        self.policy, self.max_batch, self.window_s = policy, max_batch, window_s
        self.ensembles = policy.config.ensemble_size > 1
        if policy.decoder is not None and policy.model.device.type == "cuda":
            policy.decoder.kept_batch_sizes = max_batch  # on a CPU a cache costs next to nothing to make
        self._latencies: deque[float] = deque(maxlen=KEPT_LATENCIES)
        self._waiting: OrderedDict[Hashable, _Waiting] = OrderedDict()
        self._seen: OrderedDict[Hashable, float] = OrderedDict()
        self._executors: OrderedDict[Hashable, ChunkExecutor] = OrderedDict()
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="policy", daemon=True)

    def warm_up(self, request: Request) -> None:
        """Answer this request at every batch size, the largest first: checks, allocations and CUDA graphs are done."""
        for size in range(self.max_batch, 0, -1):
            for _ in range(1 if size > 1 else WARM_ROUNDS + 1):
                began = time.perf_counter()
                self.policy.predict_action_chunk([request.observation] * size)
                if size == 1:
                    self._latencies.append(time.perf_counter() - began)
        if self.max_batch == 1:
            self._latencies.popleft()  # held the decoder's check
        self.policy.reset()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Answer what is being computed, refuse what waits, end the thread."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, session: Hashable, request: Request) -> Future[Reply]:
        """The reply to come; the session's request that still waits, if any, is answered by [`NotAnswered`].

        The future's other errors: `ValueError` for what does not fit the checkpoint.
        """
        waiting = _Waiting(session, request, time.perf_counter())
        with self._changed:
            if self._stopped:
                waiting.refuse("the server is stopping")
                return waiting.reply
            older = self._waiting.get(session)
            self._waiting[session] = waiting  # in the older one's place
            self._seen[session] = waiting.arrived
            self._seen.move_to_end(session)
            while len(self._seen) > MAX_SESSIONS:
                self._seen.popitem(last=False)
            self._changed.notify()
        if older is not None:
            older.refuse("a newer observation of this session came")
        return waiting.reply

    def percentiles(self) -> dict[str, float]:
        """`p50` and `p95` of the milliseconds from a request's arrival to its reply, of the newest ones."""
        latencies = list(self._latencies)
        if not latencies:
            return {}
        p50, p95 = np.percentile(latencies, (50, 95)) * 1000
        return {"p50": round(float(p50), 3), "p95": round(float(p95), 3)}

    # -- the thread

    def _run(self) -> None:
        while (batch := self._next_batch()) is not None:
            now = time.perf_counter()
            timely = []
            for waiting in batch:
                deadline = waiting.request.deadline_s
                if deadline is not None and now - waiting.arrived > deadline:
                    waiting.refuse(f"its {deadline:g} s were over in the queue")
                elif waiting.reply.set_running_or_notify_cancel():
                    timely.append(waiting)
            if timely:
                self._answer(timely)

    def _next_batch(self) -> list[_Waiting] | None:
        """The sessions that have waited for longest; None when the engine stops."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopped)
            if not self._stopped:
                first = next(iter(self._waiting.values())).arrived
                recent = sum(seen > first - RECENT_S for seen in self._seen.values())
                enough = min(self.max_batch, recent)
                left = first + self.window_s - time.perf_counter()
                self._changed.wait_for(lambda: len(self._waiting) >= enough or self._stopped, timeout=max(0, left))
            if self._stopped:
                for waiting in self._waiting.values():
                    waiting.refuse("the server is stopping")
                self._waiting.clear()
                return None
            return [self._waiting.popitem(last=False)[1] for _ in range(min(self.max_batch, len(self._waiting)))]

    def _answer(self, batch: list[_Waiting]) -> None:
        began = time.perf_counter()
        names = ["" if waiting.request.noise is None else waiting.request.noise for waiting in batch]
        observations = [
            {**waiting.request.observation, "episode": waiting.session, "noise": name}
            for waiting, name in zip(batch, names, strict=True)
        ]
        prefixes = [waiting.request.prefix for waiting in batch]
        try:
            chunks = self.policy.predict_action_chunk(observations, prefixes)
            actions = [self._executable(waiting.session, chunk) for waiting, chunk in zip(batch, chunks, strict=True)]
        except ValueError as error:
            if len(batch) == 1:
                batch[0].reply.set_exception(error)
            for waiting in batch if len(batch) > 1 else ():  # one of them is wrong: the others get their answers
                self._answer([waiting])
            return
        # Broad on purpose: whatever a model or driver raises, the thread must serve on, and the robot must be told.
        except Exception as error:
            logger.exception("the policy failed")
            for waiting in batch:
                failure = NotAnswered(one_line(f"the policy failed: {type(error).__name__}: {error}"))
                waiting.reply.set_exception(failure)
            return
        done = time.perf_counter()
        for waiting, executable in zip(batch, actions, strict=True):
            self._latencies.append(done - waiting.arrived)
            waiting.reply.set_result(Reply(executable, began - waiting.arrived, done - began, len(batch)))

    def _executable(self, session: Hashable, chunk: np.ndarray) -> np.ndarray:
        if not self.ensembles:
            return self.policy.config.postprocess_actions(chunk)
        executor = self._executors.setdefault(session, ChunkExecutor(self.policy.config))
        self._executors.move_to_end(session)
        while len(self._executors) > MAX_SESSIONS:
            self._executors.popitem(last=False)
        return executor.actions(chunk)
