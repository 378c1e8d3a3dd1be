"""Small sources of episodes, and a scripted policy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla0_trl.config import VLAConfig
from vla0_trl.data.episodes import Episode, SourceInfo
from vla0_trl.evaluation.rollout import EpisodeResult

TASK = "Move the dot to the centre."


class DotSource:
    """Episodes of a white dot on a 48 px image that walks to the centre: state = position, action = next position."""

    def __init__(self, num_episodes: int = 6, steps: int = 10):
        self.num_episodes, self.steps = num_episodes, steps
        self.info = SourceInfo("dots", "1", "apache-2.0", "dot", 10.0, "Computed.", {"steps": steps})

    def __len__(self) -> int:
        return self.num_episodes

    def task(self, index: int) -> str:
        return TASK

    def episode(self, index: int) -> Episode:
        start = np.random.default_rng(index).uniform(4, 44, 2)
        path = np.linspace(start, [24, 24], self.steps + 1).astype(np.float32)
        frames = np.zeros((self.steps, 48, 48, 3), np.uint8)
        for frame, (x, y) in zip(frames, path.astype(int), strict=False):
            frame[y - 2 : y + 3, x - 2 : x + 3] = 255
        return Episode(TASK, path[1:], {"image": frames}, path[:-1], f"dots, episode {index}")


def small_config(**changes) -> VLAConfig:
    """Fits `small_episode`."""
    fields = {"cameras": ["front", "wrist"], "action_dim": 2, "state_dim": 3, "chunk_size": 4, "use_state": True}
    return VLAConfig(**fields | changes)


def small_episode(index: int = 0, frames: int = 7) -> Episode:
    """Two cameras of different size, two actions that wander off from a three-dimensional state."""
    rng = np.random.default_rng(index)
    states = (np.cumsum(rng.normal(size=(frames, 3)), 0) * 10 + 100).astype(np.float32)
    return Episode(
        task=f"task {index % 2}",
        actions=(states[:, :2] + rng.normal(size=(frames, 2)) * 5).astype(np.float32),
        states=states,
        images={
            "front": rng.integers(0, 256, (frames, 16, 20, 3), np.uint8),
            "wrist": rng.integers(0, 256, (frames, 8, 8, 3), np.uint8),
        },
        name=f"small source, episode {index}",
    )


@dataclass
class SmallSource:
    """`count` small episodes; those in `rejected` are none, and `broken` replaces one with a bad one."""

    count: int = 5
    rejected: tuple[int, ...] = ()
    broken: Episode | None = None
    broken_index: int = -1
    revision: str = "1"

    @property
    def info(self) -> SourceInfo:
        return SourceInfo("small source", self.revision, "mit", "none", 10.0, "Made up for tests.")

    def __len__(self) -> int:
        return self.count

    def task(self, index: int) -> str:
        return f"task {index % 2}"

    def episode(self, index: int) -> Episode | None:
        if index == self.broken_index:
            return self.broken
        return None if index in self.rejected else small_episode(index, frames=5 + index)


SEEDS = [100000 + i for i in range(6)]


class PushBlock:
    """From the full state: run the agent into the block and on through it, a real function of the observation."""

    def __init__(self, **settings):
        self.config = VLAConfig(action_dim=2, state_dim=5, chunk_size=8, **settings)
        self.batch_sizes: list[int] = []

    def predict_action_chunk(self, observations):
        self.batch_sizes.append(len(observations))
        chunks = []
        for observation in observations:
            assert observation["images"]["image"].shape == (96, 96, 3)
            agent, block = observation["state"][:2], observation["state"][2:4]
            steps = np.arange(1, 9)[:, None]
            chunks.append(np.clip(agent + steps * 0.2 * (block - agent), 0, 512))
        return np.stack(chunks).astype(np.float32)


RUN = {"checkpoint": "runs/a", "checkpoint_hash": "aa" * 32, "protocol": {"env": "PushT", "n_action_steps": 5}}


def small_result(seed: int, success: bool = False, coverage: float = 0.25) -> EpisodeResult:
    result = {"success": success, "max_coverage": coverage, "return": 3.5, "steps": 40}
    return EpisodeResult(seed, "push", result, model_calls=8, model_seconds=0.4, environment_seconds=0.6)
