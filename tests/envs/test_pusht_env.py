"""The PushT wrapper against gym-pusht itself."""

import gymnasium as gym
import numpy as np
import pytest

from vla0_trl.envs.pusht.env import (
    CAMERA,
    FPS,
    IMAGE_SIZE,
    MAX_EPISODE_STEPS,
    STATE_MODES,
    SUCCESS_COVERAGE,
    TASK,
    WORKSPACE,
    PushTEnv,
)


@pytest.fixture
def reference():
    """gym-pusht as LeRobot makes it: registered environment, pixels and agent position."""
    import gym_pusht  # noqa: F401  (registers the environment)

    env = gym.make("gym_pusht/PushT-v0", obs_type="pixels_agent_pos", render_mode="rgb_array")
    yield env
    env.close()


def wander(seed: int, steps: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(100, 400, size=(steps, 2)).astype(np.float32)


def test_constants_are_gym_pushts(reference):
    base = reference.unwrapped
    assert base.metadata["render_fps"] == FPS
    assert reference.spec.max_episode_steps == MAX_EPISODE_STEPS
    assert base.success_threshold == SUCCESS_COVERAGE
    assert base.action_space.high.tolist() == [WORKSPACE, WORKSPACE]
    assert (base.observation_height, base.observation_width) == (IMAGE_SIZE, IMAGE_SIZE)


def test_an_episode_equals_gym_pushts_own(reference):
    env = PushTEnv()
    env.reset(7)
    theirs, _ = reference.reset(seed=7)
    total = 0.0
    for action in wander(0, 40):
        ours = env.observe()
        assert np.array_equal(ours["images"][CAMERA], theirs["pixels"])
        assert np.array_equal(ours["state"], theirs["agent_pos"].astype(np.float32))
        env.step(action)
        theirs, reward, _, _, info = reference.step(action)
        total += reward
        assert env.coverage == pytest.approx(info["coverage"], abs=1e-12)
    assert env.result() == {
        "success": False,
        "max_coverage": env.max_coverage,
        "return": pytest.approx(total),
        "steps": 40,
    }


@pytest.mark.parametrize("mode", STATE_MODES)
def test_observation(mode):
    env = PushTEnv(state=mode)
    env.reset(3)
    observation = env.observe()
    assert observation["task"] == TASK
    assert observation["images"][CAMERA].shape == (96, 96, 3)
    assert observation["images"][CAMERA].dtype == np.uint8
    assert observation["state"].dtype == np.float32
    assert np.array_equal(observation["state"], env.full_state[: STATE_MODES[mode]].astype(np.float32))
    assert env.full_state.shape == (5,)


def test_the_angle_is_given_modulo_a_turn():
    env = PushTEnv(state="full")
    angles = []
    for seed in range(20):
        env.reset(seed)
        angles.append(env.full_state[4])
    assert all(0 <= angle < 2 * np.pi for angle in angles)
    assert max(angles) > np.pi  # gym-pusht draws from [-π, π], so about half would be negative


def test_the_seed_decides_the_start():
    first, second = PushTEnv(), PushTEnv()
    first.reset(5)
    for action in wander(1, 5):
        first.step(action)
    first.reset(11)
    second.reset(11)
    assert np.array_equal(first.full_state, second.full_state)
    assert (
        first.result()
        == second.result()
        == {
            "success": False,
            "max_coverage": first.coverage,
            "return": 0.0,
            "steps": 0,
        }
    )
    second.reset(12)
    assert not np.array_equal(first.full_state, second.full_state)


def test_looking_does_not_change_the_episode():
    blind, watched = PushTEnv(), PushTEnv()
    blind.reset(2)
    watched.reset(2)
    for action in wander(2, 20):
        watched.observe()
        watched.frame()
        blind.step(action)
        watched.step(action)
    assert np.array_equal(blind.full_state, watched.full_state)


def test_an_episode_goes_on_from_any_state():
    env, copy = PushTEnv("full"), PushTEnv("full")
    env.reset(3)
    for action in wander(3, 17):
        env.step(action)
    copy.reset_to(env.full_state)
    np.testing.assert_allclose(copy.full_state, env.full_state, atol=1e-9)
    np.testing.assert_array_equal(copy.observe()["images"][CAMERA], env.observe()["images"][CAMERA])
    assert (copy.coverage, copy.max_coverage, copy.steps) == (env.coverage, env.coverage, 0)

    free = [100, 200, 300, 250, 1.0]
    copy.reset_to(free)
    assert not copy.step(free[:2])
    np.testing.assert_allclose(copy.full_state, free, atol=1e-9)  # it began at rest, and stays


def test_frame_shows_the_last_action():
    env = PushTEnv()
    env.reset(0)
    env.step(np.array([480.0, 32.0]))
    frame = env.frame()
    assert frame.shape == (256, 256, 3)
    assert frame[16, 240].tolist() == [255, 0, 0]


def test_the_time_limit_ends_an_episode():
    env = PushTEnv(max_episode_steps=3)
    env.reset(0)
    still = env.full_state[:2]
    assert [env.step(still) for _ in range(3)] == [False, False, True]
    assert env.result()["steps"] == 3
    assert env.success is False
    with pytest.raises(RuntimeError, match="reset"):
        env.step(still)


def test_success_is_gym_pushts():
    """Put the block onto the target in gym-pusht's own space: the next step reports success and ends the episode."""
    env = PushTEnv()
    env.reset(0)
    env._env.block.angle = np.pi / 4
    env._env.block.position = (256, 256)
    assert env.step(np.array([20.0, 20.0])) is True
    assert env.success is True
    assert env.coverage > SUCCESS_COVERAGE
    assert env.max_coverage == env.coverage
    assert env.result()["return"] == 1.0


@pytest.mark.parametrize(
    "action", [np.array([np.nan, 1.0]), np.array([1.0, np.inf]), np.array([1.0]), np.zeros((1, 2)), np.zeros(3)]
)
def test_an_impossible_action_names_the_step(action):
    env = PushTEnv()
    env.reset(0)
    env.step(np.array([200.0, 200.0]))
    before = env.full_state
    with pytest.raises(ValueError, match="step 1"):
        env.step(action)
    assert np.array_equal(env.full_state, before)


def test_impossible_settings():
    with pytest.raises(ValueError, match="keypoints"):
        PushTEnv(state="keypoints")
    with pytest.raises(ValueError, match="max_episode_steps"):
        PushTEnv(max_episode_steps=0)
    with pytest.raises(RuntimeError, match="reset"):
        PushTEnv().step(np.zeros(2))
