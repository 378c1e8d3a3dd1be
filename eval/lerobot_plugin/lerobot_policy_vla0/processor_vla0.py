"""Nothing happens to observations and actions here: the server does it."""

from typing import Any

from lerobot.processor import PolicyProcessorPipeline
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action

from .configuration_vla0 import VLA0Config


def make_vla0_pre_post_processors(
    config: VLA0Config, dataset_stats: dict[str, Any] | None = None
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """Called by LeRobot, by its name."""
    after = PolicyProcessorPipeline(
        steps=[], to_transition=policy_action_to_transition, to_output=transition_to_policy_action
    )
    return PolicyProcessorPipeline(steps=[]), after
