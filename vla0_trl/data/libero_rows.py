"""Rows of LIBERO that a teacher labelled: frames of episodes that noise, or the policy in training, has disturbed.

Each frame has the actions that the teacher would have done there and at the states that followed.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from vla0_trl import __version__
from vla0_trl.config import VLAConfig
from vla0_trl.data.episodes import Episode, SourceInfo, action_windows, raw_rows, rows_of
from vla0_trl.envs.libero.protocol import ACTION_DIM, CONTROL_FREQUENCY, STATE_DIM, UNITS
from vla0_trl.envs.libero.setup import instruction, task_names
from vla0_trl.envs.libero.teacher import SUITE, TeachingEnv, drive_with_noise, split_states

EVERY = 2  # steps between frames: neighbours look alike, and drawing takes most of the time


def simulated(source: str, how: str, assets_dir: Path, options: dict[str, Any]) -> SourceInfo:
    """What the card says of episodes from the LIBERO simulator: who acted, and how."""
    return SourceInfo(
        source=source,
        revision=f"vla0_trl {__version__}, hf-libero {version('hf-libero')}, mujoco {version('mujoco')}",
        license="apache-2.0",
        robot="Franka Panda in LIBERO (robosuite, OSC_POSE)",
        fps=CONTROL_FREQUENCY,
        how=f"{how} Both cameras are rotated by 180°, as in evaluation. Assets: {assets_dir.name}.",
        options=options,
        units=UNITS,
    )


def labelled_frames(states: np.ndarray, env: TeachingEnv, chunk_size: int, every: int = EVERY) -> list[Episode]:
    """Each episode of some `TeachingEnv.full_state`s, float64[N, S], as frames with the teacher's chunks.

    Images are drawn, and actions are float32[steps / every, chunk_size, 7].
    """
    episodes = []
    for seed, actions, robot_states, simulator_states in split_states(states):
        libero, frames = env.open(seed), {camera: [] for camera in env.cameras}
        for state in simulator_states[::every]:
            libero.place(state)
            for camera, picture in libero.pictures().items():
                frames[camera].append(picture)
        chunks = action_windows(actions, chunk_size)[::every].astype(np.float32)
        episodes.append(Episode(libero.task, chunks, frames, robot_states[::every], f"seed {seed}"))
    return episodes


def rows_from_states(states: np.ndarray, make_env: Callable[[], TeachingEnv], chunk_size: int) -> list[dict[str, Any]]:
    """States that a policy came to, as rows with the raw columns of the chat dataset, drawn and labelled."""
    rows = []
    with closing(make_env()) as env:
        config = VLAConfig(
            cameras=env.cameras, action_dim=ACTION_DIM, state_dim=STATE_DIM, chunk_size=chunk_size, use_state=True
        )
        for index, episode in enumerate(labelled_frames(states, env, chunk_size)):
            rows += rows_of(raw_rows(episode, config, index))
    return rows


@dataclass
class TeacherEpisodes:
    """A source of rows, task by task: an episode depends on its seed alone.

    Args:
        make_env: opens the tasks; one environment at a time in each process.
        episodes_per_task (`int`), first_seed (`int`): of placements and noise.
        chunk_size (`int`): actions of a frame.
        every (`int`): steps between frames.
        info ([`SourceInfo`]): for the card.
    """

    make_env: Callable[[], TeachingEnv]
    episodes_per_task: int
    first_seed: int
    chunk_size: int
    every: int
    info: SourceInfo

    def __post_init__(self):
        self._env = self.make_env()  # which opens no simulator yet

    def __len__(self) -> int:
        return self.episodes_per_task * len(self._env.task_ids)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_env": self.make_env()}  # every process opens its own simulator

    def seed(self, index: int) -> int:
        """The episodes of a task follow each other: to open another one takes seconds."""
        of_task, number = divmod(index, self.episodes_per_task)
        return self.first_seed + number * len(self._env.task_ids) + of_task

    def task(self, index: int) -> str:
        return instruction(task_names(SUITE)[self._env.task_id(self.seed(index))])

    def episode(self, index: int) -> Episode:
        states = drive_with_noise(self._env, self.seed(index))
        (episode,) = labelled_frames(states, self._env, self.chunk_size, self.every)
        return episode
