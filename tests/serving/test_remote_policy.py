"""What answers at an address is evaluated as a checkpoint is: ours, which says what it sees, and others."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from support.backbones import observations
from support.random_policies import build_policy
from support.serving import served
from websockets.sync.server import serve

from vla0_trl import VLAPolicy
from vla0_trl.evaluation.arguments import EvaluationArguments
from vla0_trl.evaluation.policy_source import PolicyError
from vla0_trl.serving.codec import pack, unpack
from vla0_trl.serving.layouts import LAYOUTS
from vla0_trl.serving.remote_policy import LIBERO, PUSHT, remote_policy


def batch(count: int) -> list[dict]:
    return [observation | {"episode": (0, number)} for number, observation in enumerate(observations(count, seed=6))]


@contextmanager
def openpis_server(answer) -> Iterator[str]:
    """A server as openpi's own: metadata that say nothing, and one reply after the other. Gives its address."""

    def converse(connection) -> None:
        connection.send(pack({}))
        for data in connection:
            reply = answer(unpack(data))
            connection.send(reply if isinstance(reply, str) else pack({"actions": reply}))

    with serve(converse, "127.0.0.1", 0, compression=None, max_size=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()
        thread.join()


def test_our_server_gives_the_checkpoints_chunks_and_config():
    policy, twin = build_policy("nano"), build_policy("nano")
    policy.config = policy.config.replace(n_action_steps=3)
    with served(policy) as server:
        source = remote_policy(EvaluationArguments(policy=f"ws://127.0.0.1:{server.port}"), PUSHT)
        remote = source.load(source.config.replace(n_action_steps=2))
        assert (source.config.chunk_size, source.config.n_action_steps, remote.config.n_action_steps) == (4, 3, 2)
        assert source.config.cameras == ["image"] and source.checkpoint_hash == "revision"
        for asked in (batch(1), batch(5)):
            chunks = remote.predict_action_chunk(asked)
            assert np.array_equal(chunks, np.stack([twin.predict_action_chunk([one])[0] for one in asked]))


def test_a_server_that_averages_answers_one_action():
    base = build_policy("nano")
    policy = VLAPolicy(base.model, base.processor, base.config.replace(ensemble_size=2))
    with served(policy) as server:
        source = remote_policy(EvaluationArguments(policy=f"ws://127.0.0.1:{server.port}"), PUSHT)
        assert source.config.chunk_size == 1
        assert source.load(source.config).predict_action_chunk(batch(2)).shape == (2, 1, 2)


def test_openpis_server_is_shown_liberos_keys():
    seen = []

    def answer(message) -> np.ndarray:
        seen.append(message)
        return np.full((10, 7), message["observation/state"][0])

    shown = [
        {"images": dict.fromkeys(("image", "wrist_image"), np.zeros((9, 9, 3), np.uint8)), "state": np.full(8, state)}
        | {"task": "pick", "episode": state}
        for state in (1.0, 2.0)
    ]
    with openpis_server(answer) as url:
        source = remote_policy(EvaluationArguments(policy=url), LIBERO)
        chunks = source.load(source.config).predict_action_chunk(shown)
    assert (source.config.chunk_size, source.config.n_action_steps, source.config.gripper) == (10, 10, "sign")
    assert chunks.shape == (2, 10, 7) and (chunks[0] == 1).all() and (chunks[1] == 2).all()
    assert all(message.keys() == {*LAYOUTS["libero"].images, "observation/state", "prompt"} for message in seen)
    assert len(seen) == 3 and seen[1]["prompt"] == "pick" and len(source.checkpoint_hash) == 64


@pytest.mark.parametrize(
    "answer, error",
    [
        (lambda message: np.zeros((10, 7)), r"answers actions of shape \(10, 7\), not \(n, 2\)"),
        (lambda message: np.zeros(2), r"answers actions of shape \(2,\)"),
        (lambda message: "CUDA out of memory", "CUDA out of memory"),
    ],
)
def test_a_server_of_another_robot_is_one_line(answer, error):
    with openpis_server(answer) as url, pytest.raises(ValueError, match=error):
        remote_policy(EvaluationArguments(policy=url), PUSHT)


@pytest.mark.parametrize(
    "later, error",
    [(np.zeros((3, 2)), r"shape \(3, 2\), wanted \(4, 2\)"), (np.full((4, 2), np.nan), "all finite"), ("no", "no")],
)
def test_a_server_that_changes_its_mind_ends_the_evaluation(later, error):
    replies = iter([np.zeros((4, 2)), later])
    with openpis_server(lambda message: next(replies)) as url:
        source = remote_policy(EvaluationArguments(policy=url), PUSHT)
        with pytest.raises(PolicyError, match=error):
            source.load(source.config).predict_action_chunk(batch(1))


def test_flags_that_a_server_can_not_be_given():
    with pytest.raises(ValueError, match="--dtype would do nothing with --policy"):
        remote_policy(EvaluationArguments(policy="ws://127.0.0.1:9", dtype="float32"), PUSHT)
    for both in ({}, {"policy": "ws://127.0.0.1:9", "model_name_or_path": "a"}):
        with pytest.raises(ValueError, match="give one of --model_name_or_path and --policy"):
            EvaluationArguments(**both)
