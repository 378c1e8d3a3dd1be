"""Many environments, one batched policy: from seeds to finished episodes.

The environments go in lock-step by *query*, not by time: all of them ask for a chunk together, in one call of the
model, then each executes its share of it. One that finishes takes the next seed at once, so the batch stays full.
"""

import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from tqdm.auto import tqdm

from vla0_trl.config import VLAConfig
from vla0_trl.ensembling import TemporalEnsembler, check_decay

Observation = dict[str, Any]


class Environment(Protocol):
    """What a simulator must do to be evaluated. Anything it raises ends the evaluation: a crash is no failure."""

    def reset(self, seed: int) -> None:
        """Start the episode of this seed, whatever happened before."""

    def observe(self) -> Observation:
        """`{"images": {camera: uint8[H, W, 3]}, "state": float32[S] | None, "task": str}`; called once a query."""

    def step(self, action: np.ndarray) -> bool:
        """Execute float32[D] in environment units; True when the episode is over."""

    def frame(self, size: int = 256) -> np.ndarray:
        """uint8[size, size, 3] for a video."""

    def result(self) -> dict[str, Any]:
        """The episode's numbers, `success` and `steps` among them."""

    def close(self) -> None:
        """Release the simulator."""


class Policy(Protocol):
    """What is evaluated: [`VLAPolicy`], or anything else that answers like it."""

    config: VLAConfig

    def predict_action_chunk(self, observations: list[Observation]) -> np.ndarray:
        """float32[B, chunk_size, action_dim] in environment units."""


@dataclass
class EpisodeResult:
    """One finished episode.

    Attributes:
        seed (`int`), task (`str`): which one.
        result (`dict`): the environment's numbers.
        model_calls (`int`): chunks predicted for this episode.
        model_seconds (`float`): its share of the model's wall-clock time; a batched call is divided evenly.
        environment_seconds (`float`): wall-clock time in its environment: reset, physics, rendering.
        frames (`list[np.ndarray]`): uint8[256, 256, 3], the start and one after each step; empty if not recorded.
    """

    seed: int
    task: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    model_calls: int = 0
    model_seconds: float = 0.0
    environment_seconds: float = 0.0
    frames: list[np.ndarray] = field(default_factory=list)


class _Slot:
    """One environment, the episode in it, and what that episode still remembers of earlier chunks."""

    def __init__(self, env: Environment, config: VLAConfig, ensemble_decay: float | None):
        self.env = env
        self.config = config
        self.ensembler = None
        if config.ensemble_size > 1:
            self.ensembler = TemporalEnsembler(config.chunk_size, config.ensemble_size, ensemble_decay)

    def start(self, seed: int, record: bool) -> None:
        self.episode = EpisodeResult(seed)
        self.record = record
        if self.ensembler is not None:
            self.ensembler.reset()
        with self._timed():
            self.env.reset(seed)
            self._film()

    def observe(self) -> Observation:
        with self._timed():
            observation = self.env.observe()
        self.episode.task = observation["task"]
        return observation

    def execute(self, chunk: np.ndarray) -> bool:
        """Act until the next chunk is needed; True if the episode ended."""
        if self.ensembler is not None:
            actions = self.ensembler.update(chunk)[None]
        else:
            actions = chunk[: self.config.n_action_steps]
        with self._timed():
            for action in self.config.executable(actions):
                done = self.env.step(action)
                self._film()
                if done:
                    self.episode.result = self.env.result()
                    return True
        return False

    def _film(self) -> None:
        if self.record:
            self.episode.frames.append(self.env.frame())

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.episode.environment_seconds += time.perf_counter() - began


def rollout(
    policy: Policy,
    envs: Sequence[Environment],
    seeds: Sequence[int],
    record: Collection[int] = (),
    ensemble_decay: float | None = None,
    progress: bool = True,
) -> Iterator[EpisodeResult]:
    """Run one episode a seed; give each result the moment it is known, in order of finishing.

    An episode depends on its seed and the policy alone: on `len(envs)` only as far as a batched matrix product rounds
    differently. How chunks are executed (`n_action_steps`, `ensemble_size`) is read from `policy.config`.

    Args:
        policy ([`Policy`]):
            Called once a round with the observations of all unfinished episodes.
        envs (`Sequence[Environment]`):
            As many as may run side by side. They stay open: closing them is up to the caller.
        seeds (`Sequence[int]`):
            The episodes, in the order of starting.
        record (`Collection[int]`, *optional*, defaults to `()`):
            Seeds whose frames are kept in memory (59 MB for 300 steps) and given with the result.
        ensemble_decay (`float`, *optional*):
            See [`TemporalEnsembler`].
        progress (`bool`, *optional*, defaults to `True`):
            Show a progress bar with the success rate so far.

    Raises:
        `ValueError`: at once, for an `ensemble_decay` that would do nothing, or if there is no environment.
    """
    if seeds and not envs:
        raise ValueError("no environment to run the episodes in")
    check_decay(policy.config.ensemble_size, ensemble_decay)
    slots = [_Slot(env, policy.config, ensemble_decay) for env in envs]
    return _rounds(policy, slots, deque(seeds), record, progress)


def _rounds(
    policy: Policy, idle: list[_Slot], pending: deque[int], record: Collection[int], progress: bool
) -> Iterator[EpisodeResult]:
    running: list[_Slot] = []
    rounds = successes = finished = 0
    with tqdm(total=len(pending), unit="episode", disable=not progress) as bar:
        while True:
            while idle and pending:
                seed = pending.popleft()
                running.append(idle.pop())
                running[-1].start(seed, seed in record)
            if not running:
                return

            observations = [slot.observe() for slot in running]
            began = time.perf_counter()
            chunks = policy.predict_action_chunk(observations)
            share = (time.perf_counter() - began) / len(running)

            still_running = []
            for slot, chunk in zip(running, chunks, strict=True):
                slot.episode.model_calls += 1
                slot.episode.model_seconds += share
                if not slot.execute(chunk):
                    still_running.append(slot)
                    continue
                idle.append(slot)
                finished += 1
                successes += bool(slot.episode.result["success"])
                bar.update()
                yield slot.episode
            running = still_running
            rounds += 1
            # Failures end together, at the time limit: until then only the rounds show that something moves.
            bar.set_postfix_str(f"success {successes}/{finished}, {len(running)} running, round {rounds}")
