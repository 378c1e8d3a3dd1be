"""A policy that vla0_trl serves, in LeRobot: `--policy.type=vla0 --policy.url=ws://…` (eval/README.md)."""

from .configuration_vla0 import VLA0Config

__all__ = ["VLA0Config"]
