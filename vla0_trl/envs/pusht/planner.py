"""Which push next? A search over straight pushes of PushT's block, for the scripted expert.

gym-pusht has no friction and damps all velocity away. A push therefore depends on its path and not on its speed, and
moves the block by the same amount in the block's own frame wherever the block lies. So all pushes are simulated once,
in a pymunk space without pictures (`push_library`), and a plan is a composition of planar motions: array arithmetic.

Poses, frames and units are those of [`geometry`]; time is in control steps.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import pymunk
import shapely

from vla0_trl.envs.pusht.env import GymPushTEnv
from vla0_trl.envs.pusht.geometry import (
    AGENT_RADIUS,
    GOAL_POSE,
    OUTLINE,
    TEE,
    WALL_RADIUS,
    WALLS,
    beyond_walls,
    compose,
    coverage,
    inside,
    pose_distance,
    rotation,
    to_block,
    to_world,
)

DT = 0.01  # seconds

# The agent: how it goes
CLEARANCE = 19.0  # px from the block's edge while it walks; it touches at 15
CORNERS = np.array([(-80, -20), (80, -20), (80, 50), (35, 140), (-35, 140), (-80, 50)], float)  # where it turns
APPROACH = 8.0  # px before touching: there a walk ends and a push begins
SPEED = 18.0  # px per control step
PUSH_OVERHEAD = 6.0  # control steps that a push takes beyond its length, to stop before it and after it

# The search
CONTACT_SPACING = 9.0  # px along the block's faces
PUSH_STEP = 1.5  # px of agent motion between two recorded poses of a push
MAX_PUSH = 120  # recorded poses of a push
BRANCH_LENGTHS = np.unique(np.round(1.25 ** np.arange(22)).astype(int)) - 1  # push lengths that a next push may follow
DEPTH = 3  # pushes per plan
BEAM = 48  # plans kept at each depth
SOLVED = 0.965  # predicted coverage at which a plan ends; 0.95 is needed
BEYOND_SOLVED = 60.0  # control steps that a unit of coverage beyond is worth: the environment stops a push in time
REST_OVERHEAD, REST_SPEED = 25.0, 0.8  # guess of what an unsolved plan leaves: control steps, px per control step
MIN_PROGRESS = 0.3  # share of the distance that a plan must cut


def _contacts() -> tuple[np.ndarray, np.ndarray]:
    """Where the agent can touch: its centre [K, 2] and the face's inward normal [K, 2], in the block frame."""
    centres, normals = [], []
    for i, (start, end) in enumerate(zip(OUTLINE, np.roll(OUTLINE, -1, axis=0), strict=True)):
        length = np.linalg.norm(end - start)
        along = (end - start) / length
        inward = np.array([-along[1], along[0]])
        # vertices 3 and 6 are the inner corners, where the agent keeps off the other face
        low = CLEARANCE + 1 if i in (3, 6) else 3.0
        high = length - (CLEARANCE + 1 if i in (2, 5) else 3.0)
        gaps = 2 * round((high - low) / CONTACT_SPACING / 2)  # even, so that a contact is in the middle of the face
        for s in np.linspace(low, high, gaps + 1):
            centres.append(start + s * along - AGENT_RADIUS * inward)
            normals.append(inward)
    return np.array(centres), np.array(normals)


CENTRES, NORMALS = _contacts()
APPROACHES = CENTRES - APPROACH * NORMALS


def simulate_pushes(walls: np.ndarray | None = None) -> np.ndarray:
    """Push a block at the zero pose at every contact, straight inward, with gym-pusht's own bodies, between `walls`,
    float[4, 2], their corners in the block frame, or without any.

    Returns float64[K, MAX_PUSH + 1, 3], the block's pose at the start and after every `PUSH_STEP` px.
    """
    motions = np.zeros((len(CENTRES), MAX_PUSH + 1, 3))
    for motion, centre, normal in zip(motions, CENTRES, NORMALS, strict=True):
        space = pymunk.Space()
        space.damping = 0.0
        block, _ = GymPushTEnv.add_tee(space, (0, 0), 0)
        agent = GymPushTEnv.add_circle(space, tuple(centre), AGENT_RADIUS)
        agent.velocity = tuple(normal * PUSH_STEP / DT)
        if walls is not None:
            ends = [tuple(corner) for corner in walls]
            space.add(*(GymPushTEnv.add_segment(space, ends[i - 1], ends[i], WALL_RADIUS) for i in range(4)))
        for pose in motion[1:]:
            space.step(DT)
            pose[:] = *block.position, block.angle
    return motions


@cache
def push_library() -> np.ndarray:
    """[`simulate_pushes`] without walls, once per process: 20 ms."""
    return simulate_pushes()


def clear(starts: np.ndarray, ends: np.ndarray, clearance: np.ndarray | float = CLEARANCE) -> np.ndarray:
    """Whether straight walks between points [..., 2] of the block frame keep `clearance` from the block, bool[...]."""
    lines = shapely.linestrings(np.stack(np.broadcast_arrays(starts, ends), axis=-2))
    return shapely.distance(lines, TEE) >= clearance


def _legs(starts: np.ndarray, ends: np.ndarray, clearance: np.ndarray | float = CLEARANCE) -> np.ndarray:
    """Lengths of straight walks, float64[...], inf where the block is in the way."""
    return np.where(clear(starts, ends, clearance), np.linalg.norm(ends - starts, axis=-1), np.inf)


@cache
def _corner_legs() -> tuple[np.ndarray, np.ndarray]:
    """Straight walks from corner to corner, [6, 6], and from corner to approach, [6, K]."""
    between = _legs(CORNERS[:, None], CORNERS)
    np.fill_diagonal(between, np.inf)
    return between, _legs(CORNERS[:, None], APPROACHES)


class Walks:
    """Shortest walks around the block to every contact's approach, over a visibility graph in the block frame.

    No walk turns at a corner that, with the block at `pose`, float[3], lies outside the workspace.
    """

    def __init__(self, pose: np.ndarray):
        between, self._last = _corner_legs()
        blocked = ~inside(to_world(pose, CORNERS))
        self._between = np.where(blocked | blocked[:, None], np.inf, between)
        rest = np.where(blocked[:, None], np.inf, self._last)
        for _ in CORNERS:  # Bellman and Ford: one more corner on the way each time
            rest = np.minimum(rest, (self._between[:, :, None] + rest).min(1))
        self._rest = rest  # [6, K], from corner to approach

    def _first(self, agents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Straight walks from [..., 2] to the corners, [..., 6], and to the approaches, [..., K]."""
        # an agent that is too close already may leave, as long as it comes no closer
        clearance = np.minimum(CLEARANCE, shapely.distance(shapely.points(agents), TEE) - 0.1)[..., None]
        return tuple(_legs(agents[..., None, :], ends, clearance) for ends in (CORNERS, APPROACHES))

    def lengths(self, agents: np.ndarray) -> np.ndarray:
        """float64[..., K] in px: from agents at [..., 2] (block frame) to each approach; inf where no walk leads."""
        corners, straight = self._first(agents)
        return np.minimum(straight, (corners[..., None] + self._rest).min(-2))

    def path(self, agent: np.ndarray, contact: int) -> np.ndarray:
        """float64[P, 2]: the shortest walk, from agent to approach; a straight line where there is none."""
        onward, straight = self._first(agent)
        rest, last, points = self._rest[:, contact], straight[contact], [agent]
        while (onward + rest).min() < last:  # ends, because what is left grows shorter with every corner
            corner = int(np.argmin(onward + rest))
            points.append(CORNERS[corner])
            onward, last = self._between[corner], self._last[corner, contact]
        return np.stack([*points, APPROACHES[contact]])


@cache
def _next_walks() -> np.ndarray:
    """float64[K, MAX_PUSH + 1, K] in px: walks from where each push ends, taken from the contact nearest to that."""
    motions = push_library()
    agents = CENTRES[:, None] + PUSH_STEP * np.arange(MAX_PUSH + 1)[:, None] * NORMALS[:, None]
    agents = (agents - motions[..., :2])[..., None, :] @ rotation(motions[..., 2])
    nearest = np.linalg.norm(agents - CENTRES, axis=-1).argmin(-1)
    return Walks(GOAL_POSE).lengths(CENTRES)[nearest]


@dataclass(frozen=True)
class Push:
    """A straight push: the agent touches the block at `contact` and goes on for `length` px."""

    contact: int  # index into `CENTRES` and `NORMALS`
    poses: np.ndarray  # float64[N + 1, 3], the block's predicted poses, before it and after every `PUSH_STEP` px

    @property
    def length(self) -> float:
        return PUSH_STEP * (len(self.poses) - 1)

    def locate(self, agent: np.ndarray) -> tuple[float, float]:
        """How far a world point lies along the push, 0 at first touch, and beside it: both in px."""
        offset = to_block(self.poses[0], agent) - CENTRES[self.contact]
        x, y = NORMALS[self.contact]
        return float(offset @ (x, y)), float(offset @ (-y, x))

    def point(self, advance: float) -> np.ndarray:
        """float64[2]: the world point that lies `advance` px along the push."""
        return to_world(self.poses[0], CENTRES[self.contact] + advance * NORMALS[self.contact])

    def predicted_pose(self, advance: float) -> np.ndarray:
        """float64[3]: the block's pose when the agent is `advance` px along the push."""
        return self.poses[int(np.clip(round(advance / PUSH_STEP), 0, len(self.poses) - 1))]


def _lowest(scores: np.ndarray, count: int) -> np.ndarray:
    """Flat indices of the `count` lowest finite scores, ascending."""
    flat = scores.ravel()
    lowest = np.argpartition(flat, count)[:count] if count < flat.size else np.arange(flat.size)
    lowest = lowest[np.argsort(flat[lowest], kind="stable")]
    return lowest[np.isfinite(flat[lowest])]


def plan_push(agent: np.ndarray, pose: np.ndarray) -> Push | None:
    """The first push of the best plan found: a beam search over `DEPTH` pushes, whose score is time.

    A plan's score is the control steps that it takes, and a guess at those still needed after it. It has to solve the
    task or to cut the distance by `MIN_PROGRESS`: without that, pushes too small to matter can look best forever.
    None if no push makes that progress or the agent gets to none.
    """
    beyond = float(beyond_walls(pose))
    allowed = max(beyond, 0.0) + 0.5  # px; a reset can put the block into a wall
    library = push_library()
    motions = simulate_pushes(to_block(pose, WALLS)) if beyond > -1 else library
    enough = (1 - MIN_PROGRESS) * pose_distance(pose, GOAL_POSE)
    advance = PUSH_STEP * np.arange(1, MAX_PUSH + 1)

    first_motions, best, best_score = motions, None, np.inf
    poses, spent, walks, firsts = pose[None], np.zeros(1), Walks(pose).lengths(to_block(pose, agent))[None], None
    for _ in range(DEPTH):
        # every length of every contact's push after every plan kept: [B, K, N]
        reachable = inside(to_world(poses[:, None], APPROACHES))
        begun = np.where(reachable, spent[:, None] + walks / SPEED + PUSH_OVERHEAD, np.inf)
        spent = begun[..., None] + advance / SPEED
        ends = compose(poses[:, None, None], motions[:, 1:])
        distance = pose_distance(ends, GOAL_POSE)
        score = spent + REST_OVERHEAD + distance / REST_SPEED

        near = np.flatnonzero(distance < 3)  # beyond 3 px the coverage is below SOLVED
        near = near[_lowest(spent.ravel()[near], 200)]
        covered = coverage(ends.reshape(-1, 3)[near])
        near, covered = near[covered > SOLVED], covered[covered > SOLVED]
        score.ravel()[near] = spent.ravel()[near] - BEYOND_SOLVED * (covered - SOLVED)

        order = _lowest(np.where(distance <= enough, score, np.inf), 500)
        order = order[beyond_walls(ends.reshape(-1, 3)[order]) <= allowed]
        if len(order) and score.ravel()[order[0]] < best_score:
            b, k, n = np.unravel_index(order[0], score.shape)
            best_score = score[b, k, n]
            best = (k, n) if firsts is None else firsts[b]

        branches = score[..., BRANCH_LENGTHS]
        b, k, n = np.unravel_index(_lowest(branches, 4 * BEAM), branches.shape)
        n = BRANCH_LENGTHS[n]
        kept = np.flatnonzero(beyond_walls(ends[b, k, n]) <= allowed)[:BEAM]
        if not len(kept):
            break
        b, k, n = b[kept], k[kept], n[kept]
        firsts = np.stack([k, n], axis=-1) if firsts is None else firsts[b]
        poses, spent, walks, motions = ends[b, k, n], spent[b, k, n], _next_walks()[k, n + 1], library
    if best is None:
        return None
    contact, last = best
    return Push(int(contact), compose(pose, first_motions[contact, : last + 2]))
