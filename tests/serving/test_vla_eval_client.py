"""vla-eval's own server class around a function of the state, evaluated as a checkpoint is."""

import numpy as np
import pytest

from vla0_trl.evaluation.arguments import EvaluationArguments
from vla0_trl.evaluation.policy_source import PolicyError
from vla0_trl.serving.remote_policy import LIBERO, PUSHT, remote_policy
from vla0_trl.serving.vla_eval_client import within_half_a_turn

vla_eval = pytest.importorskip("vla_eval", reason="pip install vla-eval==0.8.0")


def server(params: dict, answer, chunk_size: int = 2):
    """Their class: `answer` gives (chunk_size, action_dim) from an observation."""
    from vla_eval.model_servers.predict import PredictModelServer

    class Server(PredictModelServer):
        asked: list = []  # noqa: RUF012

        def get_observation_params(self):
            return params

        def predict(self, obs, ctx):
            self.asked.append((ctx.episode_id, obs))
            return {"actions": answer(obs)}

    Server.asked = []
    return Server(chunk_size=chunk_size)


def shown(episode: int, state: np.ndarray, cameras=("image",)) -> dict:
    picture = np.full((9, 9, 3), episode, np.uint8)
    return {"images": dict.fromkeys(cameras, picture), "state": state, "task": "push", "episode": episode}


def test_episodes_have_sessions_and_chunks_stay_in_the_server():
    model = server({"send_state": True}, lambda obs: np.stack([obs["states"], obs["states"] + 100]))
    with vla_eval.serve_background(model) as handle:
        source = remote_policy(EvaluationArguments(policy=handle.url.replace("ws://", "vla-eval://")), PUSHT)
        policy = source.load(source.config)
        assert (policy.config.chunk_size, policy.config.n_action_steps) == (1, 1) and len(source.checkpoint_hash) == 64
        actions = [
            policy.predict_action_chunk([shown(episode, np.full(2, 10.0 * step + episode)) for episode in episodes])
            for step, episodes in enumerate([(1, 2), (1, 2), (2, 3), (3,)])
        ]
    values = [chunk[:, 0, 0].tolist() for chunk in actions]
    # The second step is the first chunk's rest; the third episode takes the first one's session, and begins anew.
    assert values == [[1, 2], [101, 102], [22, 23], [123]]
    assert all(chunk.shape == (len(chunk), 1, 2) for chunk in actions)
    assert [len(model.asked), len({episode for episode, _ in model.asked})] == [4, 3]
    # Two connections: which of them is read first is chance.
    assert {(obs["images"]["agentview"].mean(), obs["task_description"]) for _, obs in model.asked[:2]} == {
        (1, "push"),
        (2, "push"),
    }


@pytest.mark.parametrize("params", [{}, {"send_state": True, "send_wrist_image": True}])
@pytest.mark.parametrize("robosuites", [False, True])
def test_a_server_is_shown_what_it_asks_for(params, robosuites):
    params = params | ({"quat_no_antipodal": True} if robosuites else {})
    model = server(params, lambda obs: np.zeros((2, 7)))
    state = np.array([0.1, 0.2, 0.3, 3.18, 0, 0, 0.04, -0.04])
    with vla_eval.serve_background(model) as handle:
        source = remote_policy(EvaluationArguments(policy=handle.url.replace("ws://", "vla-eval://")), LIBERO)
        source.load(source.config).predict_action_chunk([shown(1, state, ("image", "wrist_image"))])
    _, seen = model.asked[0]
    if "send_state" not in params:
        assert seen.keys() == {"images", "task_description"} and list(seen["images"]) == ["agentview"]
        return
    assert list(seen["images"]) == ["agentview", "wrist"]
    expected = state.copy()
    if not robosuites:
        expected[3] = 3.18 - 2 * np.pi
    np.testing.assert_allclose(seen["states"], expected, rtol=1e-6)


def test_half_a_turn_is_the_most():
    assert np.array_equal(within_half_a_turn(np.array([3.0, 0, 0])), [3.0, 0, 0])
    np.testing.assert_allclose(within_half_a_turn(np.array([3.18, 0, 0])), [3.18 - 2 * np.pi, 0, 0])


def test_what_goes_wrong_there_is_one_line():
    with vla_eval.serve_background(server({}, lambda obs: np.zeros((2, 3)))) as handle:
        url = handle.url.replace("ws://", "vla-eval://")
        policy = remote_policy(EvaluationArguments(policy=url), PUSHT).load(PUSHT.replace(chunk_size=1))
        with pytest.raises(PolicyError, match=r"answered an action of shape \(3,\), not \(2,\)"):
            policy.predict_action_chunk([shown(1, np.zeros(2))])
        with pytest.raises(ValueError, match="--n_action_steps would do nothing with vla-eval://"):
            remote_policy(EvaluationArguments(policy=url, n_action_steps=2), PUSHT)

    def fails(obs):
        raise RuntimeError("out of memory")

    with vla_eval.serve_background(server({}, fails)) as handle:
        url = handle.url.replace("ws://", "vla-eval://")
        policy = remote_policy(EvaluationArguments(policy=url), PUSHT).load(PUSHT.replace(chunk_size=1))
        with pytest.raises(PolicyError, match="vla-eval's server answered error"):
            policy.predict_action_chunk([shown(1, np.zeros(2))])
    with pytest.raises(ValueError, match=r"no policy at vla-eval://127\.0\.0\.1:9"):
        remote_policy(EvaluationArguments(policy="vla-eval://127.0.0.1:9"), PUSHT)
