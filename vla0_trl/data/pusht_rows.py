"""Rows of PushT that a teacher labelled: states from many places, drawn by the simulator, each with its own chunk.

They are frames that do not follow each other. In the chat dataset an "episode" of theirs is a block of `BLOCK_ROWS`
such frames, so that conversion, `--num_proc` and holding out episodes work as with recorded ones.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from vla0_trl.config import VLAConfig
from vla0_trl.data.episodes import Episode, SourceInfo, raw_rows, rows_of
from vla0_trl.envs.pusht.env import CAMERA, STATE_MODES, TASK, WORKSPACE, PushTEnv
from vla0_trl.envs.pusht.teacher import PushTTeacher, mirror_states

BLOCK_ROWS = 100
MAX_REACH = 160.0  # px between agent and target in a label; one label in 1,000 is farther, and would widen every bin
# Jitter of states, standard deviations: the agent's in px; the block's in px and radians, times U(0, 1) for each state
AGENT_JITTER, BLOCK_JITTER, ANGLE_JITTER = 10.0, 15.0, 0.4
UNIFORM_SHARE = 0.15  # of rows whose state is drawn uniformly, so that states that no episode reaches are seen, too
EDGE = 12.0  # px that all positions keep from the edge of the workspace
BLOCK_EDGE = 80.0  # px that a uniformly drawn block's origin keeps


def scatter(pool: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """States for rows, float64[count, 5]: of a pool of full states, float[N, 5], half of them mirrored, all of them
    jittered; and a share from anywhere.
    """
    states = pool[rng.integers(len(pool), size=count)].astype(np.float64)
    mirrored = rng.random(count) < 0.5
    states[mirrored] = mirror_states(states[mirrored])
    jitter = rng.normal(size=(count, 5)) * ([AGENT_JITTER] * 2 + [BLOCK_JITTER] * 2 + [ANGLE_JITTER])
    jitter[:, 2:] *= rng.random((count, 1))
    states += jitter
    anywhere = rng.random(count) < UNIFORM_SHARE
    low = [EDGE] * 2 + [BLOCK_EDGE] * 2 + [0.0]
    high = [WORKSPACE - EDGE] * 2 + [WORKSPACE - BLOCK_EDGE] * 2 + [2 * np.pi]
    states[anywhere] = rng.uniform(low, high, (anywhere.sum(), 5))
    states[:, :4] = states[:, :4].clip(EDGE, WORKSPACE - EDGE)
    return states


def labelled_frames(states: np.ndarray, teacher: PushTTeacher, state: str = "agent", name: str = "states") -> Episode:
    """Full states float[N, 5] as frames with the teacher's chunks; `state`, of `STATE_MODES`, is told to the policy.

    Images are drawn, and actions are float32[N, chunk_size, 2]: absolute targets in px.
    """
    env = PushTEnv("full")
    env.reset(0)
    frames, seen = [], np.zeros((len(states), 5), np.float32)
    for index, full_state in enumerate(states):
        env.place(full_state)
        observation = env.observe()
        frames.append(observation["images"][CAMERA])
        seen[index] = observation["state"]
    env.close()
    chunks = teacher.label(seen).clip(-MAX_REACH, MAX_REACH) + seen[:, None, :2]
    return Episode(TASK, chunks, {CAMERA: frames}, seen[:, : STATE_MODES[state]], name)


def rows_from_states(states: np.ndarray, teacher: PushTTeacher, state: str = "agent") -> list[dict[str, Any]]:
    """Full states float[N, 5] that a policy came to, drawn and labelled: N rows with the chat dataset's raw columns.

    `frame_index` counts them, `episode_index` is 0; images are `{"bytes": …, "path": None}`.
    """
    config = VLAConfig(
        cameras=[CAMERA], state_dim=STATE_MODES[state], chunk_size=teacher.sizes["chunk_size"], use_state=True
    )
    return rows_of(raw_rows(labelled_frames(states, teacher, state), config, index=0))


@dataclass
class TeacherRows:
    """A source of rows: block i is drawn and labelled from states that depend on the pool, the seed and i alone.

    Args:
        pool (`np.ndarray`): float32[N, 5], full states of episodes, see [`scatter`].
        num_rows (`int`): of all blocks together; the last block may be shorter.
        state (`str`): see [`labelled_frames`].
    """

    teacher: PushTTeacher
    pool: np.ndarray
    num_rows: int
    seed: int
    state: str
    info: SourceInfo

    def __len__(self) -> int:
        return -(-self.num_rows // BLOCK_ROWS)

    def task(self, index: int) -> str:
        return TASK

    def episode(self, index: int) -> Episode:
        count = min(BLOCK_ROWS, self.num_rows - index * BLOCK_ROWS)
        states = scatter(self.pool, count, np.random.default_rng([self.seed, index]))
        return labelled_frames(states, self.teacher, self.state, f"block {index} of {self.info.source}")
