"""One environment: what a simulator must do, and how its steps are asked for."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np

from vla0_trl.config import Observation

Seed = Hashable  # what an environment's `reset` takes: a number, or a tuple that names task and initial state


class Environment(Protocol):
    """What a simulator must do to be evaluated. Anything it raises ends the evaluation: a crash is not a failure."""

    def reset(self, seed: Seed) -> None:
        """Start the episode of this seed, whatever happened before."""

    def observe(self) -> Observation:
        """`{"images": {camera: uint8[H, W, 3]}, "state": float32[S] | None, "task": str}`; called once per query."""

    def step(self, action: np.ndarray) -> bool:
        """Execute float32[D] in environment units; True when the episode is over."""

    def frame(self) -> np.ndarray:
        """uint8[256, 256, 3] for a video."""

    def result(self) -> dict[str, Any]:
        """The episode's numbers, `success` and `steps` among them."""

    def close(self) -> None:
        """Release the simulator."""


class EpisodeCrash(RuntimeError):
    """The simulator broke down, or its process died, during an episode, which therefore has no result."""


@dataclass
class StepResult:
    """What an environment gives back: the next observation, or the result of the finished episode."""

    observation: Observation | None = None
    result: dict[str, Any] | None = None
    frames: list[np.ndarray] = field(default_factory=list)


class EnvRunner:
    """Runs episodes in one environment: steps are asked for, then waited for.

    This one works when it is waited for; [`vla0_trl.evaluation.workers.Worker`] at once, in another process.
    """

    concurrent = False

    def __init__(self, env: Environment):
        self.env = env

    def start(self, seed: Seed, record: bool) -> None:
        """Ask for the first observation of an episode."""
        self._asked = partial(self._start, seed, record)

    def execute(self, actions: np.ndarray) -> None:
        """Ask for what follows these actions (n, action_dim)."""
        self._asked = partial(self._execute, actions)

    def wait(self) -> StepResult:
        """What was asked for; a worker raises `EpisodeCrash`, this one what its environment raises."""
        return self._asked()

    def restart(self) -> None:
        """Take a fresh environment after an `EpisodeCrash`, which only workers raise."""

    def _start(self, seed: Seed, record: bool) -> StepResult:
        self.record = record
        self.env.reset(seed)
        return StepResult(self.env.observe(), frames=self._film())

    def _execute(self, actions: np.ndarray) -> StepResult:
        frames = []
        for action in actions:
            done = self.env.step(action)
            frames += self._film()
            if done:
                return StepResult(result=self.env.result(), frames=frames)
        return StepResult(self.env.observe(), frames=frames)

    def _film(self) -> list[np.ndarray]:
        return [self.env.frame()] if self.record else []


@contextmanager
def local_envs(make_env: Callable[[], Environment], count: int) -> Iterator[list[Environment]]:
    """`count` environments in this process, which are closed at the end of the block, however it ends."""
    with ExitStack() as stack:
        yield [stack.enter_context(closing(make_env())) for _ in range(count)]
