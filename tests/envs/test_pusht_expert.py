"""The scripted expert on the real simulator, and its planner against gym-pusht."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from vla0_trl.envs.pusht import geometry
from vla0_trl.envs.pusht.env import CAMERA, PushTEnv
from vla0_trl.envs.pusht.expert import MAX_DISTANCE, MAX_MOVE, PushTExpert, Recording, record_episode
from vla0_trl.envs.pusht.planner import (
    APPROACHES,
    CENTRES,
    CLEARANCE,
    NORMALS,
    PUSH_STEP,
    SOLVED,
    Walks,
    clear,
    plan_push,
    push_library,
    simulate_pushes,
)

SEEDS = range(100, 112)


def digest(recording: Recording) -> str:
    arrays = (recording.frames, recording.states, recording.actions)
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()


@pytest.fixture(scope="module")
def clean() -> list[Recording]:
    return [record_episode(seed) for seed in SEEDS]


@pytest.fixture(scope="module")
def noisy() -> list[Recording]:
    return [record_episode(seed, action_noise=4.0) for seed in SEEDS]


@pytest.mark.slow
def test_every_episode_succeeds(clean):
    assert [r.seed for r in clean if not r.success] == []
    assert all(r.max_coverage > 0.95 for r in clean)
    assert np.mean([len(r.actions) for r in clean]) < 100


@pytest.mark.slow
def test_noise_is_recovered_from(noisy):
    assert [r.seed for r in noisy if not r.success] == []


def test_shapes(clean):
    for r in clean:
        steps = len(r.actions)
        assert (r.frames.shape, r.frames.dtype) == ((steps, 96, 96, 3), np.uint8)
        assert (r.states.shape, r.states.dtype) == ((steps, 5), np.float32)
        assert (r.actions.shape, r.actions.dtype) == ((steps, 2), np.float32)


@pytest.mark.parametrize("recordings", ["clean", "noisy"])
def test_targets_are_near_and_smooth(recordings, request):
    for r in request.getfixturevalue(recordings):
        assert np.linalg.norm(r.actions - r.states[:, :2], axis=1).max() <= MAX_DISTANCE
        assert np.linalg.norm(np.diff(r.actions, axis=0), axis=1).max() <= MAX_MOVE
        assert np.linalg.norm(r.actions[0] - r.states[0, :2]) <= MAX_MOVE
        assert r.actions.min() >= 0
        assert r.actions.max() <= 512


def test_replaying_the_actions_replays_the_episode(clean):
    """frames[t] and states[t] are what the policy sees before actions[t]; nothing but the actions moves the world."""
    r = clean[0]
    env = PushTEnv(state="full")
    env.reset(r.seed)
    for frame, state, action in zip(r.frames, r.states, r.actions, strict=True):
        observation = env.observe()
        assert np.array_equal(observation["images"][CAMERA], frame)
        assert np.array_equal(observation["state"], state)
        done = env.step(action)
    assert done
    assert env.success
    assert env.max_coverage == r.max_coverage


def test_noise_is_executed_and_not_recorded(clean, noisy):
    for quiet, loud in zip(clean, noisy, strict=True):
        assert np.array_equal(quiet.actions[0], loud.actions[0])
        assert np.array_equal(quiet.states[0], loud.states[0])
        assert not np.array_equal(quiet.states[1], loud.states[1])


@pytest.mark.slow
def test_another_process_records_the_same(clean, noisy):
    code = (
        "import hashlib\n"
        "from vla0_trl.envs.pusht.expert import record_episode\n"
        "for noise in (0.0, 4.0):\n"
        f"    r = record_episode({SEEDS[1]}, noise)\n"
        "    print(hashlib.sha256(b''.join(a.tobytes() for a in (r.frames, r.states, r.actions))).hexdigest())\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == [digest(clean[1]), digest(noisy[1])]


def test_reset_forgets_the_episode(clean):
    expert, env = PushTExpert(), PushTEnv()
    env.reset(1)
    for _ in range(10):
        env.step(expert.act(env.full_state))
    expert.reset()
    env.reset(SEEDS[2])
    assert np.array_equal(expert.act(env.full_state), clean[2].actions[0])


@pytest.mark.slow
def test_replanning_makes_the_action_a_function_of_the_state():
    """It solves the task so, and its answers are those of an expert that has just been woken up."""
    recording = record_episode(SEEDS[0], replan=True)
    assert recording.success
    assert np.linalg.norm(recording.actions - recording.states[:, :2], axis=1).max() <= MAX_DISTANCE
    expert = PushTExpert(replan=True)
    for order in (slice(0, 40, 8), slice(40, 0, -8)):  # whatever it saw before
        for state, action in zip(recording.states[order], recording.actions[order], strict=True):
            assert np.allclose(expert.act(state), action, atol=0.1)


def test_it_labels_and_repairs_what_another_policy_did():
    """Someone else drives for 60 steps, the expert is asked all along, then takes over and solves it."""
    rng = np.random.default_rng(0)
    for seed in (0, 1, 2):
        expert, env = PushTExpert(), PushTEnv(max_episode_steps=300)
        env.reset(seed)
        done = False
        while not done:
            state = env.full_state
            label = expert.act(state)
            assert np.linalg.norm(label - state[:2]) <= MAX_DISTANCE
            if env.steps % 8 == 0:
                target = rng.uniform(100, 412, size=2)
            done = env.step(target if env.steps < 60 else label)
        assert env.success


def test_frames_of_reference_are_inverse():
    pose = np.array([300.0, 120.0, 2.0])
    assert np.allclose(geometry.to_block(pose, geometry.to_world(pose, CENTRES)), CENTRES)
    there = geometry.compose(pose, np.array([10.0, -5.0, 0.3]))
    assert np.allclose(
        geometry.to_world(there, CENTRES),
        geometry.to_world(pose, geometry.to_world(np.array([10.0, -5.0, 0.3]), CENTRES)),
    )


def test_coverage_is_gym_pushts():
    env = PushTEnv()
    for seed in range(20):
        env.reset(seed)
        assert geometry.coverage(env.full_state[None, 2:])[0] == pytest.approx(env.coverage, abs=1e-9)
    assert geometry.coverage(geometry.GOAL_POSE[None])[0] == pytest.approx(1.0)
    assert geometry.pose_distance(
        geometry.GOAL_POSE + np.array([0, 0, 2 * np.pi]), geometry.GOAL_POSE
    ) == pytest.approx(0.0, abs=1e-9)


def test_a_planned_push_is_what_the_simulator_does():
    """Drive gym-pusht's own agent along every seventh push, at gym-pusht's own control, and compare the final pose."""
    pose = np.array([200.0, 300.0, 4.0])
    length = 40
    for contact in range(0, len(CENTRES), 7):
        env = PushTEnv()
        env.reset(0)
        env._env.agent.position = tuple(geometry.to_world(pose, APPROACHES[contact]))
        env._env.block.angle = pose[2]
        env._env.block.position = tuple(pose[:2])
        for advance in np.minimum(np.arange(0, 120, 10), PUSH_STEP * length):
            env.step(geometry.to_world(pose, CENTRES[contact] + advance * NORMALS[contact]))
        predicted = geometry.compose(pose, push_library()[contact, length])
        assert geometry.pose_distance(pose, predicted) > 15
        assert geometry.pose_distance(env.full_state[2:], predicted) < 3


def test_walks_go_around_the_block():
    walks = Walks(geometry.GOAL_POSE)
    below = np.array([0.0, 200.0])
    lengths = walks.lengths(below)
    assert np.isfinite(lengths).all()
    for contact in range(len(CENTRES)):
        path = walks.path(below, contact)
        legs = np.linalg.norm(np.diff(path, axis=0), axis=1)
        assert legs.sum() == pytest.approx(lengths[contact])
        assert clear(path[:-1], path[1:], CLEARANCE).all()
        assert np.array_equal(path[[0, -1]], [below, APPROACHES[contact]])
    top = int(np.argmin(np.linalg.norm(CENTRES - [0, -15], axis=1)))
    assert lengths[top] > 270  # 223 px as the crow flies, through the block


def test_no_walk_leaves_the_workspace():
    agent = np.array([250.0, 400.0])
    pose = np.array([100.0, 25.0, 0.0])  # the bar along the upper wall, its left end near the left one
    lengths = Walks(pose).lengths(geometry.to_block(pose, agent))
    open_path = Walks(geometry.GOAL_POSE).lengths(geometry.to_block(pose, agent))
    # right of the stem nothing changes; the top cannot be had, because the way there turns outside the workspace
    right_of_stem = (NORMALS[:, 0] < -0.5) & (CENTRES[:, 0] < 60)
    assert np.array_equal(lengths[right_of_stem], open_path[right_of_stem])
    assert np.isinf(lengths[NORMALS[:, 1] > 0.5]).all()
    assert np.isfinite(open_path).all()
    assert geometry.inside(geometry.to_world(pose, APPROACHES[plan_push(agent, pose).contact]))


def test_one_push_away_from_the_target_the_plan_is_that_push():
    pose = geometry.compose(geometry.GOAL_POSE, np.array([0.0, -60.0, 0.0]))
    push = plan_push(geometry.to_world(pose, np.array([0.0, -60.0])), pose)
    assert np.array_equal(push.poses[0], pose)
    assert NORMALS[push.contact].tolist() == [0.0, 1.0]  # the bar's outer edge
    assert push.length == pytest.approx(60, abs=3)
    assert geometry.coverage(push.poses[-1:])[0] > SOLVED


def test_the_planner_knows_the_walls():
    """Against a wall a push moves the block less than in the open, and never through it."""
    pose = np.array([256.0, 127.0, np.pi])  # the stem's end at the upper wall
    push = simulate_pushes(geometry.to_block(pose, geometry.WALLS))
    bar = int(np.argmin(np.linalg.norm(CENTRES - [0, -15], axis=1)))
    assert push_library()[bar, 20, 1] > 25
    assert (
        geometry.beyond_walls(geometry.compose(pose, push[bar, 20]))
        < geometry.beyond_walls(geometry.compose(pose, push_library()[bar, 20])) - 10
    )
