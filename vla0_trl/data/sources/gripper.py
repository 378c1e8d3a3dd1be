"""Gripper conventions of others' data; LIBERO's, and ours, is −1 open and +1 closed (robosuite: PandaGripper)."""

import numpy as np

from vla0_trl.data.episodes import EpisodeError

# Name -> (open, closed). RLDS-made data, OpenVLA's for one, has 1 for open.
CONVENTIONS = {"sign": (-1.0, 1.0), "0_open_1_closed": (0.0, 1.0), "1_open_0_closed": (1.0, 0.0)}
_TOLERANCE = 1e-3


def as_sign(actions: np.ndarray, convention: str, name: str) -> np.ndarray:
    """Actions (T, D) whose last dimension is a gripper by `convention` -> the same with −1 open and +1 closed."""
    is_open, is_closed = (np.abs(actions[:, -1] - value) <= _TOLERANCE for value in CONVENTIONS[convention])
    wrong = np.flatnonzero(~(is_open | is_closed))
    if len(wrong):
        conventions = ", ".join(f"{key} ({opened:g} and {closed:g})" for key, (opened, closed) in CONVENTIONS.items())
        raise EpisodeError(
            f"{name}, frame {wrong[0]}: the gripper, action[{actions.shape[1] - 1}], is {actions[wrong[0], -1]:g}, "
            f"which is neither open nor closed by --gripper {convention}: choose of {conventions}"
        )
    actions = actions.copy()
    actions[:, -1] = np.where(is_closed, 1.0, -1.0)
    return actions
