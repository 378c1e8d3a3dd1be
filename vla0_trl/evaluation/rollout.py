"""Many environments, one batched policy: from seeds to finished episodes.

The environments go in lock-step by *query*, not by time: all of them ask for a chunk together, in one call of the
model, then each executes its share of it: one after another in this process, or all at once in worker processes
(`vla0_trl.evaluation.workers`). One that finishes takes the next seed at once, so the batch stays full.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
from tqdm.auto import tqdm

from vla0_trl.config import VLAConfig
from vla0_trl.policy.execution import TemporalEnsembler

Observation = dict[str, Any]
Seed = Hashable  # what an environment's `reset` takes: a number, or a tuple that names task and initial state


class Environment(Protocol):
    """What a simulator must do to be evaluated. Anything it raises ends the evaluation: a crash is no failure."""

    def reset(self, seed: Seed) -> None:
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


class EpisodeCrash(RuntimeError):
    """The simulator broke down, or its process died, during an episode, which therefore has no result."""


@dataclass
class EpisodeResult:
    """One finished episode, or one that its simulator could not finish.

    Attributes:
        seed (`Seed`), task (`str`), result (`dict`): which one, and the environment's numbers.
        model_calls (`int`): chunks predicted for this episode.
        model_seconds (`float`): its share of the model's wall-clock time; a batched call is divided evenly.
        environment_seconds (`float`): wall-clock time spent waiting for its environment to reset, step and draw; for
            workers, which do so at the same time, its share of that.
        frames (`list[np.ndarray]`): uint8[256, 256, 3], the start and one after each step; empty if not recorded.
        crashes (`list[str]`): what went wrong in the simulator; with a `result`, a later attempt went well.
    """

    seed: Seed
    task: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    model_calls: int = 0
    model_seconds: float = 0.0
    environment_seconds: float = 0.0
    frames: list[np.ndarray] = field(default_factory=list)
    crashes: list[str] = field(default_factory=list)


@dataclass
class Turn:
    """What an environment gives back: the next observation, or the result of the finished episode."""

    observation: Observation | None = None
    result: dict[str, Any] | None = None
    frames: list[np.ndarray] = field(default_factory=list)


class Player:
    """Plays episodes in one environment: a turn is asked for, then waited for.

    This one works when it is waited for; [`vla0_trl.evaluation.workers.Worker`] at once, in another process.
    """

    concurrent = False

    def __init__(self, env: Environment):
        self.env = env

    def start(self, seed: Seed, record: bool) -> None:
        """Ask for the first turn of an episode."""
        self._turn = partial(self._start, seed, record)

    def execute(self, actions: np.ndarray) -> None:
        """Ask for the turn after these actions (n, action_dim)."""
        self._turn = partial(self._execute, actions)

    def wait(self) -> Turn:
        """The turn that was asked for; a worker raises `EpisodeCrash`, this one what its environment raises."""
        return self._turn()

    def restart(self) -> None:
        """Take a fresh environment after an `EpisodeCrash`, which only workers raise."""

    def _start(self, seed: Seed, record: bool) -> Turn:
        self.record = record
        self.env.reset(seed)
        return Turn(self.env.observe(), frames=self._film())

    def _execute(self, actions: np.ndarray) -> Turn:
        frames = []
        for action in actions:
            done = self.env.step(action)
            frames += self._film()
            if done:
                return Turn(result=self.env.result(), frames=frames)
        return Turn(self.env.observe(), frames=frames)

    def _film(self) -> list[np.ndarray]:
        return [self.env.frame()] if self.record else []


class _Slot:
    """A player, the episode that it plays, and what that episode still remembers of earlier chunks."""

    def __init__(self, player: Player, config: VLAConfig, ensemble_decay: float | None):
        self.player, self.config = player, config
        self.group: Hashable = None
        self.ensembler = TemporalEnsembler(config.chunk_size, config.ensemble_size, ensemble_decay)

    def start(self, seed: Seed, record: bool, crashes: Sequence[str] = ()) -> None:
        self.episode = EpisodeResult(seed, crashes=list(crashes))
        self.record = record
        self.ensembler.reset()
        self.player.start(seed, record)

    def execute(self, chunk: np.ndarray) -> None:
        """Act until the next chunk is needed."""
        actions = chunk[: self.config.n_action_steps]
        if self.config.ensemble_size > 1:
            actions = self.ensembler.update(chunk)[None]
        self.player.execute(self.config.executable(actions))

    def wait(self) -> bool:
        """Take the turn that was asked for; whether the episode goes on."""
        try:
            turn = self.player.wait()
        except EpisodeCrash as crash:
            return self._recover(str(crash))
        self.episode.frames += turn.frames
        if turn.result is not None:
            self.episode.result = turn.result
            return False
        # Named, so that the policy drafts from this episode's last chunk, wherever it stands in the batch.
        self.observation = {**turn.observation, "episode": self.episode.seed}
        self.episode.task = turn.observation["task"]
        return True

    def _recover(self, crash: str) -> bool:
        """The episode once more from its start, in a fresh environment; after its second crash it has ended."""
        seed, crashes = self.episode.seed, [*self.episode.crashes, crash]
        tqdm.write(f"episode {seed} crashed{' again' if len(crashes) > 1 else ', trying once more'}: {crash}")
        self.player.restart()
        if len(crashes) > 1:
            self.episode = EpisodeResult(seed, crashes=crashes)
            return False
        self.start(seed, self.record, crashes)
        return self.wait()


def rollout(
    policy: Policy,
    envs: Sequence[Environment | Player],
    seeds: Sequence[Seed],
    record: Collection[Seed] = (),
    ensemble_decay: float | None = None,
    progress: bool = True,
    group: Callable[[Seed], Hashable] = lambda seed: None,
) -> Iterator[EpisodeResult]:
    """Run one episode a seed; give each result the moment it is known, in order of finishing.

    An episode depends on its seed and the policy alone: on `len(envs)` only as far as a batched matrix product rounds
    differently. How chunks are executed (`n_action_steps`, `ensemble_size`) is read from `policy.config`.

    Args:
        policy ([`Policy`]):
            Called once a round with the observations of all unfinished episodes.
        envs (`Sequence[Environment | Player]`):
            As many as may run side by side. They stay open: closing them is up to the caller.
        seeds (`Sequence[Seed]`):
            The episodes, in the order of starting.
        record (`Collection[Seed]`, *optional*, defaults to `()`):
            Seeds whose frames are kept in memory (59 MB for 300 steps) and given with the result.
        ensemble_decay (`float`, *optional*): see [`TemporalEnsembler`].
        progress (`bool`, *optional*, defaults to `True`): show a progress bar with the success rate so far.
        group (`Callable`, *optional*):
            What a seed has in common with others that are cheap to run after it in the same environment: its task.

    Raises:
        `ValueError`: at once, for an `ensemble_decay` that would do nothing, or if there is no environment.
        `EpisodeCrash`: an episode crashed twice before any has finished; later, such a one comes without a `result`.
    """
    if seeds and not envs:
        raise ValueError("no environment to run the episodes in")
    players = (env if isinstance(env, Player) else Player(env) for env in envs)
    slots = [_Slot(player, policy.config, ensemble_decay) for player in players]
    return _rounds(policy, slots, _Queue(seeds, group), record, progress)


class _Queue:
    """Seeds that wait, by group."""

    def __init__(self, seeds: Sequence[Seed], group: Callable[[Seed], Hashable]):
        self.waiting: dict[Hashable, deque[Seed]] = {}
        for seed in seeds:
            self.waiting.setdefault(group(seed), deque()).append(seed)
        self.untouched = deque(self.waiting)

    def __len__(self) -> int:
        return sum(map(len, self.waiting.values()))

    def take(self, slot: _Slot) -> Seed:
        """A seed of the slot's own group, else of one that nobody has begun, else of the one with most to do."""
        if not self.waiting.get(slot.group):
            longest = max(self.waiting, key=lambda group: len(self.waiting[group]))
            slot.group = self.untouched.popleft() if self.untouched else longest
        elif slot.group in self.untouched:
            self.untouched.remove(slot.group)
        return self.waiting[slot.group].popleft()


def _rounds(
    policy: Policy, slots: list[_Slot], queue: _Queue, record: Collection[Seed], progress: bool
) -> Iterator[EpisodeResult]:
    waiting: list[_Slot] = []

    def begin(slot: _Slot) -> None:
        seed = queue.take(slot)
        slot.start(seed, seed in record)
        waiting.append(slot)

    for slot in slots[: len(queue)]:
        begin(slot)
    rounds = successes = finished = 0
    with tqdm(total=len(queue) + len(waiting), unit="episode", disable=not progress) as bar:
        while waiting:
            ready = []
            # it grows meanwhile: a slot whose episode ends waits for the next one at once
            for position, slot in enumerate(waiting):
                began = time.perf_counter()
                goes_on = slot.wait()
                working = waiting[position:] if slot.player.concurrent else [slot]
                seconds = time.perf_counter() - began
                for other in working:
                    other.episode.environment_seconds += seconds / len(working)
                if goes_on:
                    ready.append(slot)
                    continue
                episode = slot.episode
                if episode.result:
                    finished += 1
                    successes += bool(episode.result["success"])
                elif not finished:
                    raise EpisodeCrash(f"episode {episode.seed} crashed twice: {episode.crashes[-1]}")
                if len(queue):
                    begin(slot)
                bar.update()
                yield episode
            waiting.clear()
            if not ready:
                return

            began = time.perf_counter()
            chunks = policy.predict_action_chunk([slot.observation for slot in ready])
            share = (time.perf_counter() - began) / len(ready)
            for slot, chunk in zip(ready, chunks, strict=True):
                slot.episode.model_calls += 1
                slot.episode.model_seconds += share
                slot.execute(chunk)
            waiting += ready
            rounds += 1
            # Failures end together, at the time limit: until then only the rounds show that something moves.
            bar.set_postfix_str(f"success {successes}/{finished}, {len(ready)} running, round {rounds}")
