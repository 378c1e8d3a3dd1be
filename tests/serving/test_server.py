"""openpi's protocol over real connections: metadata, actions, lines of error, and who is let in."""

import http.client
import re
import shutil
import ssl
import subprocess
import threading
import time
from contextlib import ExitStack

import numpy as np
import pytest
from support.backbones import observations
from support.random_policies import build_policy
from support.serving import ask, open_connection, plain_message, served
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from vla0_trl import VLAPolicy
from vla0_trl.actions import NormStats
from vla0_trl.serving.codec import pack, unpack
from vla0_trl.serving.layouts import LAYOUTS
from vla0_trl.serving.server import ServerOptions


@pytest.fixture(scope="module")
def server(policy):
    with served(policy, warm=True) as server:
        yield server


def test_the_server_speaks_first(server, policy):
    with open_connection(server) as connection:
        metadata = unpack(connection.recv())
    config = policy.config
    expected = {
        name: getattr(config, name) for name in ("fps", "chunk_size", "n_action_steps", "action_dim", "state_dim")
    }
    expected |= {"protocol": 1, "revision": "revision", "cameras": {"image": "observation/image"}, "task": "prompt"}
    assert metadata | expected == metadata
    assert 0 < metadata["latency_ms"]["p50"] <= metadata["latency_ms"]["p95"]
    assert not any(isinstance(value, np.ndarray) for value in metadata.values())


def test_actions_are_the_policys_to_the_byte(server, twin):
    batch = observations(5, seed=4)
    with open_connection(server) as connection:
        connection.recv()
        for observation in batch:
            reply = ask(connection, plain_message(observation))
            assert reply.keys() == {"actions", "server_timing"}  # a broker indexes every array
            actions = reply["actions"]
            assert actions.dtype == np.float32 and actions.shape == (4, 2) and np.isfinite(actions).all()
            assert actions.tobytes() == twin.predict_action_chunk([observation])[0].tobytes()
            assert all(isinstance(value, int | float) for value in reply["server_timing"].values())


def test_prefixes_reach_the_policy(server, twin):
    (observation,) = observations(1)
    prefix = np.float32([[7, 300], [8, 200]])
    with open_connection(server) as connection:
        connection.recv()
        reply = ask(connection, plain_message(observation) | {"prefix": prefix})
    assert np.array_equal(reply["actions"], twin.predict_action_chunk([observation], [prefix])[0])
    assert np.array_equal(reply["actions"][:2], prefix)


def test_grippers_are_signed_and_replies_as_long_as_the_layouts_robot_wants(policy):
    signed = VLAPolicy(policy.model, policy.processor, policy.config.replace(gripper="sign"))
    layout = LAYOUTS["pusht"].__class__(**{**vars(LAYOUTS["plain"]), "chunk_size": 3})
    (observation,) = observations(1)
    with served(signed, layout) as server, open_connection(server) as connection:
        metadata = unpack(connection.recv())
        actions = ask(connection, plain_message(observation))["actions"]
    chunk = signed.predict_action_chunk([observation])[0]
    assert np.array_equal(actions[:, 0], chunk[:3, 0]) and actions.shape == (3, 2)
    assert (metadata["chunk_size"], metadata["n_action_steps"]) == (3, 3)
    assert set(actions[:, 1]) <= {-1.0, 1.0}


@pytest.mark.parametrize(
    "message, error",
    [
        ("text", "a request is a binary frame of msgpack, this is text"),
        (b"\xc1", "the message is not openpi's msgpack"),
        ({"observation/image": 1}, "the request lacks"),
        (
            {"observation/image": np.zeros((9, 9, 2)), "observation/state": np.zeros(2), "prompt": "a"},
            "camera",
        ),
        ({"observation/image": np.zeros((9, 9, 3)), "observation/state": np.zeros(3), "prompt": "a"}, "has 3 numbers"),
        (
            {"observation/image": np.zeros((9, 9, 3)), "observation/state": np.zeros(2), "prompt": "\0<image>"},
            "the task",
        ),
    ],
)
def test_an_error_is_one_line_and_the_connection_lives(server, message, error):
    with open_connection(server) as connection:
        connection.recv()
        for _ in range(2):
            line = ask(connection, message)
            assert isinstance(line, str) and error in line and line.isprintable()
        assert ask(connection, plain_message(observations(1)[0]))["actions"].shape == (4, 2)


def test_requests_sent_ahead_are_answered_in_order(server, twin):
    """Sessions of their own, or the newest observation of one."""
    batch = observations(6, seed=8)
    with open_connection(server) as connection:
        connection.recv()
        for number, observation in enumerate(batch):
            connection.send(pack(plain_message(observation) | {"episode": number}))
        for observation in batch:
            expected = twin.predict_action_chunk([observation])[0]
            assert np.array_equal(unpack(connection.recv())["actions"], expected)
        for observation in batch:
            connection.send(pack(plain_message(observation)))
        replies = [connection.recv() for _ in batch]
    assert np.array_equal(unpack(replies[-1])["actions"], twin.predict_action_chunk([batch[-1]])[0])
    assert all(isinstance(reply, bytes) or "a newer observation" in reply for reply in replies)


def test_averaging_needs_to_know_episodes(policy):
    averaging = VLAPolicy(policy.model, policy.processor, policy.config.replace(ensemble_size=2))
    (observation,) = observations(1)
    with served(averaging) as server, open_connection(server) as connection:
        assert unpack(connection.recv())["ensemble_size"] == 2
        assert "send 'episode', or serve with --ensemble_size 1" in ask(connection, plain_message(observation))
        named = plain_message(observation) | {"episode": 0}
        assert ask(connection, named)["actions"].shape == (1, 2)
        assert "'prefix' is of no use" in ask(connection, named | {"prefix": np.zeros((1, 2))})


def test_pings_are_answered_while_the_model_computes(policy, monkeypatch):
    entered, release = threading.Event(), threading.Event()
    predict = policy.predict_action_chunk

    def slow(*arguments):
        entered.set()
        assert release.wait(30)
        return predict(*arguments)

    with served(policy) as server, open_connection(server) as connection:
        connection.recv()
        monkeypatch.setattr(policy, "predict_action_chunk", slow)
        connection.send(pack(plain_message(observations(1)[0])))
        assert entered.wait(30)
        assert connection.ping().wait(5)
        release.set()
        assert isinstance(connection.recv(), bytes)


def test_a_server_that_stops_answers_what_it_computes_and_refuses_what_waits(policy, monkeypatch):
    entered, release, stack = threading.Event(), threading.Event(), ExitStack()
    predict = policy.predict_action_chunk

    def slow(*arguments):
        entered.set()
        assert release.wait(30)
        return predict(*arguments)

    server = stack.enter_context(served(policy))
    monkeypatch.setattr(policy, "predict_action_chunk", slow)
    with open_connection(server) as connection:
        connection.recv()
        for episode in range(2):
            connection.send(pack(plain_message(observations(1)[0]) | {"episode": episode}))
            assert entered.wait(30)
        stopping = threading.Thread(target=stack.close)
        stopping.start()
        time.sleep(0.2)
        release.set()
        assert unpack(connection.recv(timeout=30))["actions"].shape == (4, 2)
        assert "the server is stopping" in connection.recv(timeout=30)
        with pytest.raises(ConnectionClosed):
            connection.recv(timeout=30)
    stopping.join(30)


def test_the_first_request_is_no_slower_than_others(server):
    (observation,) = observations(1)
    seconds = []
    for _ in range(9):
        with open_connection(server) as connection:
            connection.recv()
            began = time.perf_counter()
            ask(connection, plain_message(observation))
            seconds.append(time.perf_counter() - began)
    assert seconds[0] < 1.5 * np.median(seconds) + 0.02  # a busy machine


def test_an_so101_sends_what_lerobot_gives_and_says_its_units():
    base, stats = build_policy("nano"), NormStats.from_array(np.float32([[-170] * 6, [170] * 6]))
    config = base.config.replace(cameras=["front"], action_dim=6, state_dim=6, action_stats=stats, state_stats=stats)
    policy = VLAPolicy(base.model, base.processor, config)
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    joints = {name: 10.0 * place for place, name in enumerate(LAYOUTS["so100"].state)}
    message = {**joints, "front": image, "prompt": "pick it up"}
    with served(policy, LAYOUTS["so100"], "degrees") as server, open_connection(server) as connection:
        metadata = unpack(connection.recv())
        assert "does not say 'units', the checkpoint's are 'degrees'" in ask(connection, message)
        actions = ask(connection, message | {"units": "degrees"})["actions"]
    assert metadata["units"] == "degrees" and metadata["action_names"] == list(joints)
    state = np.array(list(joints.values()))
    expected = policy.predict_action_chunk([{"images": {"front": image}, "state": state, "task": "pick it up"}])[0]
    assert np.array_equal(actions, expected) and actions.shape == (4, 6)


# -- who is let in


def health(server) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("GET", "/healthz")
    response = connection.getresponse()
    return response.status, response.read()


def refused(server, **options) -> int:
    with pytest.raises(InvalidStatus) as caught:
        open_connection(server, **options)
    return caught.value.response.status_code


def test_healthz(server):
    assert health(server) == (200, b"OK\n")


def test_a_key_is_asked_for(policy):
    with served(policy, api_key="0123456789abcdef") as server:
        assert health(server) == (200, b"OK\n")
        for header in (
            {},
            {"Authorization": "Api-Key 0123456789abcdee"},
            {"Authorization": "Bearer 0123456789abcdef"},
        ):
            assert refused(server, additional_headers=header) == 401
        with open_connection(server, additional_headers={"Authorization": "Api-Key 0123456789abcdef"}) as connection:
            assert unpack(connection.recv())["protocol"] == 1


def test_pages_in_a_browser_are_refused(server):
    assert refused(server, origin="https://example.com") == 403


def test_connections_are_counted(policy):
    with served(policy, max_connections=1) as server:
        with open_connection(server) as connection:
            connection.recv()
            assert refused(server) == 503
        for _ in range(50):  # until the server has seen it leave
            time.sleep(0.1)
            if not server._replies:
                break
        with open_connection(server) as connection:
            assert connection.recv()


def test_a_message_beyond_the_limit_ends_its_connection_alone(policy):
    with served(policy, max_mb=1) as server, open_connection(server) as other:
        other.recv()
        with open_connection(server) as connection:
            connection.recv()
            with pytest.raises(ConnectionClosed, match="1009"):
                connection.send(b"\0" * (1 << 20) + b"\0")
                connection.recv(timeout=30)
        assert ask(other, plain_message(observations(1)[0]))["actions"].shape == (4, 2)


def test_tls(policy, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate, and is not installed")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, "-days", "1"]
    words += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(words, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    with served(policy, tls=context) as server:
        url, trusted = f"wss://127.0.0.1:{server.port}", ssl.create_default_context(cafile=str(cert))
        with connect(url, ssl=trusted, compression=None, max_size=None) as connection:
            connection.recv()
            assert ask(connection, plain_message(observations(1)[0]))["actions"].shape == (4, 2)
        with pytest.raises(ssl.SSLCertVerificationError):
            connect(url)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "robot.local"])
def test_other_machines_need_a_key(host):
    with pytest.raises(ValueError, match=re.escape(f"--host {host} lets other machines move this robot: give")):
        ServerOptions(host=host)
    assert ServerOptions(host=host, insecure=True).host == ServerOptions(host=host, api_key="k").host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_this_machine_needs_none(host):
    assert ServerOptions(host=host).api_key is None
