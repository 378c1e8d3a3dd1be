"""LIBERO's part of an evaluation: its episodes, environments in worker processes, and results by suite and task."""

import time
from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np

from vla0_trl.config import VLAConfig
from vla0_trl.envs.libero import protocol
from vla0_trl.envs.libero.env import LiberoTasks
from vla0_trl.envs.libero.perturb import parse_perturbation
from vla0_trl.envs.libero.protocol import LiberoEpisode
from vla0_trl.envs.libero.setup import assets_fingerprint, check_mujoco, choose_renderer, find_assets
from vla0_trl.evaluation.arguments import LiberoArguments
from vla0_trl.evaluation.driver import Run, Simulation, simulator_version
from vla0_trl.evaluation.env_runner import EnvRunner
from vla0_trl.evaluation.metrics import aggregate_by, mean_rate, task_label
from vla0_trl.evaluation.rollout import rollout
from vla0_trl.evaluation.workers import worker_pool


def prepare(config: VLAConfig, args: LiberoArguments) -> Simulation:
    """The benchmark's episodes, in clean environments and in each of the perturbed ones that `args` ask for.

    `ValueError` if the policy can't act in LIBERO or a flag has a wrong value, `LiberoError` without assets.
    """
    unknown = [name for name in config.cameras if name not in protocol.CAMERAS]
    if unknown or config.action_dim != protocol.ACTION_DIM or config.state_dim not in (0, protocol.STATE_DIM):
        raise ValueError(
            f"{args.model_name_or_path} is not for LIBERO: it has cameras {config.cameras}, action_dim="
            f"{config.action_dim}, state_dim={config.state_dim}; the simulator gives {sorted(protocol.CAMERAS)}, "
            f"takes {protocol.ACTION_DIM} dimensions and has a state of {protocol.STATE_DIM}"
        )
    check_mujoco()
    assets = find_assets(args.assets_dir)
    shared = {
        "env": "LIBERO",
        "renderer": choose_renderer(),
        "simulator": simulator_version("hf-libero", "robosuite", "mujoco"),
        "assets": assets_fingerprint(assets),
        "max_steps": args.max_steps or protocol.MAX_STEPS,
        "settling_steps": protocol.SETTLING_STEPS,
        "image_size": args.render_size,
        "seed": protocol.SEED,
    }
    # only the cameras that the policy looks through are drawn
    env = {
        "cameras": tuple(config.cameras),
        "max_steps": args.max_steps,
        "assets_dir": str(assets),
        "render_size": args.render_size,
    }
    runs = [
        Run(
            folder=args.output_dir / ("" if name is None else f"perturbed/{name.replace(':', '_')}"),
            protocol=shared | {"perturbation": name},
            make_env=partial(LiberoTasks, **env, perturbation=name and parse_perturbation(name)),
        )
        for name in (None, *dict.fromkeys(args.perturb))
    ]
    episodes = protocol.select_episodes(args.suites, args.task_ids, args.num_episodes_per_task)
    return Simulation(
        config=config.replace(gripper="sign"),
        seeds=episodes,
        filmed={episode for episode in episodes if episode.seed < args.num_videos},
        fps=protocol.CONTROL_FREQUENCY,
        runs=runs,
        packages=protocol.PACKAGES,
        environments=worker_pool,
        group=lambda episode: (episode.suite, episode.task_id),  # within it, the environment stays
        more_results=suite_results,
    )


def suite_results(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What results.json says of LIBERO's suites and tasks."""
    suites = aggregate_by(itemgetter("suite"), rows)
    rate, interval = mean_rate([part for suite, part in suites.items() if suite != "libero_90"] or [*suites.values()])
    return {
        "average_success_rate": rate,
        "average_success_rate_interval": interval,
        "suites": suites,
        "tasks": aggregate_by(task_label, rows),
    }


class StandStill:
    """A policy that costs nothing, to see what environments cost; what it lacks of one is not asked for."""

    def __init__(self, config: VLAConfig):
        self.config = config

    def predict_action_chunk(self, observations: list[dict[str, Any]]) -> np.ndarray:
        return np.zeros((len(observations), self.config.chunk_size, self.config.action_dim), np.float32)


def benchmark_envs(simulation: Simulation, num_envs: int) -> tuple[float, float]:
    """Steps per second of one environment, and of `num_envs` in parallel, rendering where a policy needs images.

    Starting, building and a first episode, in which libraries compile, are not counted.
    """
    policy, episodes = StandStill(simulation.config), [simulation.seeds[0]] * num_envs
    with worker_pool(simulation.runs[0].make_env, num_envs) as workers:
        _steps_per_second(policy, workers, episodes)
        return _steps_per_second(policy, workers[:1], episodes), _steps_per_second(policy, workers, episodes)


def _steps_per_second(policy: StandStill, workers: Sequence[EnvRunner], episodes: list[LiberoEpisode]) -> float:
    began = time.perf_counter()
    results = list(rollout(policy, workers, episodes, progress=False))
    return sum(episode.result["steps"] for episode in results) / (time.perf_counter() - began)
