"""A scripted expert for libero_object and libero_spatial: it knows where things are, and picks and places by position.

Above the object → down → close → up → over the target → down → open. Position control in proportion to the distance,
the hand kept upright as it starts. Boxes, cans and bottles are gripped across their middle, bowls at the rim. It is
here to make real demonstrations without a network, not to be a strong baseline.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from vla0_trl.envs.libero.env import LiberoEnv
from vla0_trl.envs.libero.protocol import GRIPPER_CLOSED, GRIPPER_OPEN

SUITES = ("libero_object", "libero_spatial")
_STEP = 0.05  # m that an action of 1 asks for; robosuite: osc_pose.json, output_max
_TURN = 0.5  # rad, from the same file
_GAIN = 1.6  # of the distance, asked for at once: the controller reaches about half of what it is asked for
_ABOVE = 0.12  # m
_CLOSING_STEPS, _OPENING_STEPS = 14, 20  # the fingers take most of them
_MAX_WIDTH = 0.075  # m; the fingers open to 0.08
# m from a bowl's rim, which comes between the fingers, to the middle between them; the second where a drawer's wall
# leaves no room for an open finger outside: closing, that finger pushes the bowl along
_INSIDE_RIM = (0.006, 0.034)
_FINGER = 0.012  # m from the point that is controlled down to the fingers' ends


@dataclass
class Box:
    """What surrounds an object's collision geometry: float64[3] corners in the world, in metres."""

    low: np.ndarray
    high: np.ndarray

    @property
    def center(self) -> np.ndarray:
        return (self.low + self.high) / 2

    @property
    def size(self) -> np.ndarray:
        return self.high - self.low


@dataclass
class Recording:
    """A demonstration: T observations, each with the action that was taken on it."""

    images: dict[str, list[np.ndarray]] = field(default_factory=dict)
    states: list[np.ndarray] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)


def record_episode(env: LiberoEnv, seed: int) -> Recording | None:
    """A demonstration from one initial state; None if the expert fails.

    The actions are found first, without drawing, which is most of the time; then they are replayed and recorded.
    """
    actions = find_actions(env, seed)
    if actions is None:
        return None
    env.reset(seed)
    recording = Recording({camera: [] for camera in env.cameras}, actions=actions)
    for action in actions:
        observation = env.observe()
        for camera, image in observation["images"].items():
            recording.images[camera].append(image)
        recording.states.append(observation["state"])
        env.step(action)
    if not env.success:
        raise RuntimeError(f"{env.suite} task {env.task_id}, initial state {seed}: a replay ended otherwise")
    return recording


def find_actions(env: LiberoEnv, seed: int) -> list[np.ndarray] | None:
    """float32[7] each, the last of which makes the task succeed; None if no way to take hold of the thing does."""
    env.reset(seed)
    for grip in grip_points(surrounding_box(env, env.simulator.obj_of_interest[0]), Hand(env).position):
        env.reset(seed)
        actions = []
        for action in pick_and_place(env, grip):
            actions.append(action)
            if env.step(action):
                break
        if env.success:
            return actions
    return None


def pick_and_place(env: LiberoEnv, grip: np.ndarray) -> Iterator[np.ndarray]:
    """The script with `grip` (3,) as the place to take hold: one float32[7] after another; the caller steps `env`."""
    thing, target = env.simulator.obj_of_interest
    hand = Hand(env)
    yield from hand.move(np.append(grip[:2], grip[2] + _ABOVE), GRIPPER_OPEN)
    yield from hand.move(grip, GRIPPER_OPEN, tolerance=0.006)
    yield from hand.stay(_CLOSING_STEPS, GRIPPER_CLOSED)

    held, goal = surrounding_box(env, thing), surrounding_box(env, target)
    below = hand.position[2] - held.low[2]  # how far the thing hangs below the hand
    offset = hand.position[:2] - held.center[:2]
    place = goal.center[:2] + offset
    # a basket takes things from above its rim, a plate has them set down
    release = goal.high[2] + below + (0.0 if goal.size[2] > 0.05 else 0.01)
    travel = max(release, hand.position[2]) + _ABOVE
    yield from hand.move(np.append(hand.position[:2], travel), GRIPPER_CLOSED)
    yield from hand.move(np.append(place, travel), GRIPPER_CLOSED)
    yield from hand.move(np.append(place, release), GRIPPER_CLOSED)
    yield from hand.stay(_OPENING_STEPS, GRIPPER_OPEN)
    yield from hand.move(np.append(place, travel), GRIPPER_OPEN)


class Hand:
    """The end effector, and actions that bring it somewhere."""

    def __init__(self, env: LiberoEnv):
        self._data = env.simulator.sim.data
        self._site = env.simulator.robots[0].eef_site_id
        self._upright = self._rotation

    @property
    def position(self) -> np.ndarray:
        return self._data.site_xpos[self._site].copy()

    @property
    def _rotation(self) -> np.ndarray:
        return self._data.site_xmat[self._site].reshape(3, 3).copy()

    def move(
        self, target: np.ndarray, gripper: float, tolerance: float = 0.012, limit: int = 60
    ) -> Iterator[np.ndarray]:
        """Towards a point (3,) until it is nearer than `tolerance`, for `limit` steps at most."""
        for _ in range(limit):
            error = target - self.position
            if np.linalg.norm(error) < tolerance:
                return
            yield self.action(error, gripper)

    def stay(self, steps: int, gripper: float) -> Iterator[np.ndarray]:
        """Keep the place while the fingers move."""
        place = self.position
        for _ in range(steps):
            yield self.action(place - self.position, gripper)

    def action(self, error: np.ndarray, gripper: float) -> np.ndarray:
        # for small angles, half of the differences across the diagonal is the rotation vector
        turn = self._upright @ self._rotation.T
        angles = np.array([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]]) / 2
        motion = np.clip(np.concatenate([_GAIN * error / _STEP, angles / _TURN]), -1, 1)
        return np.append(motion, gripper).astype(np.float32)


def grip_points(box: Box, hand: np.ndarray) -> list[np.ndarray]:
    """Where the hand, whose fingers close along y, may take hold of what is in the box, the best first."""
    lowest = box.low[2] + _FINGER
    if box.size[1] <= _MAX_WIDTH:  # not deeper than the fingers are long, or the palm pushes
        return [np.append(box.center[:2], max(box.center[2], box.high[2] - 0.04, lowest))]
    points = []
    for inside in _INSIDE_RIM:
        offset = np.copysign(box.size[1] / 2 - inside, hand[1] - box.center[1])
        for y in (box.center[1] + offset, box.center[1] - offset):  # the nearer side first
            points.append(np.array([box.center[0], y, max(box.high[2] - 0.015, lowest)]))
    return points


def surrounding_box(env: LiberoEnv, name: str) -> Box:
    """Around all collision geoms of an object."""
    model, data = env.simulator.sim.model, env.simulator.sim.data
    root = env.simulator.obj_body_id[name]
    corners = []
    for geom in range(model.ngeom):
        if model.body_rootid[model.geom_bodyid[geom]] != model.body_rootid[root] or not model.geom_contype[geom]:
            continue
        center, half = model.geom_aabb[geom][:3], model.geom_aabb[geom][3:]
        signs = np.stack(np.meshgrid([-1, 1], [-1, 1], [-1, 1]), -1).reshape(-1, 3)
        rotation = data.geom_xmat[geom].reshape(3, 3)
        corners.append((center + signs * half) @ rotation.T + data.geom_xpos[geom])
    corners = np.concatenate(corners)
    return Box(corners.min(0), corners.max(0))
