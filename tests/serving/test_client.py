"""A robot that acts while its server thinks: what it executes, and when it holds its position."""

import threading
import time

import numpy as np
import pytest
from support.backbones import observations
from support.random_policies import build_policy
from support.serving import plain_message, served, websocket_server
from websockets.exceptions import ConnectionClosed

from vla0_trl.serving import client as clients
from vla0_trl.serving.client import ChunkStream, PolicyConnection, RobotClient, ServerError


def chunk(first: int, size: int = 8) -> np.ndarray:
    """Actions that say which step they were planned for."""
    return np.arange(first, first + size, dtype=np.float32)[:, None]


def drive(stream: ChunkStream, delay: int, steps: int, believed: int | None = None) -> list[float | None]:
    """Step numbers that are executed where each reply comes `delay` steps after its request, and plans from there."""
    executed, due, planned = [], None, 0
    for step in range(steps):
        if due == step:
            stream.accept(chunk(planned))
            due = None
        if stream.is_due(delay if believed is None else believed):
            stream.ask(delay if believed is None else believed)
            due, planned = step + delay, stream.executed
            if not delay:
                stream.accept(chunk(planned))
                due = None
        action = stream.next_action()
        executed.append(None if action is None else float(action[0]))
    return executed


def test_without_delay_chunks_follow_each_other():
    assert drive(ChunkStream(8, 5), 0, 12) == [float(step) for step in range(12)]


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_prefetching_never_stops_after_the_first_chunk(delay):
    executed = drive(ChunkStream(8, 5), delay, 30)
    assert executed == [None] * delay + [float(step) for step in range(30 - delay)]


def test_stopping_to_think_holds_at_each_chunk():
    executed = drive(ChunkStream(8, 5, prefetch=False), 2, 14)
    assert executed == [None, None, 0, 1, 2, 3, 4, None, None, 5, 6, 7, 8, 9]


def test_only_actions_that_were_executed_are_left_out():
    """A reply later than expected: the robot ran dry, and held; the chunk goes on where it stopped."""
    executed = drive(ChunkStream(8, 5), 5, 20, believed=2)
    assert executed == [None] * 5 + [0, 1, 2, 3, 4, None, None, None, 5, 6, 7, 8, 9, None, None]


def test_the_prefix_is_what_is_executed_meanwhile():
    stream = ChunkStream(8, 5, use_prefix=True)
    assert stream.is_due(2) and stream.ask(2) is None  # nothing is planned yet
    assert not stream.is_due(2)
    stream.accept(chunk(0))
    for _ in range(3):
        stream.next_action()
    assert stream.is_due(2)
    assert stream.ask(2).ravel().tolist() == [3, 4]
    assert [float(stream.next_action()[0]) for _ in range(2)] == [3, 4]
    stream.accept(np.concatenate([chunk(3, 2), chunk(100, 6)]))
    assert [float(stream.next_action()[0]) for _ in range(5)] == [100, 101, 102, 103, 104]


def test_without_prefix_none_is_sent():
    stream = ChunkStream(8, 8)
    stream.ask(2)
    stream.accept(chunk(0))
    assert stream.ask(2) is None


# -- over the network


@pytest.fixture
def policy():
    policy = build_policy("nano")
    policy.config = policy.config.replace(n_action_steps=3)
    return policy


def steps(client: RobotClient, message: dict, count: int, seconds: float = 0.02) -> list:
    actions = []
    for _ in range(count):
        actions.append(client.step(message))
        time.sleep(seconds)
    return actions


def until_it_acts(client: RobotClient, message: dict) -> np.ndarray:
    """The first action, however busy the machine is."""
    for _ in range(3000):
        if (action := client.step(message)) is not None:
            return action
        time.sleep(0.01)
    raise AssertionError(f"no action in 30 s: {client.last_error}")


def test_a_robot_is_driven(policy):
    (observation,) = observations(1)
    expected = build_policy("nano").predict_action_chunk([observation])[0]
    with served(policy, warm=True) as server, RobotClient(f"ws://127.0.0.1:{server.port}") as client:
        assert client.metadata["n_action_steps"] == 3 and client.delay_steps >= 2
        assert np.array_equal(until_it_acts(client, plain_message(observation)), expected[0])
        for _ in range(20):
            until_it_acts(client, plain_message(observation))
        assert client.last_error is None and client.stream.executed == 21


def test_a_reply_that_is_too_late_is_never_executed(policy, monkeypatch):
    monkeypatch.setattr(clients, "RETRY_S", 0.1)
    (observation,) = observations(1)
    slow, release, predict = threading.Event(), threading.Event(), policy.predict_action_chunk

    def sometimes_slow(*arguments):
        chunks = predict(*arguments)
        if slow.is_set():
            assert release.wait(30)
            return np.full_like(chunks, -1)  # nobody must ever see it
        return chunks

    monkeypatch.setattr(policy, "predict_action_chunk", sometimes_slow)
    with served(policy, warm=True) as server, RobotClient(f"ws://127.0.0.1:{server.port}", timeout_s=0.5) as client:
        until_it_acts(client, plain_message(observation))
        slow.set()
        held = steps(client, plain_message(observation), 60)
        assert held[-1] is None and "did not answer" in client.last_error
        slow.clear()
        release.set()
        after = [until_it_acts(client, plain_message(observation)) for _ in range(8)]
    assert all(action is None or (action >= 0).all() for action in [*held, *after])


def test_a_robot_that_lost_its_server_holds_at_once_and_goes_on_with_the_same_policy_only(policy, monkeypatch):
    monkeypatch.setattr(clients, "RETRY_S", 0.1)
    policy.config = policy.config.replace(n_action_steps=4)
    (observation,) = observations(1)
    message = plain_message(observation)
    with served(policy, warm=True) as server:
        client = RobotClient(f"ws://127.0.0.1:{server.port}")
        client.latencies_s.extend([1 / client.metadata["fps"]] * 40)  # it asks with two of four actions left
        until_it_acts(client, message)
    with client:
        while not client.losses:
            assert client.step(message) is not None
            time.sleep(0.5)
        assert client.step(message) is None and client.stream.executed == 3
        policy.config = policy.config.replace(n_action_steps=3)
        with served(policy, port=server.port, warm=True):
            assert steps(client, message, 60) == [None] * 60
            assert client.last_error == "another policy is served now (n_action_steps): start the robot anew"
        policy.config = policy.config.replace(n_action_steps=4)
        with served(policy, port=server.port, warm=True):
            until_it_acts(client, message)
            assert client.last_error is None and client.losses == 1


def test_a_reply_that_is_no_chunk_is_an_error_and_the_robot_holds(policy, monkeypatch):
    monkeypatch.setattr(clients, "RETRY_S", 0.1)
    (observation,) = observations(1)
    with served(policy, warm=True) as server, RobotClient(f"ws://127.0.0.1:{server.port}") as client:
        client.metadata["action_dim"] = 3
        assert steps(client, plain_message(observation), 30) == [None] * 30
        assert client.last_error == "the server answered no chunk of (n, 3) finite actions"


def test_a_message_that_cannot_be_made_is_said_and_the_robot_holds(policy, monkeypatch, caplog):
    monkeypatch.setattr(clients, "RETRY_S", 0.1)
    (observation,) = observations(1)
    message = plain_message(observation)

    def unplugged():
        raise OSError("camera 'front' is gone")

    with served(policy, warm=True) as server, RobotClient(f"ws://127.0.0.1:{server.port}") as client:
        until_it_acts(client, message)
        for bad, error in (
            (unplugged, "OSError: camera 'front' is gone"),
            ({"n": 2**70}, "CodecError: int can't be sent"),
        ):
            assert steps(client, bad, 40)[10:] == [None] * 30
            assert client.last_error.startswith(f"the message can't be made or sent: {error}")
            assert caplog.text.count(f"no new actions: {client.last_error}") == 1
            until_it_acts(client, lambda: message)
        assert client.last_error is None and client.losses == 0


def test_a_line_of_error_is_kept_and_the_robot_holds(policy, monkeypatch):
    monkeypatch.setattr(clients, "RETRY_S", 0.1)
    (observation,) = observations(1)
    with served(policy) as server, RobotClient(f"ws://127.0.0.1:{server.port}") as client:
        assert steps(client, {"prompt": "go"}, 20) == [None] * 20
        assert "the request lacks ['observation/image', 'observation/state']" in client.last_error
        until_it_acts(client, plain_message(observation))
        client.reset()
        assert client.stream.executed == 0 and client.step(plain_message(observation)) is None


def test_a_server_that_averages_is_refused(policy):
    policy.config = policy.config.replace(ensemble_size=2, n_action_steps=None)
    with served(policy) as server, pytest.raises(ServerError, match=r"averages chunks .* with --ensemble_size 1$"):
        RobotClient(f"ws://127.0.0.1:{server.port}")


@pytest.mark.parametrize("first", [None, b"\xc1"])
def test_a_server_without_metadata_is_left(first):
    left = threading.Event()

    def converse(connection) -> None:
        if first is not None:
            connection.send(first)
        with pytest.raises(ConnectionClosed):
            connection.recv()
        left.set()

    with websocket_server(converse) as url:
        with pytest.raises(ServerError, match=f"no policy at {url}: .+"):
            PolicyConnection(url, timeout_s=0.5)
        assert left.wait(10)


def test_no_server_and_a_wrong_key_are_one_line(policy):
    with pytest.raises(ServerError, match=r"no policy at ws://127\.0\.0\.1:9: "):
        PolicyConnection("ws://127.0.0.1:9")
    with served(policy, api_key="0123456789abcdef") as server, pytest.raises(ServerError, match="401"):
        PolicyConnection(f"ws://127.0.0.1:{server.port}", "wrong")
