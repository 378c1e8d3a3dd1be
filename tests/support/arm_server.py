"""A policy for an SO-100 behind the real server, whose actions say what was executed: python arm_server.py PORT KIND.

`ramp`: the first joint goes on by `STEP` from where it is, in each action of a chunk. An action that is executed
twice, or late, or left out, is a step that is not `STEP`. `wild`: all joints jump between far too
much and far too little.
"""

import sys
import threading
import time

import numpy as np

from support.serving import served
from vla0_trl import VLAConfig
from vla0_trl.policy.observation import Observation
from vla0_trl.serving.layouts import LAYOUTS
from vla0_trl.stats import NormStats

STEP = 0.0625  # degrees; exact in float32
LOW, HIGH, LATENCY_S, CHUNK = -100.0, 100.0, 0.2, 30


class ArmPolicy:
    decoder = None

    def __init__(self, kind: str):
        self.kind = kind
        stats = NormStats.from_array(np.array([[LOW] * 6, [HIGH] * 6]))
        self.config = VLAConfig(
            cameras=["front"], action_dim=6, state_dim=6, use_state=True, chunk_size=CHUNK, n_action_steps=CHUNK,
            action_stats=stats, state_stats=stats, fps=30.0, units="degrees", robot="so100_follower",
        )  # fmt: skip

    def reset(self) -> None:
        """It remembers nothing."""

    def predict_action_chunk(self, observations: list[Observation], prefixes: list | None = None) -> np.ndarray:
        time.sleep(LATENCY_S)
        states = np.stack([observation["state"] for observation in observations]).astype(np.float32)
        chunks = np.repeat(states[:, None], CHUNK, axis=1)
        if self.kind == "ramp":
            chunks[:, :, 0] += STEP * np.arange(1, CHUNK + 1, dtype=np.float32)
        else:
            chunks[:, ::2], chunks[:, 1::2] = 1000.0, -1000.0
        return chunks


if __name__ == "__main__":
    with served(ArmPolicy(sys.argv[2]), LAYOUTS["so100"], warm=True, port=int(sys.argv[1])) as server:
        print(server.port, flush=True)
        threading.Event().wait()
