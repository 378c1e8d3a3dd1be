"""What all eval/eval_*.py of simulators share: processes, how chunks are executed, running what is missing."""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed

from vla0_trl.config import VLAConfig
from vla0_trl.evaluation.arguments import EvaluationArguments
from vla0_trl.evaluation.env_runner import Environment, EnvRunner, EpisodeCrash, Seed
from vla0_trl.evaluation.episode_log import (
    RESULTS,
    VIDEOS,
    EpisodeLog,
    WriteError,
    merge_shards,
    provenance,
    read_episodes,
    seed_ranges,
    video_name,
    write_json,
    write_video,
)
from vla0_trl.evaluation.metrics import aggregate
from vla0_trl.evaluation.rollout import EpisodeResult, rollout
from vla0_trl.manifest import read_json, trained_on
from vla0_trl.models.fingerprint import checkpoint_hash
from vla0_trl.models.loading import checkpoint_folder
from vla0_trl.policy.policy import VLAPolicy
from vla0_trl.run_folder import FolderError
from vla0_trl.stopping import Stopped, raising_stopped

NOT_ALL = "not all episodes are there: other processes go on, or run this again\n"


def join_launch(args: EvaluationArguments) -> None:
    """Set `rank`, `num_processes` and `launch` as `accelerate launch` tells them, and a GPU for each process."""
    args.rank, args.num_processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.num_processes > 1:
        try:
            args.store, _, _ = next(torch.distributed.rendezvous("env://"))
        except ValueError as error:
            leave(2, f"error: RANK and WORLD_SIZE are set, but {error}: start it with accelerate launch")
        if args.rank == 0:
            args.store.set("launch", uuid.uuid4().hex[:8])
        args.launch = args.store.get("launch").decode()
    if args.device is None and torch.cuda.is_available():
        args.device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


def leave(status: int, message: str) -> NoReturn:
    """End the program with a line on stderr."""
    print(message, file=sys.stderr)
    sys.exit(status)


def execution_config(config: VLAConfig, args: EvaluationArguments) -> VLAConfig:
    """The checkpoint's config with the execution that the flags ask for; `ValueError` if there is none such.

    Steps of a chunk and ensembling exclude each other: asking for one replaces the checkpoint's other.
    """
    names = ("n_action_steps", "ensemble_size", "ensemble_decay", "ensemble_weights")
    changes = {name: vars(args)[name] for name in names if vars(args)[name] is not None}
    if "n_action_steps" in changes:
        changes.setdefault("ensemble_size", 1)
    elif changes.get("ensemble_size", 1) > 1:
        changes["n_action_steps"] = None
    return config.replace(**changes)


def simulator_version(*packages: str) -> str:
    """For the protocol: scores move with the simulator."""
    return ", ".join(f"{package} {version(package)}" for package in packages)


def execution_protocol(config: VLAConfig, args: EvaluationArguments, dtype: str) -> dict[str, Any]:
    """The part of a run's protocol that is the same for all simulators."""
    return {
        "n_action_steps": config.n_action_steps,
        "ensemble_size": config.ensemble_size,
        "ensemble_decay": config.ensemble_decay,
        **({"ensemble_weights": config.ensemble_weights} if config.ensemble_weights else {}),
        "dtype": dtype.removeprefix("torch."),
        **({"load_in_4bit": True} if args.load_in_4bit else {}),
    }


def run_identity(args: EvaluationArguments, checkpoint: Path, protocol: dict[str, Any]) -> dict[str, Any]:
    """What [`EpisodeLog`] knows a run by."""
    return {
        "checkpoint": args.model_name_or_path,
        "checkpoint_hash": checkpoint_hash(checkpoint),
        "protocol": protocol,
    }


def open_log(folder: Path, run: dict[str, Any], seeds: Sequence[Seed], args: EvaluationArguments) -> EpisodeLog:
    """This process's log of a run; see [`EpisodeLog`] for what it raises."""
    # A process without a share may come after the others have finished: it must not delete what they did.
    overwrite = args.overwrite and bool(seeds[args.rank :: args.num_processes])
    log = EpisodeLog(folder, run, overwrite, args.launch, args.rank)
    if count := num_trained_on(checkpoint_folder(args.model_name_or_path), seeds):
        print(f"warning: {count} of {len(seeds)} episodes begin as ones that were trained on", file=sys.stderr)
    return log


def num_trained_on(checkpoint: Path, seeds: Sequence[Seed]) -> int:
    """How many of these episodes have a seed that the checkpoint's training data was recorded on."""
    seen = {tuple(seed) if isinstance(seed, list) else seed for seed in trained_on(checkpoint).get("seeds", ())}
    return sum(seed in seen for seed in seeds)


def missing_share(log: EpisodeLog, seeds: Sequence[Seed], args: EvaluationArguments) -> list[Seed]:
    """The episodes that this process has to run; results.json, which exists when nothing is missing, goes."""
    missing = log.missing(seeds[args.rank :: args.num_processes])
    if missing:
        (log.folder / RESULTS).unlink(missing_ok=True)
    return missing


def run_episodes(
    policy: VLAPolicy,
    log: EpisodeLog,
    envs: Sequence[Environment | EnvRunner],
    seeds: Sequence[Seed],
    filmed: Collection[Seed],
    fps: float,
    group: Callable[[Seed], Hashable] = lambda seed: None,
) -> list[EpisodeResult]:
    """Run these episodes and write each as it ends; returns those whose simulator crashed twice: they have no line."""
    crashed = []
    for episode in rollout(policy, envs, seeds, filmed, group=group):
        if not episode.result:
            crashed.append(episode)
            continue
        if episode.frames:  # before the line: an episode that has one is never run again
            seed = episode.seed[-1] if isinstance(episode.seed, tuple) else episode.seed
            write_video(log.folder / VIDEOS / video_name({"seed": seed} | episode.result), episode.frames, fps)
        log.append(episode, decoding=policy.decoding)
    return crashed


def finish(
    log: EpisodeLog,
    seeds: Sequence[Seed],
    device: str,
    packages: tuple[str, ...],
    more: Callable[[list[dict[str, Any]]], dict[str, Any]] = lambda rows: {},
) -> bool:
    """Write results.json of exactly these episodes if all are there, whichever process ran them; whether they are.

    Args:
        more (`Callable`, *optional*): what to write beside `aggregate`'s numbers, from the rows of all episodes.

    Raises:
        FolderError: a line is of another run.
    """
    log.episodes = read_episodes(log.folder)
    if log.missing(seeds):
        return False
    asked = seed_ranges(seeds)
    rows = read_episodes(log.folder, asked)
    log.check(rows)
    merge_shards(log.folder)
    results = log.run | aggregate(rows) | more(rows) | ways_of_decoding(rows) | {"seeds": asked}
    if count := num_trained_on(checkpoint_folder(log.run["checkpoint"]), seeds):
        results["num_trained_on"] = count
    results = json.loads(json.dumps(results))
    there = read_json(log.folder / RESULTS) or {}
    if there | results != there:
        write_json(log.folder / RESULTS, results | provenance(device, packages))
    return True


def ways_of_decoding(rows: list[dict[str, Any]]) -> dict[str, str]:
    """`"fast"`, `"stock"`, or both where an evaluation went on after the decoder had failed its check."""
    ways = {row["decoding"] for row in rows if "decoding" in row}  # a version that did not note it may have begun
    return {"decoding": " and ".join(sorted(ways)) or "not recorded"}


@contextmanager
def stopping_well(log: EpisodeLog) -> Iterator[None]:
    """End the process with one line that says why an evaluation stopped, where its episodes are and how to go on."""
    where = f"episodes are in {log.folder}"
    try:
        with raising_stopped():
            yield
    except Stopped as stopped:
        leave(stopped.status, f"\nstopped: {len(log.episodes)} {where}; run it again to go on")
    except (WriteError, EpisodeCrash, FolderError) as error:
        leave(1, f"error: {error}; {len(log.episodes)} {where}")
