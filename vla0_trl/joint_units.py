"""What LeRobot's joints are measured in. Numbers do not tell for sure: it is said, and contradictions are refused."""

import numpy as np

# What LeRobot records of a servo's joints: `use_degrees`, its default since 0.4.4, or −100…100 (a gripper 0…100).
DEGREES, NORMALIZED = JOINT_UNITS = ("degrees", "normalized")
_LARGEST = {NORMALIZED: 100.5, DEGREES: 360.0}  # with a calibrated joint that is pushed a little beyond its stops


def beyond_units(values: np.ndarray, units: str | None) -> float | None:
    """The largest of these values if no joint in `units` reaches it, else None. Other units have no limit."""
    largest = float(np.abs(values).max(initial=0))
    return largest if largest > _LARGEST.get(units, np.inf) else None


def units_shown(body: np.ndarray) -> str | None:
    """What these positions of joints (T, D), without a gripper, can only be in; None: they could be in either.

    LeRobot cuts −100…100 off exactly there; degrees go on.
    """
    largest = float(np.abs(body).max(initial=0))
    return DEGREES if largest > _LARGEST[NORMALIZED] else NORMALIZED if largest == 100 else None
