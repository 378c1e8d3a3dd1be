"""Environments in processes of their own: same episodes as here, and crashes that are no failures."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from support.episodes import SEEDS, PushBlock

from vla0_trl.envs.pusht.env import PushTEnv
from vla0_trl.evaluation.rollout import EpisodeCrash, rollout
from vla0_trl.evaluation.workers import worker_pool

pytestmark = pytest.mark.slow  # a process per worker

MAKE_ENV = partial(PushTEnv, state="full", max_episode_steps=20)


class Fragile(PushTEnv):
    """Breaks down at step 7 of an odd seed; once, if `scars` names a folder to remember it in."""

    def __init__(self, scars: str | None = None, how: str = "raise"):
        super().__init__("full", 20)
        self.scars, self.how = scars, how

    def reset(self, seed):
        super().reset(seed)
        self.seed = seed

    def step(self, action):
        if self.seed % 2 and self.steps == 7 and self._first_time():
            if self.how == "exit":
                os._exit(3)
            raise RuntimeError("physics exploded")
        return super().step(action)

    def _first_time(self) -> bool:
        if self.scars is None:
            return True
        try:
            os.mkdir(f"{self.scars}/{self.seed}")
        except FileExistsError:
            return False
        return True


def _play(make_env, num_workers=2, seeds=SEEDS, **options) -> dict:
    with worker_pool(make_env, num_workers) as workers:
        episodes = rollout(PushBlock(n_action_steps=5), workers, seeds, progress=False, **options)
        return {episode.seed: episode for episode in episodes}


def test_workers_play_the_same_episodes_as_this_process():
    away = _play(MAKE_ENV, record={SEEDS[1]})
    env = [MAKE_ENV()]
    here = {e.seed: e for e in rollout(PushBlock(n_action_steps=5), env, SEEDS, {SEEDS[1]}, progress=False)}
    assert away.keys() == here.keys()
    for seed in SEEDS:
        assert away[seed].result == pytest.approx(here[seed].result, abs=1e-9)
        assert away[seed].task == here[seed].task
    assert len(away[SEEDS[1]].frames) == 21
    # from the second on: the first shows the last action of whatever episode was before
    pairs = zip(away[SEEDS[1]].frames[1:], here[SEEDS[1]].frames[1:], strict=True)
    assert all((frame == other).all() for frame, other in pairs)


@pytest.mark.parametrize(("how", "message"), [("raise", "physics exploded"), ("exit", r"died \(exit status 3\)")])
def test_a_crash_is_tried_once_more_in_a_fresh_process(tmp_path, how, message):
    episodes = _play(partial(Fragile, str(tmp_path), how))
    reference = _play(MAKE_ENV)
    for seed, episode in episodes.items():
        assert episode.result == pytest.approx(reference[seed].result, abs=1e-9)
        assert episode.model_calls == reference[seed].model_calls  # nothing is left of the first attempt
        assert len(episode.crashes) == seed % 2
        assert not seed % 2 or message.replace("\\", "") in episode.crashes[0]


def test_an_episode_that_crashes_twice_has_no_result_and_the_others_go_on():
    episodes = _play(Fragile, num_workers=1)
    assert list(episodes) == SEEDS
    for seed, episode in episodes.items():
        assert bool(episode.result) == (seed % 2 == 0)
        assert len(episode.crashes) == 2 * (seed % 2)


def test_two_crashes_before_anything_ever_worked_are_an_error():
    with pytest.raises(EpisodeCrash, match="100001 crashed twice: RuntimeError: physics exploded"):
        _play(Fragile, num_workers=1, seeds=SEEDS[1::2])


def test_a_killed_worker_is_replaced():
    class Killer(PushBlock):
        def predict_action_chunk(self, observations):
            if len(self.batch_sizes) == 1:
                os.kill(workers[0].pid, signal.SIGKILL)
            return super().predict_action_chunk(observations)

    with worker_pool(MAKE_ENV, 2) as workers:
        victim = workers[0].pid
        episodes = list(rollout(Killer(n_action_steps=5), workers, SEEDS, progress=False))
        assert workers[0].pid != victim
    assert sorted(episode.seed for episode in episodes) == SEEDS
    assert [crash for e in episodes for crash in e.crashes] == ["the simulator's process died (killed by SIGKILL)"]
    assert all(episode.result["steps"] == 20 for episode in episodes)


def test_workers_end_with_their_pool():
    with pytest.raises(KeyboardInterrupt), worker_pool(MAKE_ENV, 2) as workers:
        pids = [worker.pid for worker in workers]
        raise KeyboardInterrupt
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_workers_end_when_their_owner_is_killed():
    code = """
import time
from functools import partial
from vla0_trl.envs.pusht.env import PushTEnv
from vla0_trl.evaluation.workers import Worker
worker = Worker(partial(PushTEnv, state="full"))
print(worker.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as owner:
        pid = int(owner.stdout.readline())
        owner.kill()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():  # empty: a zombie
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_an_environment_keeps_its_group_while_there_is_something_to_do():
    order = []

    class Watched(PushTEnv):
        def reset(self, seed):
            order.append((id(self), seed))
            super().reset(seed[1])

    seeds = [(task, 100000 + i) for task in "ab" for i in range(3)]
    envs = [Watched("full", 10) for _ in range(2)]
    policy = PushBlock(n_action_steps=5)
    list(rollout(policy, envs, seeds, progress=False, group=lambda seed: seed[0]))
    for env in envs:
        assert len({seed[0] for owner, seed in order if owner == id(env)}) == 1
    assert sorted(seed for _, seed in order) == seeds
    np.testing.assert_array_equal(policy.batch_sizes, [2] * 6)
