"""vla-eval's benchmarks: its own evaluation of a toy one, and LIBERO's orientation."""

import numpy as np
import pytest
from support.general import load_script
from support.random_policies import build_policy

from vla0_trl import VLAConfig
from vla0_trl.actions import NormStats
from vla0_trl.policy.execution import ChunkExecutor
from vla0_trl.serving.vla_eval import nearest_axis_angle, observation_params, read_observation


def libero_config(mean: np.ndarray) -> VLAConfig:
    ends = np.full(8, 4.0)
    stats = NormStats(-ends, ends, -ends, ends, mean, np.ones(8), 9)
    return VLAConfig(cameras=["image", "image2"], state_dim=8, action_dim=7, use_state=True, state_stats=stats)


def quaternions(count: int) -> np.ndarray:
    """(count, 4), x y z w: rotations of up to a radian about where LIBERO's gripper points, which is half a turn."""
    rng = np.random.default_rng(0)
    axis = rng.normal(size=(count, 3))
    axis /= np.linalg.norm(axis, axis=1, keepdims=True)
    half = rng.uniform(0, 0.5, (count, 1))
    small = np.concatenate([axis * np.sin(half), np.cos(half)], 1)
    x, y, z, w = small.T
    return np.stack([w, z, -y, -x], 1)  # (x, y, z, w) times half a turn about x


def test_orientations_are_those_of_robosuite():
    transforms = pytest.importorskip("robosuite.utils.transform_utils", reason="needs the extra [libero]")
    mean = np.array([np.pi, 0.0, 0.0])
    flipped = 0
    for quaternion in quaternions(2000):
        expected = transforms.quat2axisangle(quaternion.copy())
        # vla-eval's: the quaternion with w ≥ 0 first
        theirs = transforms.quat2axisangle(quaternion if quaternion[3] >= 0 else -quaternion)
        flipped += not np.allclose(theirs, expected)
        assert np.allclose(nearest_axis_angle(theirs, mean), expected, atol=1e-5)
        assert np.allclose(nearest_axis_angle(expected, mean), expected, atol=1e-5)
    assert flipped > 500


def test_no_rotation_stays_none():
    assert np.array_equal(nearest_axis_angle(np.zeros(3), np.array([np.pi, 0, 0])), np.zeros(3))


def test_a_libero_observation_is_read():
    config = libero_config(np.array([0, 0, 0, 3.1, 0, 0, 0, 0]))
    picture, wrist = np.zeros((9, 9, 3), np.uint8), np.ones((9, 9, 3), np.uint8)
    found = {"images": {"agentview": picture, "wrist": wrist}, "task_description": "pick it up"}
    found["states"] = np.array([0.1, 0.2, 0.3, -3.10, 0, 0, 0.04, -0.04])
    observation = read_observation(found, config)
    assert np.array_equal(observation["images"]["image"], picture)
    assert np.array_equal(observation["images"]["image2"], wrist)
    expected = [0.1, 0.2, 0.3, 2 * np.pi - 3.10, 0, 0, 0.04, -0.04]
    np.testing.assert_allclose(observation["state"], expected, rtol=1e-6)
    assert observation["task"] == "pick it up"
    assert observation_params(config) == {"send_wrist_image": True, "send_state": True}


@pytest.mark.parametrize("key, error", [("images", "lacks cameras"), ("states", "has none: give it as 'state'")])
def test_what_is_absent_is_named(key, error):
    found = {"images": {name: np.zeros((9, 9, 3), np.uint8) for name in ("agentview", "wrist")}, "states": np.zeros(8)}
    found |= {"task_description": "go"}
    del found[key]
    with pytest.raises(ValueError, match=error):
        read_observation(found, libero_config(np.zeros(8)))


@pytest.mark.parametrize("execution", [{"n_action_steps": 3}, {"ensemble_size": 3}])
def test_vla_evals_own_evaluation(execution, tmp_path):
    vla_eval = pytest.importorskip("vla_eval", reason="pip install vla-eval==0.8.0")
    from support import toy_benchmark

    policy, twin = build_policy("nano"), build_policy("nano")
    for part in (policy.model, policy.processor, policy.config):
        part.save_pretrained(tmp_path / "policy")
    server = load_script("eval/vla_eval_server.py").VLA0Server(str(tmp_path / "policy"), **execution)
    config = {"benchmarks": [{"benchmark": "support.toy_benchmark:Toy", "episodes_per_task": 1}]}
    results = vla_eval.evaluate(server, config, docker=False, no_save=True, output_dir=tmp_path / "results")
    assert len(results) == 1 and len(toy_benchmark.executed) == toy_benchmark.TASKS
    for number in range(toy_benchmark.TASKS):
        executor, expected = ChunkExecutor(twin.config.replace(**execution)), []
        for place, observation in enumerate(toy_benchmark.shown(number)):
            if len(expected) == place:
                expected += list(executor.actions(twin.predict_action_chunk([observation])[0]))
        assert np.array_equal(toy_benchmark.executed[f"task {number}"], np.stack(expected))
