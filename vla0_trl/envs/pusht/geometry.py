"""Geometry of PushT: poses of the block, frames of reference, coverage, walls.

Poses are (x, y, angle) of the block's origin, the middle of the bar's outer edge. The "block frame" has that origin,
the bar along x and the stem along +y. Lengths are in px, angles in radians.
"""

import numpy as np
import shapely

from vla0_trl.envs.pusht.env import WORKSPACE

# gym-pusht's own geometry: add_circle, add_tee (outline in the block frame, centre of gravity), _setup
AGENT_RADIUS = 15.0
OUTLINE = np.array([(-60, 0), (60, 0), (60, 30), (15, 30), (15, 120), (-15, 120), (-15, 30), (-60, 30)], float)
TEE = shapely.Polygon(OUTLINE)
MASS_CENTER = np.array([0.0, 45.0])
GYRATION = 55.0  # px; sqrt(inertia / mass) = sqrt(3000) is what a radian of rotation weighs against a px of shift
GOAL_POSE = np.array([256.0, 256.0, np.pi / 4])
GOAL = shapely.Polygon([(256 + (x - y) * 0.5**0.5, 256 + (x + y) * 0.5**0.5) for x, y in OUTLINE])
WALLS = np.array([(5, 5), (506, 5), (506, 506), (5, 506)], float)
WALL_RADIUS = 2.0
MARGIN = 12.0  # px inside the workspace where the agent's centre stays (in the human demonstrations at least 12)


def rotation(angle: np.ndarray) -> np.ndarray:
    """Matrices [..., 2, 2] that take row vectors from the world to the block frame, multiplied from the right."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([np.stack([cos, -sin], axis=-1), np.stack([sin, cos], axis=-1)], axis=-2)


def to_block(pose: np.ndarray, points: np.ndarray) -> np.ndarray:
    """World points [..., 2] in the frame of the block at `pose`, float[3]."""
    return (points - pose[:2]) @ rotation(pose[2])


def to_world(poses: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points [..., 2] of the frames of blocks at `poses` [..., 3] in the world, broadcast."""
    cos, sin = np.cos(poses[..., 2]), np.sin(poses[..., 2])
    x, y = points[..., 0], points[..., 1]
    return np.stack([poses[..., 0] + cos * x - sin * y, poses[..., 1] + sin * x + cos * y], axis=-1)


def compose(poses: np.ndarray, motions: np.ndarray) -> np.ndarray:
    """`poses` [..., 3] after `motions` [..., 3] in the block's own frame, broadcast."""
    position = to_world(poses, motions[..., :2])
    angle = poses[..., 2:] + motions[..., 2:]
    return np.concatenate([position, angle], axis=-1)


def pose_distance(poses: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Distance of poses [..., 3] in px: the shift of the centre of mass, and the turn times the radius of gyration."""
    shift = to_world(poses, MASS_CENTER) - to_world(other, MASS_CENTER)
    turn = (poses[..., 2] - other[..., 2] + np.pi) % (2 * np.pi) - np.pi
    return np.sqrt((shift**2).sum(-1) + (GYRATION * turn) ** 2)


def coverage(poses: np.ndarray) -> np.ndarray:
    """gym-pusht's metric, the share of the target under the block, float64[N], for poses [N, 3]."""
    blocks = shapely.polygons(to_world(poses[:, None], OUTLINE))
    return shapely.area(shapely.intersection(GOAL, blocks)) / GOAL.area


def beyond_walls(poses: np.ndarray) -> np.ndarray:
    """How far blocks at poses [..., 3] reach into the walls, float64[...] in px; negative if they do not."""
    outline = to_world(poses[..., None, :], OUTLINE)
    return np.maximum(WALLS[0] + WALL_RADIUS - outline, outline - WALLS[2] + WALL_RADIUS).max((-1, -2))


def inside(points: np.ndarray) -> np.ndarray:
    """Whether the agent's centre may be at world points [..., 2], bool[...]."""
    return ((points >= MARGIN) & (points <= WORKSPACE - MARGIN)).all(-1)
