"""Fitting PushT's teacher: regression on whole chunks of the expert's targets.

What is drawn depends on the seed and the step alone, so that a stopped fit goes on as if it had not been stopped.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from vla0_trl.envs.pusht.driving import StateEpisode
from vla0_trl.envs.pusht.teacher import CHUNK_SIZE, PushTTeacher, mirror_chunks, mirror_states
from vla0_trl.files import whole_file

# Standard deviations of what is added to states while their absolute targets stay: x, y, x, y in px, angle
STATE_JITTER = np.array([1.0, 1.0, 1.0, 1.0, 0.01], np.float32)
LOSS_SCALE = 10.0  # px that count as 1 in the loss
HUBER = 0.5  # the loss is quadratic below this, and linear above


@dataclass
class FitSettings:
    """How a teacher is fitted: by AdamW, whose learning rate decays to zero over the steps."""

    steps: int = 40_000
    batch_size: int = 512
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup: int = 200  # steps
    average: float = 0.999  # decay of the running average of the weights, which is the teacher
    width: int = 512
    depth: int = 3
    seed: int = 0  # of the weights and of all that is drawn


class TeacherData:
    """States and the expert's next targets from there, and the same mirrored.

    Attributes:
        states (`torch.Tensor`): float32 (N, 5), full states.
        chunks (`torch.Tensor`): float32 (N, chunk_size, 2), targets relative to the agent, in px.
    """

    def __init__(self, chunk_size: int = CHUNK_SIZE):
        self.states = torch.zeros(0, 5)
        self.chunks = torch.zeros(0, chunk_size, 2)

    def __len__(self) -> int:
        return len(self.states)

    def add(self, episodes: Iterable[StateEpisode]) -> None:
        """Every step of the episodes; past the end of one, its last target repeats."""
        states, chunks = [self.states], [self.chunks]
        for episode in episodes:
            steps = np.arange(len(episode.actions))[:, None] + np.arange(self.chunks.shape[1])
            targets = episode.actions[np.minimum(steps, len(episode.actions) - 1)]
            relative = targets - episode.states[:, None, :2]
            states += map(torch.from_numpy, (episode.states, mirror_states(episode.states)))
            chunks += map(torch.from_numpy, (relative, mirror_chunks(relative).copy()))
        self.states, self.chunks = torch.cat(states), torch.cat(chunks)


class TeacherFit:
    """Regression of a teacher on [`TeacherData`], which may grow between steps.

    Attributes:
        done (`int`): steps so far.
        teacher ([`PushTTeacher`]): the running average of the network's weights.
    """

    def __init__(self, settings: FitSettings, data: TeacherData):
        self.settings, self.data, self.done = settings, data, 0
        torch.manual_seed(settings.seed)
        self._network = PushTTeacher(settings.width, settings.depth, data.chunks.shape[1])
        self.teacher = PushTTeacher(settings.width, settings.depth, data.chunks.shape[1])
        self.teacher.load_state_dict(self._network.state_dict())
        self._optimizer = torch.optim.AdamW(
            self._network.parameters(), settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )

    def step(self) -> float:
        """One batch; returns its loss."""
        settings = self.settings
        rng = np.random.default_rng([settings.seed, self.done])
        chosen = torch.from_numpy(rng.integers(len(self.data), size=settings.batch_size))
        jitter = torch.from_numpy(rng.standard_normal((settings.batch_size, 5), np.float32) * STATE_JITTER)
        states = self.data.states[chosen] + jitter
        chunks = self.data.chunks[chosen] - jitter[:, None, :2]

        decay = 0.5 * (1 + math.cos(math.pi * self.done / settings.steps))
        rate = min(1.0, (self.done + 1) / settings.warmup) * decay
        self._optimizer.param_groups[0]["lr"] = settings.learning_rate * rate
        with torch.autocast("cpu", torch.bfloat16):
            answers = self._network(states)
        loss = nn.functional.smooth_l1_loss(answers.float() / LOSS_SCALE, chunks / LOSS_SCALE, beta=HUBER)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()

        self.done += 1
        weight = max(1 - settings.average, 1 / (self.done + 1))  # a young average forgets its beginning sooner
        with torch.no_grad():
            torch._foreach_lerp_(list(self.teacher.parameters()), list(self._network.parameters()), weight)
        return loss.item()

    def save(self, path: Path) -> None:
        """Write all that going on needs, except the data, as one safetensors file."""
        tensors = {f"network.{name}": value for name, value in self._network.state_dict().items()}
        tensors |= {f"teacher.{name}": value for name, value in self.teacher.state_dict().items()}
        for index, state in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        with whole_file(path) as partial:
            save_file(tensors, partial, {"done": str(self.done)})

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote, of a fit with the same settings."""
        with safe_open(path, "pt") as file:
            self.done = int(file.metadata()["done"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a dict)

        def part(prefix: str) -> dict[str, torch.Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        self._network.load_state_dict(part("network."))
        self.teacher.load_state_dict(part("teacher."))
        optimizer = self._optimizer.state_dict()
        optimizer["state"] = {index: part(f"optimizer.{index}.") for index in optimizer["param_groups"][0]["params"]}
        self._optimizer.load_state_dict(optimizer)
