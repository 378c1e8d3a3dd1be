"""Rows of LIBERO that a teacher labelled: frames of episodes that noise, or the policy in training, has disturbed.

Each frame has the actions that the teacher would have done there and at the states that followed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vla0_trl.config import VLAConfig
from vla0_trl.data.episodes import Episode, SourceInfo, action_windows, raw_rows
from vla0_trl.envs.libero.protocol import ACTION_DIM, STATE_DIM
from vla0_trl.envs.libero.teacher import TeachingEnv, drive_with_noise, split_states

EVERY = 2  # steps between frames: neighbours look alike, and drawing takes most of the time
CHUNK_SIZE = 8  # a recipe may ask for shorter ones


def labelled_frames(states: np.ndarray, env: TeachingEnv, chunk_size: int, name: str = "states") -> Episode:
    """The states that `TeachingEnv.full_state` gave, of one episode or more, as frames with the teacher's chunks.

    Args:
        states (`np.ndarray`): float64[N, S].

    Returns:
        [`Episode`]: with drawn images, and actions float32[about N / EVERY, chunk_size, 7].
    """
    chunks, seen, frames = [], [], {camera: [] for camera in env.env.cameras}
    for actions, robot_states, simulator_states in split_states(states):
        chunks.append(action_windows(actions, chunk_size)[::EVERY])
        seen.append(robot_states[::EVERY])
        for state in simulator_states[::EVERY]:
            env.env.place(state)
            for camera, picture in env.env.pictures().items():
                frames[camera].append(picture)
    return Episode(env.env.task, np.concatenate(chunks).astype(np.float32), frames, np.concatenate(seen), name)


def rows_from_states(
    states: np.ndarray, make_env: Callable[[], TeachingEnv], chunk_size: int = CHUNK_SIZE
) -> list[dict[str, Any]]:
    """States that a policy came to, as rows with the raw columns of the chat dataset, drawn and labelled."""
    env = make_env()
    try:
        episode = labelled_frames(states, env, chunk_size)
        config = VLAConfig(
            cameras=list(env.env.cameras),
            action_dim=ACTION_DIM,
            state_dim=STATE_DIM,
            chunk_size=chunk_size,
            use_state=True,
        )
        pieces = raw_rows(episode, config, 0)
        return [dict(zip(piece, row, strict=True)) for piece in pieces for row in zip(*piece.values(), strict=True)]
    finally:
        env.close()


@dataclass
class TeacherEpisodes:
    """A source of rows: episode i depends on the seed and i alone.

    Args:
        make_env: opens the task; one at a time in each process.
        task_text (`str`): its instruction.
        first_seed (`int`), num_episodes (`int`): of placements and noise.
        chunk_size (`int`): actions of a frame.
        info ([`SourceInfo`]): for the card.
    """

    make_env: Callable[[], TeachingEnv]
    task_text: str
    first_seed: int
    num_episodes: int
    chunk_size: int
    info: SourceInfo
    _env: TeachingEnv | None = field(default=None, init=False, repr=False)

    def __len__(self) -> int:
        return self.num_episodes

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_env": None}  # every process opens its own

    def task(self, index: int) -> str:
        return self.task_text

    def episode(self, index: int) -> Episode:
        self._env = self._env or self.make_env()
        seed = self.first_seed + index
        return labelled_frames(drive_with_noise(self._env, seed), self._env, self.chunk_size, f"seed {seed}")
