"""A smooth teacher for PushT: a small MLP from the full state to a whole chunk of targets, in microseconds.

The scripted expert plans, and decides again at every push. An MLP fitted to its episodes answers at once and smoothly,
so that as many states as one likes can be labelled. `fitting` makes one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from vla0_trl.actions import interpolation
from vla0_trl.envs.pusht.env import WORKSPACE
from vla0_trl.envs.pusht.geometry import GOAL_POSE
from vla0_trl.files import whole_file

CHUNK_SIZE = 8  # steps that the teacher answers at once
TARGET_SCALE = 50.0  # px; what the network's outputs of size 1 mean
_LABEL_BATCH = 8192  # states in one forward pass


def mirror_states(states: np.ndarray) -> np.ndarray:
    """Full states [..., 5] as the mirror at the anti-diagonal shows them: walls and goal stay where they are.

    (x, y) becomes (512 − y, 512 − x), and the block's angle π/2 − angle, in [0, 2π).
    """
    agent_x, agent_y, block_x, block_y, angle = np.moveaxis(states, -1, 0)
    mirrored = (
        WORKSPACE - agent_y,
        WORKSPACE - agent_x,
        WORKSPACE - block_y,
        WORKSPACE - block_x,
        (np.pi / 2 - angle) % (2 * np.pi),
    )
    return np.stack(mirrored, axis=-1).astype(states.dtype)


def mirror_chunks(chunks: np.ndarray) -> np.ndarray:
    """Relative targets [..., 2] as the same mirror shows them: (dx, dy) becomes (−dy, −dx)."""
    return -chunks[..., ::-1]


def features(states: torch.Tensor) -> torch.Tensor:
    """float32 (N, 28) of full states (N, 5), all of size 1.

    Positions and angle, the agent as the block sees it, and how far the block is from the goal: near the goal the
    expert's next push depends on single pixels.
    """
    agent, block, angle = states[:, :2], states[:, 2:4], states[:, 4:]
    cos, sin = torch.cos(angle), torch.sin(angle)
    offset = (agent - block) / 100
    along = cos * offset[:, :1] + sin * offset[:, 1:]
    across = cos * offset[:, 1:] - sin * offset[:, :1]
    local = torch.cat([along, across], dim=1)
    waves = [wave(local * frequency) for frequency in (2.0, 4.0, 8.0) for wave in (torch.sin, torch.cos)]
    goal_x, goal_y, goal_angle = GOAL_POSE.tolist()
    shift = block - torch.tensor([goal_x, goal_y])
    turn = torch.remainder(angle - goal_angle + torch.pi, 2 * torch.pi) - torch.pi
    error = [torch.tanh(shift / 8), torch.tanh(shift / 30), torch.tanh(turn / 0.1), torch.tanh(turn / 0.4)]
    places = [(position - WORKSPACE / 2) / 150 for position in (agent, block)]
    return torch.cat([*places, 1.5 * cos, 1.5 * sin, local, offset, *waves, *error], dim=1)


class PushTTeacher(nn.Module):
    """The teacher's network; `label` is how to ask it."""

    def __init__(self, width: int = 512, depth: int = 3, chunk_size: int = CHUNK_SIZE):
        super().__init__()
        self.sizes = {"width": width, "depth": depth, "chunk_size": chunk_size}
        widths = [features(torch.zeros(1, 5)).shape[1]] + [width] * depth
        layers = [layer for inputs, outputs in pairwise(widths) for layer in (nn.Linear(inputs, outputs), nn.SiLU())]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(width, 2 * chunk_size)
        nn.init.zeros_(self.head.weight)  # it begins by staying where it is
        nn.init.zeros_(self.head.bias)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """float32 full states (N, 5) -> relative targets (N, chunk_size, 2) in px."""
        return TARGET_SCALE * self.head(self.trunk(features(states))).unflatten(1, (-1, 2))

    @torch.inference_mode()
    def label(self, states: np.ndarray) -> np.ndarray:
        """Full states float[N, 5] -> float32[N, chunk_size, 2], next steps' targets relative to the agent, in px."""
        states = torch.from_numpy(np.ascontiguousarray(states, dtype=np.float32))
        chunks = [self(batch) for batch in states.split(_LABEL_BATCH)]
        return torch.cat(chunks).numpy() if chunks else np.zeros((0, self.sizes["chunk_size"], 2), np.float32)

    def save(self, path: str | Path, notes: dict[str, Any] | None = None) -> None:
        """Write weights, sizes and `notes` (JSON values: how it was made) as one safetensors file."""
        metadata = {"sizes": json.dumps(self.sizes), "notes": json.dumps(notes or {})}
        with whole_file(Path(path)) as partial:
            save_file({name: value.contiguous() for name, value in self.state_dict().items()}, partial, metadata)

    @classmethod
    def load(cls, path: str | Path) -> PushTTeacher:
        """The inverse of `save`."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file: make a teacher with data_prep/teach_pusht.py")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a dict)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file ({error})") from error
        if "sizes" not in metadata:
            raise ValueError(f"{path} is not a teacher's file: make one with data_prep/teach_pusht.py")
        teacher = cls(**json.loads(metadata["sizes"]))
        try:
            teacher.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"{path} was made by another version: make it again ({error})") from error
        return teacher.eval()


def through_waypoints(chunks: np.ndarray, waypoints: Sequence[int]) -> np.ndarray:
    """Chunks [N, T, 2] of which only the waypoints, such as `[0, 3, 7]`, are written, and the others interpolated."""
    return (interpolation(waypoints, chunks.shape[1]) @ chunks[:, list(waypoints)]).astype(chunks.dtype)
