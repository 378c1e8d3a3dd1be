"""What answers at an address is evaluated as a checkpoint is: ours, which says what it sees, and others."""

from contextlib import AbstractContextManager

import numpy as np
import pytest
from support.backbones import observations
from support.episodes import small_result
from support.random_policies import build_policy
from support.serving import served, websocket_server

from vla0_trl import VLAPolicy
from vla0_trl.envs.pusht.env import PushTEnv
from vla0_trl.evaluation.arguments import EvaluationArguments
from vla0_trl.evaluation.driver import Run, Simulation, execution_protocol, open_log
from vla0_trl.evaluation.policy_source import PolicyError
from vla0_trl.serving.codec import pack, unpack
from vla0_trl.serving.layouts import LAYOUTS
from vla0_trl.serving.remote_policy import LIBERO, PUSHT, remote_policy


def batch(count: int) -> list[dict]:
    return [observation | {"episode": (0, number)} for number, observation in enumerate(observations(count, seed=6))]


def openpis_server(answer) -> AbstractContextManager[str]:
    """A server as openpi's own: metadata that say nothing, and one reply after the other. Gives its address."""

    def converse(connection) -> None:
        connection.send(pack({}))
        for data in connection:
            reply = answer(unpack(data))
            connection.send(reply if isinstance(reply, str) else pack({"actions": reply}))

    return websocket_server(converse)


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


@pytest.mark.parametrize("change", [{"temperature": 0.7}, {"ensemble_size": 3}])
def test_runs_and_retries_begin_anew_on_the_server(change):
    base = build_policy("nano")
    policy = VLAPolicy(base.model, base.processor, base.config.replace(**change))
    first, later = ({"noise": 7} | observation for observation in observations(2, seed=6))
    with served(policy) as server:
        source = remote_policy(EvaluationArguments(policy=f"ws://127.0.0.1:{server.port}"), PUSHT)
        remote = source.load(source.config)
        begun, gone_on, retried = (
            remote.predict_action_chunk([observation | {"episode": (7, attempt)}])
            for observation, attempt in ((first, 0), (later, 0), (first, 1))
        )
        remote.reset()  # the perturbed run has the same seeds
        begun_again = remote.predict_action_chunk([first | {"episode": (7, 0)}])
        assert np.array_equal(remote.predict_action_chunk([later | {"episode": (7, 0)}]), gone_on)
    assert np.array_equal(retried, begun) and np.array_equal(begun_again, begun)
    if "temperature" in change:
        twin = VLAPolicy(base.model, base.processor, policy.config)
        assert np.array_equal(twin.predict_action_chunk([first | {"episode": (7, 1)}]), begun)


def test_a_run_does_not_begin_with_another_policy():
    policy = build_policy("nano")
    with served(policy) as server:
        source = remote_policy(EvaluationArguments(policy=f"ws://127.0.0.1:{server.port}"), PUSHT)
        remote = source.load(source.config)
        remote.reset()
        server.revision = "another"
        with pytest.raises(PolicyError, match="another policy is served at ws://127"):
            remote.reset()


def test_vla_evals_episodes_end_with_their_run():
    heard = []

    def converse(connection) -> None:
        for data in connection:
            message = unpack(data)
            heard.append(message["type"])
            if (kind := {"hello": "hello", "observation": "action"}.get(message["type"])) is not None:
                action = {"__ndarray__": True, "data": np.zeros(2).tobytes(), "dtype": "<f8", "shape": [2]}
                connection.send(pack({"type": kind, "payload": {"actions": action}}))

    with websocket_server(converse) as url:
        source = remote_policy(EvaluationArguments(policy=url.replace("ws://", "vla-eval://")), PUSHT)
        policy = source.load(source.config)
        for _ in range(2):
            policy.reset()
            for _ in range(2):
                policy.predict_action_chunk(batch(1))
    run = ["episode_start", "observation", "observation"]
    assert heard == ["hello", *run, "episode_end", *run]


def test_what_a_server_decides_is_recorded_as_a_checkpoints():
    base = build_policy("nano")
    drawing = base.config.replace(temperature=0.7)
    averaging = base.config.replace(ensemble_size=2, ensemble_decay=0.1)
    recorded = []
    for config in (drawing, averaging):
        with served(VLAPolicy(base.model, base.processor, config)) as server:
            server.running = {"dtype": "float32", "decoding": "parallel", "refine": 2}
            source = remote_policy(EvaluationArguments(policy=f"ws://127.0.0.1:{server.port}"), PUSHT)
        assert source.identified
        recorded.append(execution_protocol(source.config) | source.protocol)
    running = {"policy": "openpi's protocol", "dtype": "float32", "decoding": "parallel", "refine": 2}
    assert recorded == [execution_protocol(drawing) | running, execution_protocol(averaging) | running]


def test_of_a_server_that_does_not_tell_its_model_the_address_is_known_and_going_on_is_said(tmp_path, capsys):
    run = Run(folder=tmp_path / "run", protocol={}, make_env=PushTEnv)
    simulation = Simulation(config=PUSHT, seeds=[0, 1], filmed=(), fps=10.0, runs=[run], packages=())
    hashes = []
    for _ in range(2):
        with openpis_server(lambda message: np.zeros((10, 2))) as url:
            args = EvaluationArguments(policy=url, overwrite=bool(hashes))
            source = remote_policy(args, PUSHT)
        hashes.append(source.checkpoint_hash)
        with open_log(run, simulation, source, args) as log:
            log.append(small_result(0))
        assert not capsys.readouterr().err
    assert hashes[0] != hashes[1]
    args.overwrite = False
    open_log(run, simulation, source, args).close()
    assert f"has 1 episodes already, and {url} does not say which model answers" in capsys.readouterr().err
    args.launch, args.num_processes = "together", 2
    with open_log(run, simulation, source, args):
        capsys.readouterr()
        args.rank = 1
        open_log(run, simulation, source, args).close()
        assert not capsys.readouterr().err, "the first process has said it, or they are of this launch"


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
    for flag, value in {"dtype": "float32", "temperature": 0.3}.items():
        with pytest.raises(ValueError, match=f"--{flag} would do nothing with --policy"):
            remote_policy(EvaluationArguments(policy="ws://127.0.0.1:9", **{flag: value}), PUSHT)
    for both in ({}, {"policy": "ws://127.0.0.1:9", "model_name_or_path": "a"}):
        with pytest.raises(ValueError, match="give one of --model_name_or_path and --policy"):
            EvaluationArguments(**both)
