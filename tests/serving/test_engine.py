"""One thread asks the policy: batches, sessions, deadlines, and what happens when it fails."""

import threading
import time

import numpy as np
import pytest
from support.backbones import observations

from vla0_trl.policy.execution import ChunkExecutor
from vla0_trl.serving import engine as engines
from vla0_trl.serving.engine import Engine, NotAnswered
from vla0_trl.serving.requests import Request


class Gate:
    """Stands before a policy: notes the batches, and lets them through when it is open."""

    def __init__(self, policy):
        self.policy, self.config, self.decoder = policy, policy.config, None
        self.batches: list[list] = []
        self.open, self.entered = threading.Event(), threading.Event()
        self.open.set()

    def predict_action_chunk(self, observations, prefixes=None):
        self.entered.set()
        assert self.open.wait(30)
        self.batches.append([observation["episode"] for observation in observations])
        return self.policy.predict_action_chunk(observations, prefixes)


@pytest.fixture
def gate(policy):
    policy.reset()
    return Gate(policy)


@pytest.fixture
def running(gate):
    """Engines that end with the test."""
    started = []

    def run(**options) -> Engine:
        started.append(Engine(gate, **options))
        started[-1].start()
        return started[-1]

    yield run
    gate.open.set()
    for engine in started:
        engine.stop()


def requests(count: int) -> list[Request]:
    return [Request(observation) for observation in observations(count, seed=2)]


def blocked(engine: Engine, gate: Gate):
    """The reply of a request that the policy is made to work on until the gate opens."""
    gate.open.clear()
    gate.entered.clear()
    reply = engine.submit("first", requests(1)[0])
    assert gate.entered.wait(30)
    return reply


def test_replies_are_those_of_the_policy(running, twin):
    engine = running()
    for request in requests(3):
        reply = engine.submit("robot", request).result(30)
        assert np.array_equal(reply.actions, twin.predict_action_chunk([request.observation])[0])
        assert reply.batch == 1 and reply.infer_s > 0 and reply.queue_s >= 0
    assert engine.percentiles()["p50"] <= engine.percentiles()["p95"]


def test_robots_that_wait_share_batches_oldest_first(running, gate, twin):
    engine, wanted = running(max_batch=3), requests(5)
    first = blocked(engine, gate)
    replies = [engine.submit(number, request) for number, request in enumerate(wanted)]
    gate.open.set()
    for request, reply in zip(wanted, replies, strict=True):
        assert np.array_equal(reply.result(30).actions, twin.predict_action_chunk([request.observation])[0])
    assert gate.batches == [["first"], [0, 1, 2], [3, 4]] and first.result().batch == 1


def test_a_request_waits_for_company_only_where_there_is_some(running, gate):
    engine, (request,) = running(window_s=5.0), requests(1)
    began = time.perf_counter()
    blocked(engine, gate)
    replies = [engine.submit(name, request) for name in ("first", "second")]
    gate.open.set()
    assert [reply.result(30).batch for reply in replies] == [2, 2]
    first = engine.submit("first", request)
    time.sleep(0.1)
    assert not first.done()  # the second may ask, too
    second = engine.submit("second", request)
    assert first.result(30).batch == second.result(30).batch == 2
    assert time.perf_counter() - began < 4  # nobody else is waited for


def test_the_newest_observation_of_a_session_wins(running, gate, twin):
    engine, (old, new) = running(), requests(2)
    blocked(engine, gate)
    replies = [engine.submit("robot", request) for request in (old, new)]
    gate.open.set()
    with pytest.raises(NotAnswered, match="a newer observation of this session came"):
        replies[0].result(30)
    expected = twin.predict_action_chunk([new.observation])[0]
    assert np.array_equal(replies[1].result(30).actions, expected)
    assert gate.batches == [["first"], ["robot"]]


def test_a_request_whose_time_is_over_is_not_computed(running, gate):
    engine, (request,) = running(), requests(1)
    blocked(engine, gate)
    late = engine.submit("late", Request(request.observation, deadline_s=0.01))
    timely = engine.submit("timely", Request(request.observation, deadline_s=60))
    time.sleep(0.05)
    gate.open.set()
    with pytest.raises(NotAnswered, match=r"its 0.01 s were over in the queue"):
        late.result(30)
    timely.result(30)
    assert gate.batches == [["first"], ["timely"]]


def test_what_one_robot_does_wrong_the_others_do_not_feel(running, gate, twin):
    engine, wanted = running(), requests(3)
    wanted[1] = Request(wanted[1].observation, prefix=np.zeros((4, 2), np.float32))
    first = blocked(engine, gate)
    replies = [engine.submit(number, request) for number, request in enumerate(wanted)]
    gate.open.set()
    with pytest.raises(ValueError, match="a prefix of 4 actions leaves nothing to predict"):
        replies[1].result(30)
    for place in (0, 2):
        expected = twin.predict_action_chunk([wanted[place].observation])[0]
        assert np.array_equal(replies[place].result(30).actions, expected)
    first.result(30)


def test_a_policy_that_fails_is_told_and_asked_again(running, gate, policy, monkeypatch, caplog):
    engine, (request,) = running(), requests(1)

    def out_of_memory(*_):
        raise RuntimeError("out of memory:\n 3 GB")

    monkeypatch.setattr(policy, "predict_action_chunk", out_of_memory)
    with pytest.raises(NotAnswered, match="the policy failed: RuntimeError: out of memory: 3 GB"):
        engine.submit("robot", request).result(30)
    assert "the policy failed" in caplog.text
    monkeypatch.undo()
    assert engine.submit("robot", request).result(30).actions.shape == (4, 2)


def test_a_client_that_left_costs_nothing(running, gate):
    engine, (request,) = running(), requests(1)
    blocked(engine, gate)
    gone, stays = engine.submit("gone", request), engine.submit("stays", request)
    assert gone.cancel()
    gate.open.set()
    stays.result(30)
    assert gate.batches == [["first"], ["stays"]]
    gate.open.clear()
    cancelled = engine.submit("robot", request)
    cancelled.cancel()
    newer = engine.submit("robot", request)  # replaces one that nobody waits for
    gate.open.set()
    newer.result(30)


def test_stopping_refuses_what_waits(running, gate):
    engine, (request,) = running(), requests(1)
    first = blocked(engine, gate)
    waits = engine.submit("robot", request)
    stopping = threading.Thread(target=engine.stop)
    stopping.start()
    time.sleep(0.05)
    gate.open.set()
    stopping.join(30)
    first.result(30)
    for reply in (waits, engine.submit("robot", request)):
        with pytest.raises(NotAnswered, match="the server is stopping"):
            reply.result(30)


def test_ensembles_average_per_session_and_sessions_are_bounded(running, gate, policy, twin, monkeypatch):
    gate.config = policy.config.replace(ensemble_size=3)
    monkeypatch.setattr(engines, "MAX_SESSIONS", 2)
    engine, wanted = running(), requests(4)
    executors = {"a": ChunkExecutor(gate.config), "b": ChunkExecutor(gate.config)}
    monkeypatch.setattr(policy, "_config", gate.config)
    for request in wanted:
        for name, executor in executors.items():
            expected = executor.actions(twin.predict_action_chunk([request.observation])[0])
            found = engine.submit(name, request).result(30).actions
            assert found.shape == (1, 2) and np.array_equal(found, expected)
    engine.submit("c", wanted[0]).result(30)
    assert list(engine._executors) == ["b", "c"] and len(engine._seen) == 2


def test_warming_up_leaves_nothing_to_be_done_first(policy):
    engine, request = Engine(policy, max_batch=4), requests(1)[0]
    chunks = policy.decoder.stats.chunks
    engine.warm_up(request)
    assert policy.decoder.stats.chunks - chunks >= 4 + 3 + 2 + 5 and not len(policy._sessions)
    assert engine.percentiles()["p50"] > 0
