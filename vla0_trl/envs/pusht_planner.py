"""Which push next? Search over straight pushes of PushT's block, for the scripted expert.

gym-pusht has no friction and damps all velocity away, so a push depends on its path only, not on its speed, and moves the
block by the same amount in the block's own frame wherever the block lies. All pushes are therefore simulated once, in
a pymunk space of their own ([`push_library`]), and a plan is a composition of planar motions: array arithmetic.

Poses are (x, y, angle) of the block's origin, the middle of the bar's outer edge; lengths are px, angles radians.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import pymunk
import shapely

from vla0_trl.envs.pusht import FPS, WORKSPACE, GymPushTEnv

AGENT_RADIUS = 15.0  # gym-pusht: add_circle
OUTLINE = np.array([(-60, 0), (60, 0), (60, 30), (15, 30), (15, 120), (-15, 120), (-15, 30), (-60, 30)], float)
TEE = shapely.Polygon(OUTLINE)  # gym-pusht: add_tee's two boxes
shapely.prepare(TEE)
COM = np.array([0.0, 45.0])  # gym-pusht: add_tee's centre of gravity
GYRATION = 55.0  # sqrt(inertia / mass) = sqrt(3000): makes radians comparable with px, as the physics does
GOAL_POSE = np.array([256.0, 256.0, np.pi / 4])  # gym-pusht: _setup

MARGIN = 12.0  # the agent's centre stays this far inside the workspace (people's stays 13 px inside)
WALLS = np.array([(5, 5), (506, 5), (506, 506), (5, 506)], float)  # gym-pusht: _setup
BEAM = 48
DEPTH = 3
PUSH_OVERHEAD = 6.0
PX_PER_STEP = 18.0
REST_STEPS = 25.0
REST_SPEED = 0.8
SOLVED = 0.965
APPROACH = 8.0  # px before touching at which a walk ends and a push begins
SPEED = 1.8  # px a simulation step, about what the expert reaches
STEP_LENGTH = 1.5  # px of agent motion between two recorded poses of a push
MAX_PUSH = 120  # recorded poses a push
COARSE = np.unique(np.round(1.25 ** np.arange(0, 22)).astype(int))


def _rotation(angle: np.ndarray) -> np.ndarray:
    """[..., 2, 2]: multiplies row vectors in the world from the right to turn them into the block's frame."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)


def transform(pose: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Block frame to world: poses [..., 3] and points [..., 2], broadcast, to [..., 2]."""
    cos, sin = np.cos(pose[..., 2]), np.sin(pose[..., 2])
    x, y = points[..., 0], points[..., 1]
    return np.stack([pose[..., 0] + cos * x - sin * y, pose[..., 1] + sin * x + cos * y], axis=-1)


def to_block(pose: np.ndarray, points: np.ndarray) -> np.ndarray:
    """World to block frame, the inverse of [`transform`] for one pose."""
    return (points - pose[:2]) @ _rotation(pose[2])


def pose_error(pose: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Distance of poses [..., 3] from `reference` in px: centre of mass, and rotation times the radius of gyration."""
    shift = transform(pose, COM) - transform(reference, COM)
    turn = (pose[..., 2] - reference[..., 2] + np.pi) % (2 * np.pi) - np.pi
    return np.sqrt((shift**2).sum(-1) + (GYRATION * turn) ** 2)


def coverage(poses: np.ndarray) -> np.ndarray:
    """Share of the target that the block covers, float64[N], for poses [N, 3]: gym-pusht's metric."""
    goal = shapely.Polygon(transform(GOAL_POSE, OUTLINE))
    blocks = shapely.polygons(transform(poses[:, None], OUTLINE))
    return shapely.area(shapely.intersection(goal, blocks)) / goal.area


def _contacts(spacing: float = 9.0) -> tuple[np.ndarray, np.ndarray]:
    """Where the agent can touch the block, in the block's frame: centres [K, 2] and inward unit normals [K, 2]."""
    centres, normals = [], []
    for i, start in enumerate(OUTLINE):
        end = OUTLINE[(i + 1) % len(OUTLINE)]
        length = np.linalg.norm(end - start)
        along = (end - start) / length
        inward = np.array([-along[1], along[0]])
        # away from corners: 3 px where the face ends, the agent's radius where the other face stands in its way
        low = AGENT_RADIUS + 1 if i in (3, 6) else 3.0
        high = length - (AGENT_RADIUS + 1 if i in (2, 5) else 3.0)
        for s in np.linspace(low, high, round((high - low) / spacing) + 1):
            centres.append(start + s * along - AGENT_RADIUS * inward)
            normals.append(inward)
    return np.array(centres), np.array(normals)


CENTRES, NORMALS = _contacts()
APPROACHES = CENTRES - APPROACH * NORMALS


def simulate_pushes(walls: np.ndarray | None = None) -> np.ndarray:
    """Push at every contact with gym-pusht's bodies, a block at the zero pose, and the agent moving straight inward.

    Args:
        walls (`np.ndarray`, *optional*): float[4, 2], the corners of the walls in the block's frame; none by default.

    Returns:
        `np.ndarray`: float64[K, MAX_PUSH + 1, 3], the block's pose at the start and after every `STEP_LENGTH` px.
    """
    dt = 0.01  # gym-pusht: __init__
    motions = np.zeros((len(CENTRES), MAX_PUSH + 1, 3))
    for motion, centre, normal in zip(motions, CENTRES, NORMALS, strict=True):
        space = pymunk.Space()
        space.damping = 0.0
        block, _ = GymPushTEnv.add_tee(space, (0, 0), 0)
        agent = GymPushTEnv.add_circle(space, tuple(centre), AGENT_RADIUS)
        agent.velocity = tuple(normal * STEP_LENGTH / dt)
        if walls is not None:
            ends = [tuple(corner) for corner in walls]
            space.add(*(GymPushTEnv.add_segment(space, ends[i - 1], ends[i], 2) for i in range(4)))
        for pose in motion[1:]:
            space.step(dt)
            pose[:] = *block.position, block.angle
    return motions


@cache
def push_library() -> np.ndarray:
    """[`simulate_pushes`] far from the walls, once a process; 20 ms."""
    return simulate_pushes()


CORNERS = np.array([(-80, -20), (80, -20), (80, 50), (35, 140), (-35, 140), (-80, 50)], float)  # 20 px off the block
CLEARANCE = 19.0  # px from the block's edge at which the agent's centre walks; it touches at 15


def clear(starts: np.ndarray, ends: np.ndarray, clearance: float = CLEARANCE) -> np.ndarray:
    """Whether straight walks in the block's frame, [..., 2] to [..., 2], stay off the block: bool[...]."""
    return (
        shapely.distance(shapely.linestrings(np.stack(np.broadcast_arrays(starts, ends), axis=-2)), TEE) >= clearance
    )


def inside(points: np.ndarray) -> np.ndarray:
    """Whether the agent's centre may be at world points [..., 2]: bool[...]."""
    return ((points >= MARGIN) & (points <= WORKSPACE - MARGIN)).all(-1)


@cache
def _static_graph() -> tuple[np.ndarray, np.ndarray]:
    """Straight walks where nothing is in the way, else inf: corner to corner [6, 6] and corner to approach [6, K]."""
    tables = []
    for ends in (CORNERS, APPROACHES):
        length = np.linalg.norm(CORNERS[:, None] - ends, axis=-1)
        tables.append(np.where(clear(CORNERS[:, None], ends), length, np.inf))
    return tables[0], tables[1]


class Walks:
    """Shortest walks around the block to every contact's approach point: a visibility graph in the block's frame.

    Args:
        pose (`np.ndarray`): float[3], where the block lies; corners that the walls cut off are not walked round.
    """

    def __init__(self, pose: np.ndarray):
        direct, self.last = _static_graph()
        blocked = ~inside(transform(pose, CORNERS))
        self.direct = np.where(np.eye(len(CORNERS), dtype=bool) | blocked | blocked[:, None], np.inf, direct)
        self.between = np.where(np.eye(len(CORNERS), dtype=bool), 0, self.direct)
        for k in range(len(CORNERS)):  # Floyd and Warshall
            self.between = np.minimum(self.between, self.between[:, k, None] + self.between[k])
        self.to_approach = (self.between[:, :, None] + self.last).min(1)  # [6, K]
        self.to_approach[blocked] = np.inf

    def _first_legs(self, agent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Straight walks from [..., 2] to the corners [..., 6] and approaches [..., K], inf where the block is."""
        agent = agent[..., None, :]
        # an agent that is closer than it should be may leave, as long as it does not come closer still
        clearance = np.minimum(CLEARANCE, shapely.distance(shapely.points(agent), TEE) - 0.1)
        return tuple(
            np.where(clear(agent, ends, clearance), np.linalg.norm(ends - agent, axis=-1), np.inf)
            for ends in (CORNERS, APPROACHES)
        )

    def lengths(self, agent: np.ndarray) -> np.ndarray:
        """float64[..., K]: length of the walk from an agent at [..., 2] (block frame) to each approach, inf if none."""
        corners, straight = self._first_legs(agent)
        return np.minimum(straight, (corners[..., None] + self.to_approach).min(-2))

    def path(self, agent: np.ndarray, contact: int) -> np.ndarray:
        """float64[P, 2]: way points of the shortest walk, agent first, approach last (block frame)."""
        onward, straight = self._first_legs(agent)
        points, rest, last = [agent], self.to_approach[:, contact], straight[contact]
        # every leg shortens the rest of the way, so this ends; it is the straight line where there is no way
        while (onward + rest).min() < last:
            corner = int(np.argmin(onward + rest))
            points.append(CORNERS[corner])
            onward, last = self.direct[corner], self.last[corner, contact]
        return np.stack([*points, APPROACHES[contact]])


@dataclass
class Push:
    """One planned push: the agent walks to `contact`'s approach, then straight on until the block is where predicted.

    Args:
        contact (`int`): index into `CENTRES` and `NORMALS`.
        poses (`np.ndarray`): float64[N + 1, 3], the block's predicted poses in the world, one every `STEP_LENGTH` px.
    """

    contact: int
    poses: np.ndarray

    @property
    def length(self) -> float:
        return STEP_LENGTH * (len(self.poses) - 1)


def beyond_walls(poses: np.ndarray) -> np.ndarray:
    """How far blocks at poses [..., 3] reach into the walls, float64[...] px; negative inside the workspace."""
    corners = transform(poses[..., None, :], OUTLINE)
    return np.maximum(WALLS[0] - corners, corners - WALLS[2]).max((-1, -2))


def compose(poses: np.ndarray, motions: np.ndarray) -> np.ndarray:
    """Poses [..., 3] after motions [..., 3] in the block's own frame, broadcast."""
    position = transform(poses, motions[..., :2])
    return np.concatenate([position, np.broadcast_to(poses[..., 2:] + motions[..., 2:], (*position.shape[:-1], 1))], -1)


@cache
def _next_walks() -> np.ndarray:
    """float64[K, MAX_PUSH + 1, K]: the walk from the end of a push to the next approach, by the contact nearest then."""
    motions = push_library()
    advance = STEP_LENGTH * np.arange(MAX_PUSH + 1)[:, None]
    agents = CENTRES[:, None] + advance * NORMALS[:, None]
    agents = (agents - motions[..., :2])[..., None, :] @ _rotation(motions[..., 2])
    nearest = np.linalg.norm(agents - CENTRES, axis=-1).argmin(-1)
    return Walks(GOAL_POSE).lengths(CENTRES)[nearest]


def _lowest(scores: np.ndarray, count: int) -> np.ndarray:
    """Flat indices of the `count` lowest finite scores, ascending."""
    flat = scores.ravel()
    count = min(count, flat.size - 1)
    lowest = np.sort(np.argpartition(flat, count)[:count])
    lowest = lowest[np.argsort(flat[lowest], kind="stable")]
    return lowest[np.isfinite(flat[lowest])]


def plan_push(agent: np.ndarray, pose: np.ndarray) -> Push | None:
    """The first push of the best plan of up to `DEPTH` pushes, or `None` if the agent reaches no contact.

    A plan's score is the number of steps that it takes and those that it leaves to do, guessed from the distance that
    remains. It must solve the task or cut the distance by 30 %: otherwise small pushes that change nothing look best.
    """
    near_wall = beyond_walls(pose) > -1
    motions = simulate_pushes(to_block(pose, WALLS)) if near_wall else push_library()
    allowed = max(beyond_walls(pose), 0) + 0.5
    distance = pose_error(pose, GOAL_POSE)
    poses, steps, walks = pose[None], np.zeros(1), Walks(pose).lengths(to_block(pose, agent))[None]
    first = None
    best, best_score = None, np.inf
    lengths = np.arange(1, MAX_PUSH + 1)
    for depth in range(DEPTH):
        start = np.where(inside(transform(poses[:, None], APPROACHES)), steps[:, None] + walks / PX_PER_STEP, np.inf)
        cost = start[..., None] + PUSH_OVERHEAD + lengths * STEP_LENGTH / PX_PER_STEP  # [B, K, N]
        ends = compose(poses[:, None, None], motions[:, 1:])
        error = pose_error(ends, GOAL_POSE)
        score = cost + REST_STEPS + error / REST_SPEED
        near = np.flatnonzero((error < 3) & np.isfinite(cost))
        near = near[np.argsort(cost.ravel()[near], kind="stable")[:200]]
        covered = coverage(ends.reshape(-1, 3)[near])
        near, covered = near[covered > SOLVED], covered[covered > SOLVED]
        score.ravel()[near] = cost.ravel()[near] - 60 * (covered - SOLVED)

        enough = np.where(error <= 0.7 * distance, score, np.inf)
        order = _lowest(enough, 500)
        order = order[beyond_walls(ends.reshape(-1, 3)[order]) <= allowed]
        if len(order) and enough.ravel()[order[0]] < best_score:
            b, k, n = np.unravel_index(order[0], score.shape)
            best_score = score[b, k, n]
            best = (k, n) if first is None else first[b]
        order = _lowest(score[..., COARSE - 1], 4 * BEAM)
        b, k, c = np.unravel_index(order, score[..., COARSE - 1].shape)
        n = COARSE[c] - 1
        keep = np.flatnonzero(beyond_walls(ends[b, k, n]) <= allowed)[:BEAM]
        b, k, n = b[keep], k[keep], n[keep]
        if not len(b):
            break
        first = np.stack([k, n], -1) if first is None else first[b]
        poses, steps, walks = ends[b, k, n], cost[b, k, n], _next_walks()[k, n + 1]
        if depth==0:
            root = motions
        motions = push_library()
    if best is None:
        return None
    k, n = best
    return Push(int(k), compose(pose, root[k, : n + 2]))
