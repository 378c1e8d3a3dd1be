"""Targets of an arm: within limits, in steps, and held when there is nothing to do or somebody stopped it."""

import numpy as np
import pytest
from support.random_policies import build_policy

from vla0_trl import VLAPolicy
from vla0_trl.actions import NormStats
from vla0_trl.serving.engine import Engine
from vla0_trl.serving.layouts import LAYOUTS
from vla0_trl.serving.requests import RequestReader
from vla0_trl.serving.safety import JointLimits, SafeArm, next_target
from vla0_trl.serving.server import PolicyServer, ServerOptions

TOLD = {"action_range": [[-100.0, 0.0], [100.0, 50.0]], "fps": 10.0}


def test_limits_are_those_of_the_demonstrations_with_a_margin():
    limits = JointLimits.of(TOLD, margin=0.1)
    assert (limits.low.tolist(), limits.high.tolist()) == ([-120, -5], [120, 55])
    assert limits.step.tolist() == [24, 6]  # the range in a second, which has ten ticks
    assert JointLimits.of(TOLD, max_step=3.0).step.tolist() == [3, 3]


@pytest.mark.parametrize("setting", [{"margin": -0.1}, {"margin": np.nan}, {"max_step": 0.0}, {"max_step": np.nan}])
def test_settings_that_limit_nothing_are_refused(setting):
    with pytest.raises(ValueError, match=r"margin=.* must be from 0 to 1, max_step=.* above 0"):
        JointLimits.of(TOLD, **setting)


def test_relative_actions_have_the_range_of_the_states_first_numbers():
    base = build_policy("nano")
    stats = NormStats.from_array(np.float32([[-1, -2, -3], [1, 2, 3]]))
    config = base.config.replace(relative_actions=True, state_dim=3, state_stats=stats)
    engine = Engine(VLAPolicy(base.model, base.processor, config))
    told = PolicyServer(engine, RequestReader(LAYOUTS["plain"], config), ServerOptions()).metadata()
    arm = SafeArm(JointLimits.of(told, margin=0.0, max_step=9.0))
    assert arm.next_target(np.float32([5, 5]), np.zeros(2)).tolist() == [1, 2]


LIMITS = JointLimits(np.array([-120.0, -5.0]), np.array([120.0, 55.0]), np.array([24.0, 6.0]))


@pytest.mark.parametrize(
    "action, last, wanted",
    [
        ([10, 20], [0, 18], [10, 20]),
        ([130, 70], [110, 50], [120, 55]),  # limits
        ([-130, -70], [-110, 0], [-120, -5]),
        ([100, 20], [0, 40], [24, 34]),  # steps
        ([0, 0], [-200, 100], [-176, 94]),  # from beyond the limits: by steps, too
        ([np.nan, 20], [1, 2], [1, 2]),
        ([10, np.inf], [1, 2], [1, 2]),
        (None, [1, 2], [1, 2]),
    ],
)
def test_a_target_is_within_limits_and_a_step_away(action, last, wanted):
    action = None if action is None else np.array(action, np.float32)
    assert next_target(action, np.array(last, np.float64), LIMITS).tolist() == wanted


def test_steps_count_from_the_last_target_and_first_from_where_the_arm_is():
    arm = SafeArm(LIMITS)
    far, measured = np.array([100.0, 50.0]), np.array([0.0, 0.0])
    assert arm.next_target(None, measured).tolist() == [0, 0]
    assert arm.next_target(None, measured - 5).tolist() == [0, 0]  # it sags, and does not sink
    assert arm.next_target(far, measured - 5).tolist() == [24, 6]
    assert arm.next_target(far, measured - 5).tolist() == [48, 12]
    arm.reset()
    assert arm.next_target(far, np.array([10.0, 10.0])).tolist() == [34, 16]


def test_the_emergency_stop_lasts():
    arm = SafeArm(LIMITS)
    far, measured = np.array([100.0, 50.0]), np.array([0.0, 0.0])
    arm.next_target(far, measured)
    arm.stop()
    assert [arm.next_target(far, measured).tolist() for _ in range(3)] == [[24, 6]] * 3
    arm.reset()
    assert arm.stopped and arm.next_target(far, measured).tolist() == [0, 0]
