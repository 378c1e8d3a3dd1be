"""What vla-eval's benchmarks show (0.8.0), as observations of a checkpoint; nothing of vla-eval is imported here."""

from typing import Any

import numpy as np

from vla0_trl.config import VLAConfig
from vla0_trl.envs.libero.protocol import STATE_DIM
from vla0_trl.policy.observation import Observation, check_observation

# Their names of cameras -> those of checkpoints. Others must have a checkpoint's name.
CAMERAS = {"agentview": ("image",), "wrist": ("wrist_image", "image2")}
AXIS_ANGLE = slice(3, 6)  # in LIBERO's state


def observation_params(config: VLAConfig) -> dict[str, Any]:
    """What a benchmark must be told to send: the picture at the wrist, and the state."""
    params = {}
    if len(config.cameras) > 1:
        params["send_wrist_image"] = True
    if config.use_state or config.relative_actions:
        params["send_state"] = True
    return params


def read_observation(found: dict[str, Any], config: VLAConfig) -> Observation:
    """A benchmark's observation: `images` by camera, `task_description`, and `states` or `state`.

    LIBERO's orientation is given on the branch that training has seen, see [`nearest_axis_angle`].

    `ValueError`: it lacks a camera or the state.
    """
    images = {}
    for name, image in found.get("images", {}).items():
        for camera in (name, *CAMERAS.get(name, ())):
            images[camera] = image
    state = found.get("states", found.get("state"))
    if state is not None:
        state = np.asarray(state, np.float32)
        if config.state_stats is not None and len(state) == config.state_dim == STATE_DIM:
            state = state.copy()
            state[AXIS_ANGLE] = nearest_axis_angle(state[AXIS_ANGLE], np.asarray(config.state_stats.mean)[AXIS_ANGLE])
    return check_observation({"images": images, "state": state, "task": found.get("task_description")}, config)


def nearest_axis_angle(rotation: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """The same rotation, (3,), by one turn less or not, whichever is nearer to the mean of the training data.

    robosuite's own conversion gives angles up to 2π; vla-eval's turns the axis round beyond π, and the state that a
    checkpoint knows as [3.18, 0, 0] is [−3.10, 0, 0] there. A LIBERO benchmark of theirs can be told to give
    robosuite's (`quat_no_antipodal`; 83 → 97 % for OpenVLA-OFT in their documentation), but LIBERO-PRO's drops that.
    """
    angle = np.linalg.norm(rotation)
    if angle < 1e-6:
        return rotation
    other = rotation * (1 - 2 * np.pi / angle)
    return other if np.linalg.norm(other - mean) < np.linalg.norm(rotation - mean) else rotation
