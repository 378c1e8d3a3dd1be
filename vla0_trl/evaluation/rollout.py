"""Many environments, one batched policy: from seeds to finished episodes.

The environments go in lock-step by *query*, not by time: all of them ask for a chunk together, in one call of the
model, then each executes its share of it: one after another in this process, or all at once in worker processes
(`vla0_trl.evaluation.workers`). One that finishes takes the next seed at once, so the batch stays full.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from tqdm.auto import tqdm

from vla0_trl.config import Observation, VLAConfig
from vla0_trl.evaluation.env_runner import Environment, EnvRunner, EpisodeCrash, Seed
from vla0_trl.policy.execution import ChunkExecutor


class Policy(Protocol):
    """What is evaluated: [`VLAPolicy`], or anything else that answers like it."""

    config: VLAConfig
    decoding: str  # how its answers come about, noted in each episode's line

    def predict_action_chunk(self, observations: list[Observation]) -> np.ndarray:
        """float32[B, chunk_size, action_dim] in environment units."""

    def reset(self) -> None:
        """Forget all earlier observations: a run begins. Episodes are told apart by an observation's `"episode"`."""


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


class EpisodeRunner:
    """One environment, the episode that runs in it, and the executor of that episode's chunks."""

    def __init__(self, env_runner: EnvRunner, config: VLAConfig):
        self.env_runner = env_runner
        self.group: Hashable = None
        self.executor = ChunkExecutor(config)

    def start(self, seed: Seed, record: bool, crashes: Sequence[str] = ()) -> None:
        self.episode = EpisodeResult(seed, crashes=list(crashes))
        self.record = record
        self.executor.reset()
        self.env_runner.start(seed, record)

    def execute(self, chunk: np.ndarray) -> None:
        """Act until the next chunk is needed."""
        self.env_runner.execute(self.executor.actions(chunk))

    def wait(self) -> bool:
        """Take what was asked for; whether the episode goes on."""
        try:
            step = self.env_runner.wait()
        except EpisodeCrash as crash:
            return self._recover(str(crash))
        self.episode.frames += step.frames
        if step.result is not None:
            self.episode.result = step.result
            return False
        # Named, so that the policy remembers this attempt wherever it stands in the batch; draws are the seed's.
        names = {"episode": (self.episode.seed, len(self.episode.crashes)), "noise": self.episode.seed}
        self.observation = step.observation | names
        self.episode.task = step.observation["task"]
        return True

    def _recover(self, crash: str) -> bool:
        """The episode once more from its start, in a fresh environment; after its second crash it has ended."""
        seed, crashes = self.episode.seed, [*self.episode.crashes, crash]
        tqdm.write(f"episode {seed} crashed{' again' if len(crashes) > 1 else ', trying once more'}: {crash}")
        self.env_runner.restart()
        if len(crashes) > 1:
            self.episode = EpisodeResult(seed, crashes=crashes)
            return False
        self.start(seed, self.record, crashes)
        return self.wait()


def rollout(
    policy: Policy,
    envs: Sequence[Environment | EnvRunner],
    seeds: Sequence[Seed],
    record: Collection[Seed] = (),
    progress: bool = True,
    group: Callable[[Seed], Hashable] = lambda seed: None,
) -> Iterator[EpisodeResult]:
    """Run one episode per seed; yield each result as soon as its episode ends.

    An episode depends on its seed and the policy only. (`len(envs)` changes the rounding of batched matrix
    products.) How chunks are executed (`n_action_steps`, `ensemble_size`, …) is read from `policy.config`.

    Args:
        policy ([`Policy`]): called once per round with the observations of all unfinished episodes.
        envs (`Sequence`): as many as may run side by side. They stay open: closing them is up to the caller.
        record (`Collection[Seed]`, *optional*): whose frames are kept in memory (59 MB for 300 steps).
        group (`Callable`, *optional*): what a seed has in common with others that are cheap to run after it in the
            same environment: its task.

    `EpisodeCrash` if an episode crashed twice before any has finished; later, such a one comes without a `result`.
    """
    env_runners = (env if isinstance(env, EnvRunner) else EnvRunner(env) for env in envs)
    runners = [EpisodeRunner(env_runner, policy.config) for env_runner in env_runners]
    return _rounds(policy, runners, _Queue(seeds, group), record, progress)


class _Queue:
    """Seeds that wait, by group."""

    def __init__(self, seeds: Sequence[Seed], group: Callable[[Seed], Hashable]):
        self.waiting: dict[Hashable, deque[Seed]] = {}
        for seed in seeds:
            self.waiting.setdefault(group(seed), deque()).append(seed)
        self.untouched = deque(self.waiting)

    def __len__(self) -> int:
        return sum(map(len, self.waiting.values()))

    def take(self, runner: EpisodeRunner) -> Seed:
        """A seed of the runner's own group, else of one that has not begun, else of the one with most seeds left."""
        if not self.waiting.get(runner.group):
            longest = max(self.waiting, key=lambda group: len(self.waiting[group]))
            runner.group = self.untouched.popleft() if self.untouched else longest
        elif runner.group in self.untouched:
            self.untouched.remove(runner.group)
        return self.waiting[runner.group].popleft()


def _rounds(
    policy: Policy, runners: list[EpisodeRunner], queue: _Queue, record: Collection[Seed], progress: bool
) -> Iterator[EpisodeResult]:
    """Rounds of one batched query and the actions of each environment, until all seeds have run."""
    waiting: list[EpisodeRunner] = []

    def begin(runner: EpisodeRunner) -> None:
        seed = queue.take(runner)
        runner.start(seed, seed in record)
        waiting.append(runner)

    for runner in runners[: len(queue)]:
        begin(runner)
    rounds = successes = finished = 0
    with tqdm(total=len(queue) + len(waiting), unit="episode", disable=not progress) as bar:
        while waiting:
            ready = []
            # it grows meanwhile: a runner whose episode ends waits for the next one at once
            for position, runner in enumerate(waiting):
                if _wait_for_first(waiting[position:]):
                    ready.append(runner)
                    continue
                episode = runner.episode
                if episode.result:
                    finished += 1
                    successes += bool(episode.result["success"])
                elif not finished:
                    raise EpisodeCrash(f"episode {episode.seed} crashed twice: {episode.crashes[-1]}")
                if len(queue):
                    begin(runner)
                bar.set_postfix_str(f"success {successes}/{finished}", refresh=False)
                bar.update()
                yield episode
            waiting[:] = ready
            if not waiting:
                return
            _query(policy, waiting)
            rounds += 1
            # Failures end together, at the time limit: until then only the rounds show that something moves.
            bar.set_postfix_str(f"success {successes}/{finished}, {len(waiting)} running, round {rounds}")


def _wait_for_first(runners: list[EpisodeRunner]) -> bool:
    """Whether the first one's episode goes on; runners that work at the same time share the seconds."""
    began = time.perf_counter()
    goes_on = runners[0].wait()
    working = runners if runners[0].env_runner.concurrent else runners[:1]
    share = (time.perf_counter() - began) / len(working)
    for runner in working:
        runner.episode.environment_seconds += share
    return goes_on


def _query(policy: Policy, runners: list[EpisodeRunner]) -> None:
    """One chunk for each, in one call, and let them execute it."""
    began = time.perf_counter()
    chunks = policy.predict_action_chunk([runner.observation for runner in runners])
    share = (time.perf_counter() - began) / len(runners)
    for runner, chunk in zip(runners, chunks, strict=True):
        runner.episode.model_calls += 1
        runner.episode.model_seconds += share
        runner.execute(chunk)
