"""A scripted expert for PushT: it sees the block's pose, plans pushes, and demonstrates them with smooth targets."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import shapely

from vla0_trl.envs.pusht.env import CAMERA, MAX_EPISODE_STEPS, WORKSPACE, PushTEnv
from vla0_trl.envs.pusht.geometry import MARGIN, TEE, pose_distance, to_block, to_world
from vla0_trl.envs.pusht.planner import APPROACH, Push, Walks, clear, plan_push

LOOKAHEAD = 48.0  # px that the target is ahead of the agent on its way: about 19 px per step under gym-pusht's control
MAX_DISTANCE = 50.0  # px between agent and target; people's targets run up to 176 px ahead
MAX_MOVE = 22.0  # px between one step's target and the next
WALK_CLEARANCE = 17.0  # px from the block that the straight line to the target keeps
TOUCHING = 17.5  # px from the block's edge within which the agent backs off before it walks
ALIGNED = 3.0  # px beside the push within which it may begin: the rest is gone before the agent touches
STOPPED = 1.0  # px before the end of a push at which it counts as done
# px that the block may be off before a new plan is made; a fast push squeezes the bodies into each other by 2 px
MAX_DRIFT_WALKING, MAX_DRIFT_PUSHING = 1.5, 4.0


def _within(point: np.ndarray, centre: np.ndarray, radius: float) -> np.ndarray:
    """The point of the disc around `centre` that is nearest to `point` (all float[2])."""
    distance = np.linalg.norm(point - centre)
    radius -= 1e-3  # so that the bound holds in float32 too
    return point if distance <= radius else centre + (point - centre) * (radius / distance)


class PushTExpert:
    """Walks around the block, pushes straight, plans again, until the block covers the target.

    It keeps a plan between calls, but the caller need not follow it: any state is answered, with a new plan if the
    block or the agent is elsewhere than expected. So it can label what another policy does (DAgger).

    Args:
        replan (`bool`, *optional*, defaults to `False`): keep nothing between calls: the action is a function of the
            state alone, which a policy without memory can learn exactly. Targets then jump when the plan changes, and
            episodes are half as long again.
    """

    def __init__(self, replan: bool = False):
        self.replan = replan
        self.reset()

    def reset(self) -> None:
        """Forget the plan and the last target; call it when an episode begins."""
        self._push: Push | None = None
        self._pushing = False
        self._target: np.ndarray | None = None

    def act(self, full_state: np.ndarray) -> np.ndarray:
        """The target for a full state, float32[2] in px; the agent's own position if no push helps.

        It is at most `MAX_DISTANCE` from the agent, and, unless the expert replans, at most `MAX_MOVE` from the last
        target as long as the agent follows.
        """
        if self.replan:
            self.reset()
        agent, pose = np.asarray(full_state[:2], float), np.asarray(full_state[2:], float)
        if self._push is None or self._is_over(self._push, agent, pose):
            self._push, self._pushing = plan_push(agent, pose), False
        wanted = agent if self._push is None else self._ahead(self._push, agent, pose)
        wanted = np.clip(wanted, MARGIN, WORKSPACE - MARGIN)
        if self.replan:
            return _within(wanted, agent, MAX_DISTANCE).astype(np.float32)
        if self._target is None or np.linalg.norm(self._target - agent) > MAX_DISTANCE:
            self._target = agent  # the episode begins, or another policy moves the agent
        self._target = _within(_within(wanted, self._target, MAX_MOVE), agent, MAX_DISTANCE)
        return self._target.astype(np.float32)

    def _is_over(self, push: Push, agent: np.ndarray, pose: np.ndarray) -> bool:
        """Whether the push is done, or the world is not as it expects."""
        if not self._pushing:
            return pose_distance(pose, push.poses[0]) > MAX_DRIFT_WALKING
        advance, beside = push.locate(agent)
        lost = abs(beside) > 2 * ALIGNED or advance < -2 * APPROACH
        drift = pose_distance(pose, push.predicted_pose(advance))
        return lost or advance > push.length - STOPPED or drift > MAX_DRIFT_PUSHING

    def _ahead(self, push: Push, agent: np.ndarray, pose: np.ndarray) -> np.ndarray:
        """float64[2]: the point up to `LOOKAHEAD` px ahead on the agent's way, in the world."""
        advance, beside = push.locate(agent)
        self._pushing = self._pushing or (abs(beside) < ALIGNED and -1.5 * APPROACH < advance < 2)
        if self._pushing:
            return push.point(min(advance + LOOKAHEAD, push.length))

        here = to_block(pose, agent)
        if TEE.distance(shapely.Point(here)) < TOUCHING:
            return to_world(pose, here + LOOKAHEAD * _outward(here))
        path = Walks(pose).path(here, push.contact)
        legs = np.linalg.norm(np.diff(path, axis=0), axis=-1)
        along = np.concatenate([[0.0], np.cumsum(legs)])
        ahead = LOOKAHEAD * np.arange(12, 0, -1) / 12
        points = np.stack([np.interp(ahead, along, path[:, i]) for i in range(2)], axis=-1)
        # the farthest point in sight: around a corner the agent looks no farther than it can go straight
        return to_world(pose, points[np.argmax(clear(here, points, WALK_CLEARANCE))])


def _outward(point: np.ndarray) -> np.ndarray:
    """float64[2]: unit vector from the block's nearest edge to the agent, or back to that edge if it is inside."""
    edge = TEE.exterior.interpolate(TEE.exterior.project(shapely.Point(point)))
    offset = point - (edge.x, edge.y)
    offset = -offset if TEE.contains(shapely.Point(point)) else offset
    return offset / max(np.linalg.norm(offset), 1e-6)


@dataclass
class Recording:
    """One demonstration of T steps; `frames[t]` and `states[t]` are what was seen before `actions[t]`."""

    seed: int
    frames: np.ndarray  # uint8[T, 96, 96, 3]
    states: np.ndarray  # float32[T, 5], full states
    actions: np.ndarray  # float32[T, 2], the expert's targets in px, without noise
    max_coverage: float
    success: bool  # gym-pusht's own verdict


def record_episode(
    seed: int,
    action_noise: float = 0.0,
    replan: bool = False,
    learner: Callable[[dict], np.ndarray] | None = None,
    expert_mix: float = 0.0,
    max_steps: int = MAX_EPISODE_STEPS,
) -> Recording:
    """Let the expert solve one episode, or label one of a learner; the same arguments give the same arrays.

    With noise, the expert's action plus Gaussian noise is executed and the expert's own is recorded: the noise leads
    to states beside the way, the labels show how to come back (Laskey et al., "DART", 2017). A learner leads to the
    states that it will see itself, with the same labels (Ross et al., "DAgger", 2011).

    Args:
        seed (`int`): of the environment, the noise and the mixing.
        action_noise (`float`, *optional*): standard deviation in px.
        learner (`Callable`, *optional*): observation, with the full state, -> float[2], what is executed.
        expert_mix (`float`, *optional*): share of steps at which the expert's action is executed instead of the
            learner's; DAgger's beta.
    """
    env, expert, rng = PushTEnv("full", max_steps), PushTExpert(replan), np.random.default_rng(seed)
    env.reset(seed)
    frames, states, actions = [], [], []
    done = False
    while not done:
        observation = env.observe()
        frames.append(observation["images"][CAMERA])
        states.append(observation["state"])
        actions.append(expert.act(env.full_state))
        executed = actions[-1]
        if learner is not None:
            proposed = learner(observation)  # asked at every step: it may count them
            executed = executed if rng.random() < expert_mix else proposed
        done = env.step(executed + action_noise * rng.standard_normal(2))
    env.close()
    arrays = map(np.stack, (frames, states, actions))
    return Recording(seed, *arrays, env.max_coverage, env.success)
