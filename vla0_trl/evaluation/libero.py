"""What eval/eval_libero.py runs: the protocol's episodes in worker processes, resumable, over several machines."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vla0_trl.config import VLAConfig
from vla0_trl.envs.libero import protocol
from vla0_trl.envs.libero.env import LiberoTasks, Perturbation
from vla0_trl.envs.libero.protocol import LiberoEpisode
from vla0_trl.envs.libero.setup import assets_fingerprint, choose_renderer
from vla0_trl.evaluation.arguments import LiberoArguments
from vla0_trl.evaluation.env_runner import EnvRunner
from vla0_trl.evaluation.episode_log import EpisodeLog
from vla0_trl.evaluation.metrics import aggregate_suites, aggregate_tasks, mean_rate
from vla0_trl.evaluation.rollout import EpisodeResult, rollout
from vla0_trl.evaluation.runner import execution_config, execution_protocol, run_episodes, simulator_version
from vla0_trl.evaluation.workers import worker_pool
from vla0_trl.policy.policy import VLAPolicy


def evaluation_config(config: VLAConfig, args: LiberoArguments) -> VLAConfig:
    """The checkpoint's config with the execution that the flags ask for; `ValueError` if it can't act in LIBERO."""
    unknown = [name for name in config.cameras if name not in protocol.CAMERAS]
    if unknown or config.action_dim != protocol.ACTION_DIM or config.state_dim not in (0, protocol.STATE_DIM):
        raise ValueError(
            f"{args.model_name_or_path} is not for LIBERO: it has cameras {config.cameras}, action_dim="
            f"{config.action_dim}, state_dim={config.state_dim}; the simulator gives {sorted(protocol.CAMERAS)}, "
            f"takes {protocol.ACTION_DIM} dimensions and has a state of {protocol.STATE_DIM}"
        )
    return execution_config(config, args).replace(gripper="sign")


def run_protocol(config: VLAConfig, args: LiberoArguments, perturbation: str | None, dtype: str) -> dict[str, Any]:
    """What makes a number comparable, and what a resumed evaluation must have in common."""
    return {
        "env": "LIBERO",
        "renderer": choose_renderer(),
        "simulator": simulator_version("hf-libero", "robosuite", "mujoco"),
        "assets": assets_fingerprint(Path(args.assets_dir)),
        "max_steps": args.max_steps or protocol.MAX_STEPS,
        "settling_steps": protocol.SETTLING_STEPS,
        "image_size": protocol.IMAGE_SIZE,
        "seed": protocol.SEED,
        "perturbation": perturbation,
        **execution_protocol(config, args, dtype),
    }


def environment_factory(
    config: VLAConfig, args: LiberoArguments, perturbation: Perturbation | None
) -> Callable[[], LiberoTasks]:
    """Builds a worker's environment; only the cameras that the policy looks through are drawn."""
    return partial(
        LiberoTasks,
        cameras=tuple(config.cameras),
        max_steps=args.max_steps,
        assets_dir=args.assets_dir,
        perturbation=perturbation,
    )


def task_of(episode: LiberoEpisode) -> tuple[str, int]:
    """What makes an episode cheap to run after another: the environment stays."""
    return episode.suite, episode.task_id


def run_missing(
    policy: VLAPolicy,
    log: EpisodeLog,
    missing: list[LiberoEpisode],
    make_env: Callable[[], LiberoTasks],
    args: LiberoArguments,
) -> list[EpisodeResult]:
    """Run and write these episodes; returns those that crashed twice."""
    filmed = {episode for episode in missing if episode.seed < args.num_videos}
    with worker_pool(make_env, min(args.num_envs, len(missing))) as workers:
        fps = protocol.CONTROL_FREQUENCY
        return run_episodes(policy, log, workers, missing, filmed, fps, task_of)


def suite_results(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What results.json says of LIBERO's suites and tasks."""
    suites = aggregate_suites(rows)
    rate, interval = mean_rate([part for suite, part in suites.items() if suite != "libero_90"] or [*suites.values()])
    return {
        "average_success_rate": rate,
        "average_success_rate_interval": interval,
        "suites": suites,
        "tasks": aggregate_tasks(rows),
    }


class StandStill:
    """A policy that costs nothing, to see what environments cost."""

    def __init__(self, config: VLAConfig):
        self.config = config

    def predict_action_chunk(self, observations: list[dict[str, Any]]) -> np.ndarray:
        return np.zeros((len(observations), self.config.chunk_size, self.config.action_dim), np.float32)


def benchmark_envs(
    make_env: Callable[[], LiberoTasks], config: VLAConfig, episode: LiberoEpisode, num_envs: int
) -> tuple[float, float]:
    """Steps per second of one environment, and of `num_envs` in parallel, rendering where a policy needs images.

    Starting, building and a first episode, in which libraries compile, are not counted.
    """
    policy = StandStill(config)
    with worker_pool(make_env, num_envs) as workers:
        _steps_per_second(policy, workers, [episode] * num_envs)
        return (
            _steps_per_second(policy, workers[:1], [episode] * num_envs),
            _steps_per_second(policy, workers, [episode] * num_envs),
        )


def _steps_per_second(policy: StandStill, workers: Sequence[EnvRunner], episodes: list[LiberoEpisode]) -> float:
    began = time.perf_counter()
    results = list(rollout(policy, workers, episodes, progress=False))
    return sum(episode.result["steps"] for episode in results) / (time.perf_counter() - began)
