"""The teacher of libero_object and its rows, in the real simulator."""

import copy
import io

import numpy as np
import pytest
from PIL import Image

from vla0_trl.data.libero_rows import EVERY, rows_from_states
from vla0_trl.envs.libero.teacher import TeachingEnv, drive_with_noise, split_states, tasks_of_teacher

PUSHED = 3  # a seed whose objects are shifted


@pytest.fixture(scope="module")
def env(assets):
    env = TeachingEnv([0], assets_dir=assets, render_size=128)
    yield env
    env.close()


def test_the_teacher_succeeds_and_comes_back_from_where_noise_has_pushed_it(env):
    env.reset(PUSHED)
    while not env.step(env.action):
        pass
    assert env.result()["success"] and env.result()["steps"] < 110
    assert env.observe()["images"]["image2"].shape == (128, 128, 3) and env.frame().shape == (256, 256, 3)
    states = drive_with_noise(env, PUSHED)
    assert env.result()["success"] and len(states) == env.result()["steps"] > 110
    np.testing.assert_array_equal(drive_with_noise(env, PUSHED), states)


def test_objects_stand_elsewhere_in_every_episode(env):
    placements = []
    for seed in range(4):
        env.reset(seed)
        placements.append(env.full_state[16:])
    assert len(np.unique(np.stack(placements), axis=0)) == 4


def test_a_row_shows_what_was_seen_and_holds_what_the_teacher_would_have_done_next(env):
    seen, states = [], []
    for seed in (0, 1):
        env.reset(seed)
        for step in range(2 * EVERY):
            states.append(env.full_state)
            if step % EVERY == 0:
                seen.append(env.observe())
            env.step(env.action * 0.5)
    states = np.stack(states)
    kept_open = copy.copy(env)
    kept_open.close = lambda: None
    rows = rows_from_states(states, lambda: kept_open, chunk_size=3)
    assert len(rows) == len(seen) == 4
    for row, observation in zip(rows, seen, strict=True):
        for image, camera in zip(row["images"], ("image", "image2"), strict=True):
            picture = np.asarray(Image.open(io.BytesIO(image["bytes"])))
            difference = np.abs(picture - observation["images"][camera].astype(float)).mean()
            assert difference < 1  # of 2 ms; that of a step is 1.4 and 9.8
        np.testing.assert_array_equal(np.float32(row["raw_state"]), observation["state"])
    first, second = (actions.astype(np.float32) for _, actions, *_ in split_states(states))
    np.testing.assert_array_equal(np.float32(rows[1]["raw_action"]), first[[2, 3, 3]].ravel())
    np.testing.assert_array_equal(np.float32(rows[2]["raw_action"]), second[:3].ravel())


@pytest.mark.parametrize("teacher", ["libero_spatial/0", "libero_object/10", "libero_object/", "libero_object/-1"])
def test_a_teacher_is_named_by_its_tasks(teacher):
    assert tasks_of_teacher("libero_object/3") == [3] and tasks_of_teacher("libero_object") == list(range(10))
    with pytest.raises(ValueError, match="libero_object"):
        tasks_of_teacher(teacher)
