"""A policy as the driver of episodes that an expert labels (Ross et al., "DAgger", 2011)."""

import os
from functools import cached_property

import numpy as np
import torch

from vla0_trl.config import VLAConfig
from vla0_trl.models.fingerprint import checkpoint_hash
from vla0_trl.models.loading import checkpoint_folder
from vla0_trl.policy.policy import VLAPolicy


class Learner:
    """A checkpoint that drives; loaded on the first step, in every one of `num_proc` processes."""

    def __init__(self, checkpoint: str, num_proc: int = 1):
        self.checkpoint, self.num_proc = checkpoint, num_proc
        folder = checkpoint_folder(checkpoint)
        self.config, self.hash = VLAConfig.from_pretrained(folder), checkpoint_hash(folder)

    def reset(self) -> None:
        """A new episode begins."""
        self._policy.reset()

    def __call__(self, observation: dict) -> np.ndarray:
        """The next action, float32 (action_dim,); the state is cut to those dimensions that it was trained on."""
        return self._policy.select_action(observation | {"state": observation["state"][: self.config.state_dim]})

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_policy"}

    @cached_property
    def _policy(self) -> VLAPolicy:
        if self.num_proc > 1:  # this is a worker process, and others want their share of the cores
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.num_proc))
        return VLAPolicy.from_pretrained(self.checkpoint)
