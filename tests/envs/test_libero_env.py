"""The LIBERO environment against LIBERO itself, and the ways to set it up wrong."""

import subprocess
import sys

import numpy as np
import pytest

from vla0_trl.envs.libero import protocol
from vla0_trl.envs.libero.env import LiberoEnv, LiberoTasks
from vla0_trl.envs.libero.expert import find_actions
from vla0_trl.envs.libero.perturb import parse_perturbation
from vla0_trl.envs.libero.protocol import LiberoEpisode

SUITE, TASK = "libero_object", 0


ACTIONS = np.random.default_rng(0).uniform(-1, 1, (6, 7))


# What openvla-oft's and openpi's evaluations do around LIBERO's own environment, in a process of its own.
REFERENCE = """
import sys
import numpy as np
from vla0_trl.envs.libero import setup
setup.prepare_simulator(sys.argv[1])
from libero.libero.envs import OffScreenRenderEnv
from robosuite.utils.transform_utils import quat2axisangle
suite, seed, actions = sys.argv[2], int(sys.argv[3]), np.load(sys.argv[4])
name = setup.task_names(suite)[0]
path = setup.package_folder() / "bddl_files" / suite / f"{name}.bddl"
env = OffScreenRenderEnv(bddl_file_name=str(path), camera_heights=256, camera_widths=256)
env.seed(7 + seed)
env.reset()
obs = env.set_init_state(setup.initial_states(suite, name)[seed])
for _ in range(10):
    obs, *_ = env.step([0, 0, 0, 0, 0, 0, -1])
for action in actions:
    obs, *_ = env.step(action)
rotation = quat2axisangle(obs["robot0_eef_quat"].copy())
np.savez(
    sys.argv[5],
    image=obs["agentview_image"][::-1, ::-1],
    image2=obs["robot0_eye_in_hand_image"][::-1, ::-1],
    state=np.concatenate([obs["robot0_eef_pos"], rotation, obs["robot0_gripper_qpos"]]).astype(np.float32),
)
"""


@pytest.fixture(scope="module")
def env(assets):
    """Only one may be open at a time: the tests of others come after it, see the end of this file."""
    env = LiberoEnv(SUITE, TASK, assets_dir=assets)
    yield env
    env.close()


def _after_actions(env, seed: int = 3) -> dict:
    env.reset(seed)
    for action in ACTIONS:
        env.step(action)
    return env.observe()


@pytest.mark.slow
def test_what_a_policy_sees_is_what_a_plain_loop_around_libero_gives(env, assets, tmp_path):
    np.save(tmp_path / "actions.npy", ACTIONS)
    arguments = [assets, SUITE, "3", str(tmp_path / "actions.npy"), str(tmp_path / "seen.npz")]
    subprocess.run([sys.executable, "-c", REFERENCE, *arguments], check=True, stdin=subprocess.DEVNULL)
    reference, seen = np.load(tmp_path / "seen.npz"), _after_actions(env)
    np.testing.assert_array_equal(seen["state"], reference["state"])
    for camera, image in seen["images"].items():
        np.testing.assert_array_equal(image, reference[camera])
    assert seen["task"] == "pick up the alphabet soup and place it in the basket"
    assert (seen["state"].shape, seen["state"].dtype) == ((8,), np.float32)


def test_an_episode_does_not_depend_on_those_before(env):
    first = _after_actions(env)
    other = _after_actions(env, seed=1)
    again = _after_actions(env)
    assert (first["images"]["image"] != other["images"]["image"]).any()
    np.testing.assert_array_equal(first["state"], again["state"])
    for camera in first["images"]:
        np.testing.assert_array_equal(first["images"][camera], again["images"][camera])


def test_frames_are_upright(env):
    """The wall is above and the floor below; the hand is below in its own camera."""
    env.reset(0)
    images = env.observe()["images"]
    assert images["image"][:10].std() < 40 and images["image"][:10, :60].mean() < images["image"][150:, :].mean()
    assert images["image2"][-10:].mean() < 70 < images["image2"][:200].mean()


def test_steps_end_at_the_limit_and_settling_counts_for_nothing(env):
    env.reset(0)
    assert env.steps == 0 and env.simulator.timestep == protocol.SETTLING_STEPS
    limit, env.max_steps = env.max_steps, 2
    try:
        assert [env.step(ACTIONS[0]), env.step(ACTIONS[1])] == [False, True]
        with pytest.raises(RuntimeError, match="the episode is over"):
            env.step(ACTIONS[0])
    finally:
        env.max_steps = limit
    assert limit == 280
    result = {"suite": SUITE, "task_id": TASK, "init_state": 0, "success": False, "steps": 2}
    assert env.result() == result


@pytest.mark.parametrize("action", [np.zeros(6), np.full(7, np.nan)])
def test_bad_actions_raise(env, action):
    env.reset(0)
    with pytest.raises(ValueError, match="must be 7 finite numbers"):
        env.step(action)


def test_bad_tasks_states_and_cameras_raise(env):
    with pytest.raises(ValueError, match="has initial states 0 to 49"):
        env.reset(50)
    with pytest.raises(ValueError, match="has tasks 0 to 9, not 10"):
        LiberoEnv(SUITE, 10)
    with pytest.raises(ValueError, match="no suite 'libero_long'"):
        LiberoEnv("libero_long", 0)
    with pytest.raises(ValueError, match=r"no cameras \['front'\]"):
        LiberoEnv(SUITE, 0, cameras=["front"])


@pytest.mark.parametrize("name", ["rotate:45", "rotate", "noise:6", "noise:", "fog", "no_task:1", "camera:x"])
def test_unknown_perturbations_raise(name):
    with pytest.raises(ValueError, match=f"--perturb {name}: there is rotate"):
        parse_perturbation(name)


def _perturbed(name: str, assets: str) -> dict:
    env = LiberoEnv(SUITE, TASK, assets_dir=assets, perturbation=parse_perturbation(name))
    try:
        first = _after_actions(env)
        env.reset(1)
        env.frame()  # a video must not change what is seen
        again = _after_actions(env)
    finally:
        env.close()
    for camera in first["images"]:
        np.testing.assert_array_equal(first["images"][camera], again["images"][camera])
    return first


# -- these close the environment above: only one may be open


@pytest.fixture(scope="module")
def clean(env) -> dict:
    seen = _after_actions(env)
    env.close()
    return seen


@pytest.mark.slow
def test_perturbations_change_one_thing_and_always_the_same_way(clean, assets):
    images = clean["images"]
    rotated = _perturbed("rotate:90", assets)["images"]
    assert all((np.rot90(images[name]) == rotated[name]).all() for name in images)

    noisy = _perturbed("noise:3", assets)["images"]["image"].astype(float) - images["image"]
    middle = (images["image"] > 100) & (images["image"] < 155)
    assert noisy[middle].std() == pytest.approx(30, rel=0.1)

    moved = _perturbed("camera:3", assets)
    assert (moved["images"]["image"] != images["image"]).mean() > 0.5
    np.testing.assert_array_equal(moved["images"]["image2"], images["image2"])
    np.testing.assert_array_equal(moved["state"], clean["state"])

    dark = _perturbed("light:3", assets)["images"]["image"]
    assert dark.mean() < 0.7 * images["image"].mean()

    shifted = _perturbed("objects:3", assets)
    assert (shifted["images"]["image"] != images["image"]).mean() > 0.02
    np.testing.assert_allclose(shifted["state"], clean["state"], atol=1e-3)


def test_instructions_are_replaced_or_emptied(clean, assets):
    assert parse_perturbation("no_task").task(SUITE, 0, clean["task"]) == "."
    other = parse_perturbation("other_task").task(SUITE, 9, clean["task"])
    assert other == clean["task"]  # the last task is told the first one's


@pytest.mark.slow
def test_the_expert_reaches_into_a_drawer(clean, assets):
    env = LiberoEnv("libero_spatial", 4, assets_dir=assets)
    try:
        actions = find_actions(env, 0)
        assert all(action.shape == (7,) and np.abs(action).max() <= 1 for action in actions)
        assert env.success and env.steps == len(actions)
    finally:
        env.close()


@pytest.mark.slow
def test_one_process_plays_one_task_after_another(clean, assets):
    tasks = LiberoTasks(assets_dir=assets)
    try:
        for episode in (LiberoEpisode(SUITE, 0, 3), LiberoEpisode("libero_goal", 2, 1), LiberoEpisode(SUITE, 0, 3)):
            tasks.reset(episode)
            for action in ACTIONS:
                tasks.step(action)
            seen = tasks.observe()
            assert tasks.result()["suite"] == episode.suite
        for camera in clean["images"]:
            np.testing.assert_array_equal(seen["images"][camera], clean["images"][camera])
    finally:
        tasks.close()
