"""PushT's teacher: its symmetry, its answers, fitting it, and going on with a fit that was stopped."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.general import load_script

from vla0_trl.envs.pusht.driving import StateEpisode, drive, record_states, recover
from vla0_trl.envs.pusht.env import PushTEnv
from vla0_trl.envs.pusht.fitting import FitSettings, TeacherData, TeacherFit
from vla0_trl.envs.pusht.geometry import GOAL_POSE, coverage
from vla0_trl.envs.pusht.teacher import (
    PushTTeacher,
    mirror_chunks,
    mirror_states,
    through_waypoints,
)
from vla0_trl.envs.pusht.teaching import TeachSettings, load_episodes, save_episodes, state_pool, success, teach

SMALL = FitSettings(steps=60, batch_size=256, learning_rate=2e-2, warmup=5, average=0.9, width=32, depth=1)


@pytest.fixture(scope="module")
def episodes() -> list[StateEpisode]:
    return [record_states(seed) for seed in (300_000, 300_001)]


@pytest.fixture(scope="module")
def data(episodes) -> TeacherData:
    data = TeacherData()
    data.add(episodes)
    return data


def random_states(count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.concatenate([rng.uniform(60, 450, (count, 4)), rng.uniform(0, 2 * np.pi, (count, 1))], axis=1)


def test_the_mirror_is_pushts_own_symmetry():
    states = random_states(50)
    mirrored = mirror_states(states)
    np.testing.assert_allclose(mirror_states(mirrored), states, atol=1e-9)
    np.testing.assert_allclose(coverage(mirrored[:, 2:]), coverage(states[:, 2:]), atol=1e-9)
    np.testing.assert_allclose(mirror_states(np.array([[0, 0, *GOAL_POSE]]))[0, 2:], GOAL_POSE)
    chunks = np.random.default_rng(1).normal(size=(50, 8, 2))
    assert np.array_equal(mirror_chunks(mirror_chunks(chunks)), chunks)


def test_the_simulator_is_symmetric_too():
    """A push and its mirror image end in mirrored states."""
    env, mirrored = PushTEnv("full"), PushTEnv("full")
    start = np.array([256.0, 150.0, 256.0, 200.0, 0.3])
    env.reset_to(start)
    mirrored.reset_to(mirror_states(start))
    for _ in range(10):
        offset = np.array([0.0, 20.0])
        env.step(env.full_state[:2] + offset)
        mirrored.step(mirrored.full_state[:2] + mirror_chunks(offset))
    assert np.linalg.norm(env.full_state[2:4] - start[2:4]) > 20  # it did move the block
    np.testing.assert_allclose(mirrored.full_state, mirror_states(env.full_state), atol=1e-3)


def test_undrawn_episodes_reach_the_goal_from_seeds_and_from_states(episodes):
    assert all(episode.success for episode in episodes)
    middle = episodes[0].states[len(episodes[0].states) // 2]
    way, again = recover(middle), recover(middle)
    assert way.success
    assert np.array_equal(way.actions, again.actions)
    np.testing.assert_allclose(way.states[0], middle, rtol=1e-6)
    assert way.states.shape == (len(way.actions), 5)


def test_labels_are_relative_targets_in_pixels():
    teacher = PushTTeacher(width=16, depth=1)
    states = random_states(5)
    assert np.array_equal(teacher.label(states), np.zeros((5, 8, 2), np.float32))  # a new one stays where it is
    torch.nn.init.constant_(teacher.head.bias, 0.5)
    assert np.array_equal(teacher.label(states), np.full((5, 8, 2), 25.0, np.float32))
    assert teacher.label(states[:0]).shape == (0, 8, 2)


def test_data_has_the_next_targets_of_every_step_and_their_mirror_image(episodes, data):
    first = episodes[0]
    length = len(first.states)
    assert len(data) == 2 * sum(len(episode.states) for episode in episodes)
    targets = data.chunks[:length].numpy() + first.states[:, None, :2]
    np.testing.assert_allclose(targets[3], first.actions[3:11], atol=1e-4)
    np.testing.assert_allclose(targets[-2, 1:], np.tile(first.actions[-1], (7, 1)), atol=1e-4)
    np.testing.assert_array_equal(data.states[length : 2 * length], mirror_states(first.states))
    np.testing.assert_array_equal(data.chunks[length : 2 * length], mirror_chunks(data.chunks[:length].numpy()))


def test_a_fit_learns_and_goes_on_as_if_never_stopped(data, tmp_path):
    whole = TeacherFit(SMALL, data)
    losses = [whole.step() for _ in range(60)]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])
    staying = data.chunks.square().mean().sqrt()
    error = torch.from_numpy(whole.teacher.label(data.states.numpy())) - data.chunks
    assert error.square().mean().sqrt() < 0.8 * staying

    begun = TeacherFit(SMALL, data)
    for _ in range(25):
        begun.step()
    begun.save(tmp_path / "fit.safetensors")
    resumed = TeacherFit(SMALL, data)
    resumed.load(tmp_path / "fit.safetensors")
    assert [resumed.step() for _ in range(35)] == losses[25:]
    assert np.array_equal(resumed.teacher.label(random_states(5)), whole.teacher.label(random_states(5)))


def test_a_saved_teacher_answers_the_same(tmp_path):
    teacher = PushTTeacher(width=16, depth=2)
    torch.nn.init.normal_(teacher.head.weight)
    teacher.save(tmp_path / "teacher.safetensors", {"seed": 1})
    loaded = PushTTeacher.load(tmp_path / "teacher.safetensors")
    assert np.array_equal(loaded.label(random_states(9)), teacher.label(random_states(9)))

    with pytest.raises(FileNotFoundError, match=r"make a teacher with data_prep/teach_pusht\.py"):
        PushTTeacher.load(tmp_path / "none.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is not a teacher's file"):
        PushTTeacher.load(tmp_path / "other.safetensors")


def test_waypoints_are_joined_by_straight_lines():
    chunks = np.stack([np.arange(8.0), np.arange(8.0) ** 2], axis=-1)[None]
    joined = through_waypoints(chunks, [0, 3, 7])
    np.testing.assert_allclose(joined[0, :, 0], np.arange(8))
    np.testing.assert_allclose(joined[0, :, 1], [0, 3, 6, 9, 19, 29, 39, 49])


def test_a_teacher_from_nothing_that_was_stopped(tmp_path, monkeypatch):
    settings = TeachSettings(num_episodes=2, rounds=[20], round_episodes=1, fit=SMALL)
    teacher = teach(tmp_path / "whole", settings)

    step, steps = TeacherFit.step, []

    def stopped(fit):
        steps.append(fit.done)
        if len(steps) == 30:
            raise KeyboardInterrupt
        return step(fit)

    monkeypatch.setattr(TeacherFit, "step", stopped)
    with pytest.raises(KeyboardInterrupt):
        teach(tmp_path / "stopped", settings)
    resumed = teach(tmp_path / "stopped", settings)
    assert steps.count(20) == 2  # it was saved before the round, and goes on from there
    assert steps.count(19) == 1
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert len(state_pool(tmp_path / "whole")) == len(state_pool(tmp_path / "stopped"))

    with pytest.raises(ValueError, match=r"other settings \(num_episodes: 2 there, 3 here\): choose another folder"):
        teach(tmp_path / "whole", TeachSettings(num_episodes=3, rounds=[20], round_episodes=1, fit=SMALL))


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--rounds", "20000,10000", "expected rising steps"),
        ("--rounds", "10,10", "expected rising steps"),
        ("--rounds", "-5", "expected steps separated by commas"),
        ("--chunk_size", "1", "must be at least 2"),
    ],
)
def test_settings_that_cannot_be_are_one_line(flag, value, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["teach", "--output_dir", str(tmp_path / "t"), f"{flag}={value}"])
    with pytest.raises(SystemExit, match="2"):
        load_script("data_prep/teach_pusht.py").main()
    assert message in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "t").exists()


def test_a_teacher_of_longer_chunks(tmp_path):
    settings = TeachSettings(num_episodes=1, rounds=[], chunk_size=16, fit=replace(SMALL, steps=2))
    assert teach(tmp_path, settings).label(random_states(3)).shape == (3, 16, 2)
    measured = success(PushTTeacher.load(tmp_path / "teacher.safetensors"), 1)
    assert list(measured)[2:] == ["16 of 16 steps", "8 of 16 steps", "waypoints 0, 6, 15", "waypoints 0, 4, 9, 15"]


def test_success_is_measured_on_the_seeds_given():
    teacher = PushTTeacher(width=16, depth=1)  # it stays: nothing moves
    measured = success(teacher, 2, first_seed=7)
    env = PushTEnv()
    starts = []
    for seed in (7, 8):
        env.reset(seed)
        starts.append(env.coverage)
    assert list(measured)[2:] == ["8 of 8 steps", "4 of 8 steps", "waypoints 0, 3, 7", "waypoints 0, 2, 4, 7"]
    way = measured["8 of 8 steps"]
    assert (way["success_rate"], way["mean_steps"]) == (0.0, 300.0)
    assert way["mean_max_coverage"] == pytest.approx(np.mean(starts), abs=0.02)


def test_episodes_on_disk(episodes, tmp_path):
    save_episodes(tmp_path / "a.npz", episodes)
    for saved, loaded in zip(episodes, load_episodes(tmp_path / "a.npz"), strict=True):
        assert np.array_equal(saved.states, loaded.states)
        assert np.array_equal(saved.actions, loaded.actions)
        assert (saved.success, saved.max_coverage) == (loaded.success, loaded.max_coverage)
    save_episodes(tmp_path / "none.npz", [])
    assert load_episodes(tmp_path / "none.npz") == []


def test_the_teacher_is_asked_for_a_chunk_at_a_time():
    asked = []

    def policy(states):
        asked.append(len(states))
        return np.zeros((len(states), 8, 2), np.float32)

    first, second = drive(policy, [7, 8], n_action_steps=4, max_steps=10)
    assert asked == [2, 2, 2]
    assert first.states.shape == (10, 5)
    np.testing.assert_allclose(first.actions[0], first.states[0, :2])
    assert not second.success
