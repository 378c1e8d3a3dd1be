"""Rollouts of a scripted policy in the real simulator."""

import pytest
from support.episodes import SEEDS, PushBlock

from vla0_trl.envs.pusht.env import PushTEnv
from vla0_trl.evaluation.env_runner import EnvRunner, EpisodeCrash
from vla0_trl.evaluation.rollout import rollout


def _run(policy, num_envs, max_steps=60, **options) -> dict:
    envs = [PushTEnv(state="full", max_episode_steps=max_steps) for _ in range(num_envs)]
    return {episode.seed: episode for episode in rollout(policy, envs, SEEDS, progress=False, **options)}


@pytest.mark.slow
@pytest.mark.parametrize("execution", [{"n_action_steps": 5}, {"ensemble_size": 4}])
def test_results_do_not_depend_on_the_number_of_environments(execution):
    alone, batched = (_run(PushBlock(**execution), num_envs) for num_envs in (1, 4))
    assert alone.keys() == batched.keys() == set(SEEDS)
    for seed in SEEDS:
        # approx: GEOS's intersection area, and with it coverage, varies in its last bit
        assert alone[seed].result == pytest.approx(batched[seed].result, abs=1e-9)
        assert alone[seed].model_calls == batched[seed].model_calls
    assert any(episode.result["max_coverage"] > 0 for episode in alone.values())


def test_the_model_is_asked_every_n_action_steps_and_with_a_full_batch():
    policy = PushBlock(n_action_steps=5)
    episodes = _run(policy, num_envs=4, max_steps=22)
    # 22 steps are 5 chunks; 4 episodes run first, the other 2 when these end
    assert [episode.model_calls for episode in episodes.values()] == [5] * 6
    assert [episode.result["steps"] for episode in episodes.values()] == [22] * 6
    assert policy.batch_sizes == [4] * 5 + [2] * 5


def test_the_progress_bar_ends_with_all_episodes(capsys):
    list(rollout(PushBlock(n_action_steps=5), [PushTEnv(state="full", max_episode_steps=8)], SEEDS[:1]))
    last = capsys.readouterr().err.rsplit("\r", 1)[-1]
    assert "| 1/1 [" in last and last.rstrip().endswith(", success 0/1]")


def test_a_finished_environment_takes_the_next_seed_at_once():
    class Uneven(PushTEnv):
        def reset(self, seed):
            super().reset(seed)
            self.max_episode_steps = 10 if seed % 2 else 30

    policy = PushBlock(n_action_steps=5)
    envs = [Uneven(state="full") for _ in range(2)]
    assert {e.seed: e.model_calls for e in rollout(policy, envs, SEEDS, progress=False)} == {
        seed: 2 if seed % 2 else 6 for seed in SEEDS
    }
    # 24 chunks; lock-step by episode would take 18 rounds
    assert sum(policy.batch_sizes) == 24
    assert len(policy.batch_sizes) < 18


def test_ensembling_asks_at_every_step_and_changes_the_actions():
    ensemble = PushBlock(ensemble_size=4)
    episodes = _run(ensemble, num_envs=2, max_steps=20)
    assert all(episode.model_calls == episode.result["steps"] for episode in episodes.values())
    newest_only = _run(PushBlock(n_action_steps=1), num_envs=2, max_steps=20)
    decayed = _run(PushBlock(ensemble_size=4, ensemble_decay=0.5), num_envs=2, max_steps=20)
    returns = [sum(e.result["return"] for e in run.values()) for run in (episodes, newest_only, decayed)]
    assert len(set(returns)) == 3


def test_only_the_asked_episodes_are_filmed_at_every_step():
    episodes = _run(PushBlock(n_action_steps=5), num_envs=4, max_steps=12, record={SEEDS[1], SEEDS[5]})
    assert [len(episodes[seed].frames) for seed in SEEDS] == [0, 13, 0, 0, 0, 13]
    assert episodes[SEEDS[1]].frames[0].shape == (256, 256, 3)


def test_times_and_tasks_are_recorded():
    episode = _run(PushBlock(n_action_steps=5), num_envs=3, max_steps=12)[SEEDS[0]]
    assert episode.task == "Push the T-shaped block onto the T-shaped target."
    assert 0 < episode.model_seconds < episode.environment_seconds


def test_the_gripper_is_executed_as_its_sign():
    executed = []

    class Recorder(PushTEnv):
        def step(self, action):
            executed.append(action)
            return super().step(action)

    policy = PushBlock(n_action_steps=8, gripper="sign")
    list(rollout(policy, [Recorder(state="full", max_episode_steps=8)], SEEDS[:1], progress=False))
    assert [action[1] for action in executed] == [1.0] * 8


def test_results_arrive_one_by_one():
    policy = PushBlock(n_action_steps=8)
    episodes = rollout(policy, [PushTEnv(state="full", max_episode_steps=8)], SEEDS, progress=False)
    assert next(episodes).seed == SEEDS[0]
    assert len(policy.batch_sizes) == 1


def test_a_retry_is_another_episode_to_the_policy_with_the_same_draws():
    class CrashingOnce(EnvRunner):
        crashed = False

        def execute(self, actions):
            super().execute(actions)
            if self.env.steps == 5 and not self.crashed:
                self.crashed, self._asked = True, self._crash

        def _crash(self):
            raise EpisodeCrash("physics exploded")

    class Listening(PushBlock):
        asked: list = []  # noqa: RUF012

        def predict_action_chunk(self, observations):
            self.asked += [(observation["episode"], observation["noise"]) for observation in observations]
            return super().predict_action_chunk(observations)

    policy, seed = Listening(n_action_steps=5), SEEDS[0]
    (episode,) = rollout(policy, [CrashingOnce(PushTEnv("full", 10))], [seed], progress=False)
    assert episode.crashes == ["physics exploded"]
    assert policy.asked == [((seed, attempt), seed) for attempt in (0, 0, 1, 1)]


def test_a_crash_in_the_simulator_is_an_error():
    class Crashing(PushTEnv):
        def step(self, action):
            if self.steps == 7:
                raise RuntimeError("physics exploded")
            return super().step(action)

    with pytest.raises(RuntimeError, match="physics exploded"):
        list(rollout(PushBlock(n_action_steps=5), [Crashing(state="full")], SEEDS, progress=False))
