"""The driver of every simulator's evaluation: one order of calls from a policy to results.json.

Choose the policy → check that it fits the simulator → for each run: claim its folder, load the policy if an episode is
missing, build environments, run, film and log the missing episodes, aggregate. [`evaluate`] is that order. A script
says what its simulator differs in, as a [`Simulation`], and prints the results.
"""

import json
import os
import sys
import uuid
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed

from vla0_trl.command_line import user_errors
from vla0_trl.config import VLAConfig
from vla0_trl.evaluation import episode_log
from vla0_trl.evaluation.arguments import EvaluationArguments
from vla0_trl.evaluation.env_runner import Environment, EnvRunner, EpisodeCrash, Seed, local_envs
from vla0_trl.evaluation.episode_log import RESULTS, EpisodeLog, WriteError
from vla0_trl.evaluation.metrics import aggregate
from vla0_trl.evaluation.policy_source import PolicyError, PolicySource, checkpoint_policy
from vla0_trl.evaluation.rollout import EpisodeResult, Policy, rollout
from vla0_trl.manifest import read_json
from vla0_trl.run_folder import FolderError
from vla0_trl.stopping import Stopped, raising_stopped

NOT_ALL = "not all episodes are there: other processes go on, or run this again\n"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One output folder, and the protocol and the environments of its episodes."""

    folder: Path
    protocol: dict[str, Any]
    make_env: Callable[[], Environment]


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What an evaluation differs in from simulator to simulator.

    Attributes:
        config ([`VLAConfig`]): the policy's, as it acts here.
        seeds (`Sequence[Seed]`): the episodes of each run; filmed (`Collection[Seed]`): some of them, at `fps`.
        runs (`Sequence[Run]`): what is evaluated one after another, such as LIBERO clean and perturbed.
        packages (`tuple[str, ...]`): whose versions `results.json` names.
        environments (`Callable`): `make_env` and a number to a context manager of that many environments.
        group (`Callable`): see [`rollout`].
        more_results (`Callable`): what `results.json` has besides `aggregate`'s numbers, from all episodes' lines.
    """

    config: VLAConfig
    seeds: Sequence[Seed]
    filmed: Collection[Seed]
    fps: float
    runs: Sequence[Run]
    packages: tuple[str, ...]
    environments: Callable[
        [Callable[[], Environment], int], AbstractContextManager[Sequence[Environment | EnvRunner]]
    ] = local_envs
    group: Callable[[Seed], Hashable] = lambda seed: None
    more_results: Callable[[list[dict[str, Any]]], dict[str, Any]] = lambda rows: {}


def evaluate(
    args: EvaluationArguments,
    prepare: Callable[[VLAConfig], Simulation],
    policy_source: Callable[[EvaluationArguments], PolicySource] = checkpoint_policy,
) -> list[Path]:
    """Run the missing episodes of each run, and write its results.

    Args:
        prepare (`Callable`): the simulation, for the policy's config with the flags' execution; raises `ValueError`
            or `OSError` where they do not go together.

    Returns:
        `list[Path]`: the runs' folders, complete. A mistake, a signal or a missing episode ends the program with one
        line.
    """
    join_launch(args)
    with user_errors():
        source = policy_source(args)
        simulation = prepare(args.execution_of(source.config))

    policy, crashed, complete = None, [], True
    for run in simulation.runs:
        with user_errors():
            log = open_log(run, simulation, source, args)
        with log, stopping_well(log):
            missing = log.missing(simulation.seeds[args.rank :: args.num_processes])
            if missing:
                (log.folder / RESULTS).unlink(missing_ok=True)  # it exists only when nothing is missing
                with user_errors():
                    policy = policy or source.load(simulation.config)
                policy.reset()
                with simulation.environments(run.make_env, min(args.num_envs, len(missing))) as envs:
                    crashed += run_episodes(policy, log, envs, missing, simulation)
            complete &= finish(log, simulation, source)
    for episode in crashed:
        print(f"crashed twice, so without a result: {episode.seed}")
    if not complete:
        # launchers end the other processes when one fails
        leave(1 if crashed and args.num_processes == 1 else 0, NOT_ALL)
    return [run.folder for run in simulation.runs]


def join_launch(args: EvaluationArguments) -> None:
    """Set `rank`, `num_processes` and `launch` as `accelerate launch` tells them, and a GPU for each process."""
    try:
        args.rank, args.num_processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if args.num_processes > 1:
            args.store, _, _ = next(torch.distributed.rendezvous("env://"))
    except ValueError as error:
        leave(2, f"error: RANK and WORLD_SIZE are set, but {error}: start it with accelerate launch")
    if args.num_processes > 1:
        if args.rank == 0:
            args.store.set("launch", uuid.uuid4().hex[:8])
        args.launch = args.store.get("launch").decode()
    if args.device is None and torch.cuda.is_available():
        args.device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


def leave(status: int, message: str) -> NoReturn:
    """End the program with a line on stderr."""
    print(message, file=sys.stderr)
    sys.exit(status)


def simulator_version(*packages: str) -> str:
    """For the protocol: scores move with the simulator."""
    return ", ".join(f"{package} {version(package)}" for package in packages)


def open_log(run: Run, simulation: Simulation, source: PolicySource, args: EvaluationArguments) -> EpisodeLog:
    """This process's log of a run; see [`EpisodeLog`] for what it raises."""
    identity = {
        "checkpoint": source.checkpoint,
        "checkpoint_hash": source.checkpoint_hash,
        "protocol": run.protocol | execution_protocol(simulation.config) | source.protocol,
    }
    # A process without a share may come after the others have finished: it must not delete what they did.
    overwrite = args.overwrite and bool(simulation.seeds[args.rank :: args.num_processes])
    log = EpisodeLog(run.folder, identity, overwrite, args.launch, args.rank)
    if log.first and log.episodes and not source.identified:
        print(
            f"warning: {run.folder} has {len(log.episodes)} episodes already, and {source.checkpoint} does not say "
            "which model answers: if it is another one now, start again with --overwrite",
            file=sys.stderr,
        )
    if count := len(source.trained_on.intersection(simulation.seeds)):
        print(
            f"warning: {count} of {len(simulation.seeds)} episodes begin as ones that were trained on", file=sys.stderr
        )
    return log


def execution_protocol(config: VLAConfig) -> dict[str, Any]:
    """How chunks are executed, for a run's protocol."""
    always = {name: getattr(config, name) for name in ("n_action_steps", "ensemble_size", "ensemble_decay")}
    return always | {name: value for name in ("ensemble_weights", "temperature") if (value := getattr(config, name))}


def run_episodes(
    policy: Policy,
    log: EpisodeLog,
    envs: Sequence[Environment | EnvRunner],
    seeds: Sequence[Seed],
    simulation: Simulation,
) -> list[EpisodeResult]:
    """Run these episodes and write each as it ends; returns those whose simulator crashed twice: they have no line."""
    crashed = []
    filmed = simulation.filmed if simulation.filmed and episode_log.can_film() else ()
    for episode in rollout(policy, envs, seeds, filmed, group=simulation.group):
        if not episode.result:
            crashed.append(episode)
            continue
        if episode.frames:  # before the line: an episode that has one is never run again
            seed = episode.seed[-1] if isinstance(episode.seed, tuple) else episode.seed
            path = log.folder / episode_log.VIDEOS / episode_log.video_name({"seed": seed} | episode.result)
            episode_log.write_video(path, episode.frames, simulation.fps)
        log.append(episode, decoding=policy.decoding)
    return crashed


def finish(log: EpisodeLog, simulation: Simulation, source: PolicySource) -> bool:
    """Write results.json of exactly these episodes if all are there, whichever process ran them; whether they are."""
    log.episodes = episode_log.read_episodes(log.folder)
    if log.missing(simulation.seeds):
        return False
    asked = episode_log.seed_ranges(simulation.seeds)
    rows = episode_log.read_episodes(log.folder, asked)
    log.check(rows)
    episode_log.merge_shards(log.folder)
    # Both ways, where an evaluation went on after the decoder had failed its check; versions before did not note it.
    ways = sorted({row["decoding"] for row in rows if "decoding" in row})
    results = log.run | aggregate(rows) | simulation.more_results(rows)
    results |= {"decoding": " and ".join(ways) or "not recorded", "seeds": asked}
    if count := len(source.trained_on.intersection(simulation.seeds)):
        results["num_trained_on"] = count
    results = json.loads(json.dumps(results))
    there = read_json(log.folder / RESULTS) or {}
    if there | results != there:
        about = episode_log.provenance(source.device, simulation.packages)
        episode_log.write_json(log.folder / RESULTS, results | about)
    return True


@contextmanager
def stopping_well(log: EpisodeLog) -> Iterator[None]:
    """End the process with one line that says why an evaluation stopped, where its episodes are and how to go on."""
    where = f"episodes are in {log.folder}"
    try:
        with raising_stopped():
            yield
    except Stopped as stopped:
        leave(stopped.status, f"\nstopped: {len(log.episodes)} {where}; run it again to go on")
    except (WriteError, EpisodeCrash, FolderError, PolicyError) as error:
        leave(1, f"error: {error}; {len(log.episodes)} {where}")
