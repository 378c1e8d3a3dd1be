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
WALL = 7.0  # inner edge of gym-pusht's walls
APPROACH = 8.0  # px before touching at which a walk ends and a push begins
SPEED = 1.8  # px a simulation step, about what the expert reaches
STEP_LENGTH = 1.5  # px of agent motion between two recorded poses of a push
MAX_PUSH = 120  # recorded poses a push


def transform(pose: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Block frame to world: poses [..., 3] and points [..., 2], broadcast, to [..., 2]."""
    cos, sin = np.cos(pose[..., 2]), np.sin(pose[..., 2])
    x, y = points[..., 0], points[..., 1]
    return np.stack([pose[..., 0] + cos * x - sin * y, pose[..., 1] + sin * x + cos * y], axis=-1)


def to_block(pose: np.ndarray, points: np.ndarray) -> np.ndarray:
    """World to block frame, the inverse of [`transform`] for one pose."""
    cos, sin = np.cos(pose[2]), np.sin(pose[2])
    return (points - pose[:2]) @ np.array([[cos, -sin], [sin, cos]])


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


def simulate_push(pose: np.ndarray, start: np.ndarray, direction: np.ndarray, walls: bool) -> np.ndarray:
    """Block poses float64[MAX_PUSH + 1, 3] while the agent moves from `start` along `direction` (world), every 1.5 px."""
    space = pymunk.Space()
    space.damping = 0.0
    block, _ = GymPushTEnv.add_tee(space, (0, 0), 0)
    block.angle = pose[2]
    block.position = tuple(pose[:2])
    agent = GymPushTEnv.add_circle(space, tuple(start), AGENT_RADIUS)
    if walls:
        a, b = 5, 506
        for p, q in (((a, b), (a, a)), ((a, a), (b, a)), ((b, a), (b, b)), ((a, b), (b, b))):
            space.add(GymPushTEnv.add_segment(space, p, q, 2))
    dt = 0.01
    agent.velocity = tuple(direction * STEP_LENGTH / dt)
    poses = [pose]
    for _ in range(MAX_PUSH):
        space.step(dt)
        poses.append((*block.position, block.angle))
    return np.array(poses)


@cache
def push_library() -> np.ndarray:
    """Every contact's push from the zero pose, float64[K, MAX_PUSH + 1, 3]; simulated once a process, about 0.1 s."""
    return np.stack([simulate_push(np.zeros(3), c, n, walls=False) for c, n in zip(CENTRES, NORMALS, strict=True)])


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
        direct, last = _static_graph()
        blocked = ~inside(transform(pose, CORNERS))
        self.direct = np.where(blocked | blocked[:, None], np.inf, direct)
        self.between = self.direct
        for k in range(len(CORNERS)):  # Floyd and Warshall
            self.between = np.minimum(self.between, self.between[:, k, None] + self.between[k])
        self.to_approach = (self.between[:, :, None] + last).min(1)  # [6, K]
        self.to_approach[blocked] = np.inf

    def lengths(self, agent: np.ndarray) -> np.ndarray:
        """float64[..., K]: length of the walk from an agent at [..., 2] (block frame) to each approach, inf if none."""
        agent = agent[..., None, :]
        clearance = np.minimum(CLEARANCE, shapely.distance(shapely.points(agent), TEE) - 0.1)
        straight = np.where(clear(agent, APPROACHES, clearance), np.linalg.norm(APPROACHES - agent, axis=-1), np.inf)
        first = np.where(clear(agent, CORNERS, clearance), np.linalg.norm(CORNERS - agent, axis=-1), np.inf)
        return np.minimum(straight, (first[..., None] + self.to_approach).min(-2))

    def path(self, agent: np.ndarray, contact: int) -> np.ndarray:
        """float64[P, 2]: way points of the shortest walk, agent first, approach last (block frame)."""
        goal = APPROACHES[contact]
        if clear(agent, goal):
            return np.stack([agent, goal])
        first = np.where(clear(agent, CORNERS), np.linalg.norm(CORNERS - agent, axis=-1), np.inf)
        corner = int(np.argmin(first + self.to_approach[:, contact]))
        points = [agent, CORNERS[corner]]
        while not clear(CORNERS[corner], goal):
            onward = self.direct[corner] + self.to_approach[:, contact]
            onward[corner] = np.inf
            corner = int(np.argmin(onward))
            points.append(CORNERS[corner])
        return np.stack([*points, goal])


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


def _in_walls(poses):
    corners = transform(poses[..., None, :], OUTLINE)
    return np.maximum(WALL - corners, corners - (WORKSPACE - 1 - WALL + 1)).max((-1, -2))  # FIXME


@cache
def _after_push():
    lib = push_library()
    n = np.arange(MAX_PUSH + 1)[None, :, None]
    agent = CENTRES[:, None] + STEP_LENGTH * n * NORMALS[:, None]
    cos, sin = np.cos(lib[..., 2]), np.sin(lib[..., 2])
    d = agent - lib[..., :2]
    agent = np.stack([cos * d[..., 0] + sin * d[..., 1], -sin * d[..., 0] + cos * d[..., 1]], -1)
    touched = np.linalg.norm(agent[:, :, None] - CENTRES, axis=-1).argmin(-1)
    return touched, Walks(GOAL_POSE).lengths(CENTRES)


BEAM = 48
DEPTH = 3
OVERHEAD = 6.0
PX_PER_STEP = 18.0
COARSE = np.unique(np.round(1.25 ** np.arange(0, 22)).astype(int))
DONE = 0.965
N = np.arange(1, MAX_PUSH + 1)


def compose(pose, motion):
    return np.concatenate([transform(pose, motion[..., :2]), pose[..., 2:] + motion[..., 2:]], -1)


def plan_push(agent: np.ndarray, pose: np.ndarray) -> Push | None:
    library = push_library()
    touched, between = _after_push()
    error0 = pose_error(pose, GOAL_POSE)
    depth0 = _in_walls(pose)
    nodes = pose[None]
    cost = np.zeros(1)
    walk = Walks(pose).lengths(to_block(pose, agent))[None]
    root = None
    best = (np.inf, None)
    for depth in range(DEPTH):
        ends = compose(nodes[:, None, None], library[None, :, 1:])  # [B, K, N, 3]
        starts = inside(transform(nodes[:, None], CENTRES))  # [B, K]
        err = pose_error(ends, GOAL_POSE)
        g = (cost[:, None] + walk / PX_PER_STEP + OVERHEAD + np.where(starts, 0, np.inf))[
            ..., None
        ] + N * STEP_LENGTH / PX_PER_STEP
        f = g + 25 + err / 0.8
        # candidates for goal
        flat = np.flatnonzero((err < 6).ravel() & np.isfinite(f.ravel()))
        if len(flat):
            cov = coverage(ends.reshape(-1, 3)[flat])
            done = cov > DONE
            flat, cov = flat[done], cov[done]
            fd = g.ravel()[flat] - 60 * (cov - DONE)
            f.ravel()[flat] = fd
        # best overall: solves or cuts
        ok = f + np.where((err <= 0.7 * error0), 0, np.inf)
        order = np.argsort(ok.ravel(), kind="stable")[:20]
        for o in order:
            if not ok.ravel()[o] < best[0]:
                break
            if _in_walls(ends.reshape(-1, 3)[o]) <= max(0.5, depth0 + 0.5):
                b, k, n = np.unravel_index(o, f.shape)
                best = (ok.ravel()[o], (k, n) if root is None else tuple(root[b]))
                break
        if depth == DEPTH - 1:
            break
        fc = f[:, :, COARSE - 1]
        order = np.argsort(fc.ravel(), kind="stable")[: 4 * BEAM]
        order = order[np.isfinite(fc.ravel()[order])]
        b, k, c = np.unravel_index(order, fc.shape)
        n = COARSE[c] - 1
        e = ends[b, k, n]
        keep = np.flatnonzero(_in_walls(e) <= max(0.5, depth0 + 0.5))[:BEAM]
        b, k, n = b[keep], k[keep], n[keep]
        root = np.stack([k, n], -1) if root is None else root[b]
        cost = g[b, k, n]
        nodes = ends[b, k, n]
        walk = between[touched[k, n + 1]]
    if best[1] is None:
        return None
    k, n = best[1]
    return Push(int(k), compose(pose, library[k, : n + 2]))
