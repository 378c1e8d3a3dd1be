"""Scripted PushT expert."""

from dataclasses import dataclass

import numpy as np
import shapely
import shapely.ops

from vla0_trl.envs.pusht import CAMERA, WORKSPACE, PushTEnv
from vla0_trl.envs.pusht_planner import (
    AGENT_RADIUS,
    APPROACH,
    CENTRES,
    NORMALS,
    STEP_LENGTH,
    TEE,
    MARGIN,
    Walks,
    clear,
    plan_push,
    pose_error,
    to_block,
    transform,
)

LOOKAHEAD = 48.0
MAX_DISTANCE = 50.0
MAX_MOVE = 22.0


def limit(point, centre, radius):
    offset = point - centre
    distance = np.linalg.norm(offset)
    return point if distance <= radius else centre + offset * (radius / distance)


class PushTExpert:
    def __init__(self):
        self.reset()

    def reset(self):
        self._push = None
        self._target = None
        self.plans = 0

    def act(self, full_state):
        agent, pose = full_state[:2], full_state[2:].astype(float)
        if self._target is None:
            self._target = agent
        if self._push is None or self._stale(agent, pose):
            self._push = plan_push(agent, pose)
            self.plans += 1
            self._touching = False
            if self._push is None:
                return agent.astype(np.float32)
        goal = self._pursue(agent, pose)
        goal = np.clip(goal, MARGIN, WORKSPACE - MARGIN)
        target = limit(goal, self._target, MAX_MOVE - 1e-3)
        target = limit(target, agent, MAX_DISTANCE - 1e-3)
        self._target = target
        return target.astype(np.float32)

    def _line(self, agent):
        """advance beyond touching, sideways"""
        p0 = self._push.poses[0]
        a = to_block(p0, agent)
        r = a - CENTRES[self._push.contact]
        n = NORMALS[self._push.contact]
        return r @ n, r @ np.array([-n[1], n[0]])

    def _stale(self, agent, pose):
        s, l = self._line(agent)
        if self._touching:
            if s > self._push.length - 1.0 or abs(l) > 6:
                return True
            i = int(np.clip(s / STEP_LENGTH, 0, len(self._push.poses) - 1))
            return pose_error(pose, self._push.poses[i]) > 4.0
        return pose_error(pose, self._push.poses[0]) > 1.5

    def _pursue(self, agent, pose):
        push = self._push
        s, l = self._line(agent)
        if not self._touching and abs(l) < 3 and -APPROACH - 4 < s < 2:
            self._touching = True
        if self._touching:
            s = min(s + 45, push.length)
            return transform(push.poses[0], CENTRES[push.contact] + s * NORMALS[push.contact])
        a = to_block(pose, agent)
        here = shapely.Point(a)
        d = TEE.distance(here)
        if d < 17.5:
            q = shapely.ops.nearest_points(TEE.exterior, here)[0]
            q = np.array([q.x, q.y])
            out = (a - q) if d > 0 else (q - a)
            out = out / max(np.linalg.norm(out), 1e-6)
            return transform(pose, a + 40 * out)
        path = Walks(pose).path(a, push.contact)
        legs = np.linalg.norm(np.diff(path, axis=0), axis=1)
        ends = np.concatenate([[0], np.cumsum(legs)])
        ahead = np.array([48, 44, 40, 36, 32, 28, 24, 20, 16, 12, 8, 4.0])
        points = np.stack([np.interp(ahead, ends, path[:, i]) for i in range(2)], -1)
        ok = clear(a, points, 17.0)
        return transform(pose, points[int(np.argmax(ok))])


def run(seed, noise=0.0):
    import time

    env = PushTEnv()
    env.reset(seed)
    rng = np.random.default_rng(seed)
    ex = PushTExpert()
    tg = []
    ag = []
    tt = []
    done = False
    t = time.process_time()
    while not done:
        s = env.full_state
        t0 = time.process_time()
        a = ex.act(s)
        tt.append(time.process_time() - t0)
        tg.append(a)
        ag.append(s[:2])
        done = env.step(a + noise * rng.standard_normal(2))
    tg = np.array(tg)
    ag = np.array(ag)
    return (
        env.success,
        env.steps,
        env.max_coverage,
        ex.plans,
        time.process_time() - t,
        np.linalg.norm(tg - ag, axis=1).max(),
        np.linalg.norm(np.diff(tg, axis=0), axis=1).max(),
    )
