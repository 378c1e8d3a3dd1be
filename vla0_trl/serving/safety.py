"""Between a policy and an arm: what may be commanded in the next tick. No clock and no network; needs NumPy alone.

For arms whose actions are joint positions, such as the SO-100 and SO-101:

    arm = SafeArm(JointLimits.of(client.metadata))
    while running:  # metadata["fps"] times per second
        robot.command(arm.next_target(client.step(message), measured))

`arm.stop()`, from any thread, is the emergency stop: the arm holds its position from then on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

MARGIN = 0.05  # of a joint's range in the demonstrations, beyond each of its ends


@dataclass(frozen=True)
class JointLimits:
    """Each (D,), in the joints' units: lowest and highest position, and the largest step in one tick."""

    low: np.ndarray
    high: np.ndarray
    step: np.ndarray

    @classmethod
    def of(cls, metadata: dict[str, Any], margin: float = MARGIN, max_step: float | None = None) -> JointLimits:
        """From what the demonstrations did, which a server's metadata tell.

        Args:
            metadata: with `action_range`, lowest and highest position of each joint, and `fps`.
            margin (`float`): fraction of a joint's range that it may go beyond either end.
            max_step (`float`, *optional*): for every joint, in its units. Default: its range in a second.

        `ValueError`: the margin is negative, or the step is not above 0.
        """
        if not 0 <= margin <= 1 or (max_step is not None and not 0 < max_step < np.inf):
            raise ValueError(f"margin={margin} must be from 0 to 1, max_step={max_step} above 0")
        low, high = np.asarray(metadata["action_range"], np.float64)
        room = margin * (high - low)
        low, high = low - room, high + room
        step = (high - low) / metadata["fps"] if max_step is None else np.full_like(low, max_step)
        return cls(low, high, step)


def next_target(action: np.ndarray | None, last: np.ndarray, limits: JointLimits) -> np.ndarray:
    """The positions to command in this tick, float64 (D,).

    Args:
        action (D,): what the policy wants; None or anything that is not finite: hold.
        last (D,): what was commanded last. Steps count from there and not from the measured positions: a servo lags by
            several ticks, and an arm that sags would sink with every measurement.
    """
    if action is None or not np.isfinite(action).all():
        return last
    wanted = np.clip(np.asarray(action, np.float64), limits.low, limits.high)
    return np.clip(wanted, last - limits.step, last + limits.step)


class SafeArm:
    """The targets of one arm, tick by tick; the first counts from where the arm was measured.

    Attributes:
        stopped (`bool`): by the emergency stop; nothing but a new object ends it.
    """

    def __init__(self, limits: JointLimits):
        self.limits, self.stopped = limits, False
        self._last: np.ndarray | None = None

    def stop(self) -> None:
        self.stopped = True

    def reset(self) -> None:
        """Somebody else moved the arm: steps count from where it is measured next."""
        self._last = None

    def next_target(self, action: np.ndarray | None, measured: np.ndarray) -> np.ndarray:
        """See [`next_target`]; `measured` (D,) is where the arm is now."""
        last = np.asarray(measured, np.float64) if self._last is None else self._last
        self._last = next_target(None if self.stopped else action, last, self.limits)
        return self._last
