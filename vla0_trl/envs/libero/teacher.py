"""A teacher for libero_object: what the scripted expert would do next, from any state and without a memory.

The expert goes through its phases one after another; a policy that drives comes to states which no phase leads to.
Here the phase is read off the scene: is the thing between the fingers, over the target, or still to be approached? So
any state can be labelled, those of noisy episodes and those that a policy came to (DAgger).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vla0_trl.envs.libero.env import LiberoEnv, LiberoTasks
from vla0_trl.envs.libero.expert import Hand, grip_points, surrounding_box
from vla0_trl.envs.libero.perturb import OBJECT_SHIFT, Perturbation
from vla0_trl.envs.libero.protocol import (
    ACTION_DIM,
    DEFAULT_CAMERAS,
    GRIPPER_CLOSED,
    GRIPPER_OPEN,
    STATE_DIM,
    select_episodes,
)

SUITE = "libero_object"
_ABOVE = 0.12  # m over the thing, or over the target's rim, at which the hand travels
_FUNNEL = 5.0  # m of height per m that the hand is off to the side: it comes down as it gets there
_AT, _STILL_AT = 0.008, 0.02  # m to the grip at which fingers begin to close, and up to which they go on
_PALM = 0.03  # m from the hand up to its palm, which rests on tall things
_OPENED = 0.072  # m between open fingers, or more
_OVER = 0.025  # m to the side of the place at which the thing may be let go
_CLEAR = 0.03  # m below the travelling height at which the hand may go to the side
# Noise of an episode, drawn for each stretch of steps: how often, how long, and how large (of actions in [-1, 1])
_NOISY_SHARE, _STRETCH, _NOISE, _WRONG_GRIPPER = 0.5, (3, 14), 0.6, 0.1
MOST_SHIFTED = 0.03  # m, of all objects together, in half of the episodes less; in the others they are not
_SEED = 18
_PARTS = (ACTION_DIM, ACTION_DIM + STATE_DIM)


class LiberoTeacher:
    """Answers for the state in which its environment is. Made anew after every reset, while the hand is upright."""

    def __init__(self, env: LiberoEnv):
        self.env, self.hand = env, Hand(env)
        self.thing, self.target = env.simulator.obj_of_interest
        self._resting = surrounding_box(env, self.thing).low[2]

    def action(self) -> np.ndarray:
        """float32[7], what to do now."""
        hand, thing, goal = self.hand.position, *(surrounding_box(self.env, n) for n in (self.thing, self.target))
        fingers = self.env.simulator.robots[0].gripper
        data = self.env.simulator.sim.data
        opening = np.abs([data.get_joint_qpos(joint) for joint in fingers.joints]).sum()
        held = self.env.simulator._check_grasp(fingers, self.env.simulator.objects_dict[self.thing])
        below = hand[2] - thing.low[2]
        release, offset = goal.high[2] + below, hand[:2] - thing.center[:2]
        place = goal.center[:2] + offset
        travel = goal.high[2] + below + _ABOVE / 2
        aside = np.linalg.norm(place - hand[:2])
        if held:
            if aside < _OVER and hand[2] < release + 0.015:
                return self._go(np.append(place, release), GRIPPER_OPEN)
            if aside < _OVER:
                return self._go(np.append(place, release), GRIPPER_CLOSED)
            if hand[2] < travel - _CLEAR:
                return self._go(np.append(hand[:2], travel + 0.05), GRIPPER_CLOSED)
            return self._go(np.append(place, travel), GRIPPER_CLOSED)
        if (
            np.all(np.abs(thing.center[:2] - goal.center[:2]) < goal.size[:2] / 2)
            and thing.low[2] > self._resting + 0.01
        ):
            return self._go(np.append(hand[:2], travel), GRIPPER_OPEN)  # it falls, or lies in the target
        grip = grip_points(thing, hand)[0]
        aside = np.linalg.norm(grip[:2] - hand[:2])
        away = np.linalg.norm(grip - hand)
        reached = away < _AT or (aside < _AT and thing.high[2] - hand[2] > _PALM)
        if reached or (opening < _OPENED and away < _STILL_AT):
            return self._go(grip, GRIPPER_CLOSED)
        height = np.clip(_FUNNEL * (aside - _AT), 0, _ABOVE)
        if opening < _OPENED and away < 0.06:  # half closed beside it: open first
            return self._go(hand + np.array([0, 0, 0.02]), GRIPPER_OPEN)
        return self._go(grip + np.array([0, 0, height]), GRIPPER_OPEN)

    def _go(self, target: np.ndarray, gripper: float) -> np.ndarray:
        return self.hand.action(target - self.hand.position, gripper)


class TeachingEnv:
    """Tasks whose objects stand where their own sampler puts them, in half of the episodes all moved a little.

    The teacher looks on, so that every state that is driven through can become a row.

    Args:
        task_ids (`Sequence[int]`): of `SUITE`; an episode's seed says which.
        cameras (`Sequence[str]`, *optional*): which to give.
        settings: of every [`LiberoEnv`].
    """

    def __init__(self, task_ids: Sequence[int], cameras: Sequence[str] = DEFAULT_CAMERAS, **settings: Any):
        self.task_ids, self.cameras = list(task_ids), list(cameras)
        self._tasks = LiberoTasks(sampled=True, cameras=self.cameras, **settings)
        self.observe, self.frame, self.result = self._tasks.observe, self._tasks.frame, self._tasks.result
        self.close = self._tasks.close

    def task_id(self, seed: int) -> int:
        """Which task an episode is of."""
        return self.task_ids[seed % len(self.task_ids)]

    def open(self, seed: int) -> LiberoEnv:
        """The environment of an episode's task, in which no episode is begun."""
        return self._tasks.open(SUITE, self.task_id(seed))

    def reset(self, seed: int) -> None:
        self.env = self.open(seed)
        shift = MOST_SHIFTED / OBJECT_SHIFT * max(0.0, drawn(seed).uniform(-1, 1))
        self.env.perturbation = Perturbation(objects=shift)
        self.env.reset(seed)
        self.teacher = LiberoTeacher(self.env)
        self.action = self.teacher.action()

    def step(self, action: np.ndarray) -> bool:
        done = self.env.step(action)
        self.action = self.teacher.action()
        return done

    @property
    def full_state(self) -> np.ndarray:
        """float64: the episode's seed, the teacher's action (7), the robot's state (8), the simulator's."""
        env = self.env
        return np.concatenate([[env.seed], self.action, env.robot_state(), env.simulator_state])


def tasks_of_teacher(name: str) -> list[int]:
    """`"libero_object/3"` -> [3]; `"libero_object"` -> all of its tasks; `ValueError` for other tasks."""
    suite, slash, task_ids = name.partition("/")
    if suite != SUITE:
        raise ValueError(f"dagger_teacher={name} must be {SUITE}, or {SUITE}/0,3 for some of its tasks")
    return [episode.task_id for episode in select_episodes(suite, task_ids if slash else None, 1)]


def split_states(states: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """`full_state`s [N, S] of some episodes -> of each, seed, teacher's actions, robot's and simulator's states."""
    starts = np.flatnonzero(np.diff(states[:, 0])) + 1
    for episode in np.split(states, starts):
        yield int(episode[0, 0]), *np.split(episode[:, 1:], _PARTS, axis=1)


def drive_with_noise(env: TeachingEnv, seed: int) -> np.ndarray:
    """An episode in which noise disturbs the teacher: float64[T, S], its `full_state`s."""
    env.reset(seed)
    rng, states, done = drawn(seed, 1), [], False
    disturbance = _noise(rng)
    while not done:
        states.append(env.full_state)
        added, gripper = next(disturbance)
        done = env.step(np.append((env.action[:-1] + added).clip(-1, 1), gripper * env.action[-1]))
    return np.stack(states)


def drawn(*seeds: int) -> np.random.Generator:
    return np.random.default_rng([_SEED, *seeds])


def _noise(rng: np.random.Generator) -> Iterator[tuple[np.ndarray, float]]:
    """What is added to a teacher's actions, one step after another, and the factor of its gripper's."""
    while True:
        size, flip = np.zeros(ACTION_DIM - 1), 1.0
        if rng.random() < _NOISY_SHARE:
            size = np.array([1, 1, 1, 0.15, 0.15, 0.15]) * rng.normal(0, _NOISE, ACTION_DIM - 1)
            flip = -1.0 if rng.random() < _WRONG_GRIPPER else 1.0
        for _ in range(rng.integers(*_STRETCH)):
            yield size, flip
