"""How chunks are executed, on every command line: recipes save it in the checkpoint, evaluations may change it."""

from dataclasses import dataclass, fields
from typing import Any

from vla0_trl.command_line import option
from vla0_trl.config import ENSEMBLE_WEIGHTS, VLAConfig


@dataclass
class ExecutionArguments:
    """Fields of [`VLAConfig`]; one that is not set keeps the dataset's or the checkpoint's value."""

    n_action_steps: int | None = option(None, "steps of a chunk to execute before the next")
    ensemble_size: int | None = option(
        None, "ask at every step and average this many chunks instead; not with n_action_steps"
    )
    ensemble_decay: float | None = option(None, "m of ACT's weights exp(-m*i), i=0 the oldest; not set: a plain mean")
    ensemble_weights: str | None = option(
        None,
        "instead: a plain mean; or VLA-0's released weights: 0.5 for all but the newest (v1), 0.5^age (v2)",
        choices=ENSEMBLE_WEIGHTS,
    )
    temperature: float | None = option(
        None, "draw answers with this temperature, 0: greedily; frees a policy that hesitates between two ways"
    )

    def execution_of(self, config: VLAConfig) -> VLAConfig:
        """The config with the execution that the flags ask for; `ValueError` if that is impossible."""
        return config.replace(**self.execution_changes())

    def execution_changes(self) -> dict[str, Any]:
        """The fields that the flags set.

        Steps of a chunk and ensembling exclude each other: asking for one replaces the config's other.
        """
        names = [field.name for field in fields(ExecutionArguments)]
        changes = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if "n_action_steps" in changes:
            changes.setdefault("ensemble_size", 1)
        elif changes.get("ensemble_size", 1) > 1:
            changes["n_action_steps"] = None
        return changes
