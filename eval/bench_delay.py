"""What a slow answer costs: success and jumps of a robot that (a) stops and thinks, (b) asks ahead, (c) asks ahead and
sends the actions that it executes meanwhile, for the chunk to begin with.

    python eval/bench_delay.py --model_name_or_path recipes/pusht/checkpoint --num_episodes 100 --json delay.json
    python eval/bench_delay.py --model_name_or_path runs/libero --suite libero_object --task_id 0 --num_episodes 50

Each reply comes --delays_ms after its observation, at the next step (of 100 ms in PushT, 50 in LIBERO); meanwhile the
simulator goes on, and a robot without actions stands still. `ChunkStream`, which robots use, decides what is executed.
A jump is the distance of two actions that follow each other (PushT: targets, in pixels; LIBERO: commands of position
and rotation, each from -1 to 1): at a seam, where a new chunk begins to be executed, and between other steps.
"""

import json
import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vla0_trl.command_line import option, parse, user_errors
from vla0_trl.config import VLAConfig
from vla0_trl.envs.libero import protocol
from vla0_trl.envs.libero.env import LiberoEnv
from vla0_trl.envs.pusht.env import FPS, MAX_EPISODE_STEPS, PushTEnv, check_speaks_pusht, state_mode
from vla0_trl.evaluation.arguments import ModelArguments
from vla0_trl.evaluation.metrics import wilson_interval
from vla0_trl.serving.client import ChunkStream

WAYS = {
    "(a) stops and thinks": {"prefetch": False},
    "(b) asks ahead": {},
    "(c) asks ahead, with prefix": {"use_prefix": True},
}


@dataclass(kw_only=True)
class Arguments(ModelArguments):
    num_episodes: int = option(100, "of each cell, one per seed (default: %(default)s)")
    seed: int | None = option(None, "of the first episode (default: 100000; in LIBERO its initial state, 0)")
    delays_ms: list[int] = option([0, 100, 300], "from an observation to its chunk (default: 0 100 300)")
    max_steps: int | None = option(None, "time limit of an episode (default: the protocol's)")
    suite: str | None = option(None, "a task of LIBERO, in place of PushT")
    task_id: int = option(0, "of the suite (default: %(default)s)")
    render_size: int = option(
        protocol.IMAGE_SIZE, "of LIBERO's cameras, in pixels (default: %(default)s)", choices=protocol.RENDER_SIZES
    )
    assets_dir: str | None = option(None, "LIBERO's assets (default: $LIBERO_ASSETS, else the Hub's)")
    json: Path | None = option(None, "write the cells to this file, too")

    def __post_init__(self):
        if self.suite is not None:
            protocol.select_episodes(self.suite, str(self.task_id), 1)  # whether there is such a task


def open_simulator(args: Arguments, config: VLAConfig) -> tuple[PushTEnv | LiberoEnv, int]:
    """The environment, and its steps per second."""
    if args.suite is None:
        check_speaks_pusht(config, args.model_name_or_path)
        return PushTEnv(state_mode(config.state_dim), args.max_steps or MAX_EPISODE_STEPS), FPS
    places = {"assets_dir": args.assets_dir, "render_size": args.render_size}
    env = LiberoEnv(args.suite, args.task_id, config.cameras, args.max_steps, **places)
    return env, protocol.CONTROL_FREQUENCY


def standing_still(env: PushTEnv | LiberoEnv, last: np.ndarray | None) -> np.ndarray:
    """What a robot does whose actions have run out: PushT's targets stay; LIBERO's commands are of movement."""
    if isinstance(env, PushTEnv):
        return env.observe()["state"][:2] if last is None else last
    return np.append(np.zeros(protocol.ACTION_DIM - 1), -1.0 if last is None else last[-1])


def run_episode(policy: Any, env: PushTEnv | LiberoEnv, seed: int, delay: int, way: dict) -> dict:
    """One episode whose chunks come `delay` steps after their observations; its jumps, success and steps."""
    stream = ChunkStream(policy.config.chunk_size, policy.config.n_action_steps, **way)
    replies: deque[tuple[int, np.ndarray]] = deque()
    seams, others, held = [], [], 0
    env.reset(seed)
    last, new, done = None, False, False
    while not done:
        if stream.is_due(delay):
            observation = {**env.observe(), "episode": seed}
            chunk = policy.predict_action_chunk([observation], [stream.ask(delay)])[0]
            replies.append((env.steps + delay, policy.config.postprocess_actions(chunk)))
        if replies and replies[0][0] <= env.steps:
            stream.accept(replies.popleft()[1])
            new = True
        action = stream.next_action()
        if action is None:
            held += 1
            done = env.step(standing_still(env, last))
            continue
        if last is not None:
            moved = (action - last)[: 2 if isinstance(env, PushTEnv) else protocol.ACTION_DIM - 1]
            (seams if new else others).append(float(np.linalg.norm(moved)))
        last, new = action, False
        done = env.step(action)
    return {"success": env.success, "steps": env.steps, "held": held, "seams": seams, "others": others}


def cell(episodes: list[dict], delay_ms: int, way: str) -> dict:
    successes, n = sum(episode["success"] for episode in episodes), len(episodes)
    mean = {name: float(np.mean(np.concatenate([e[name] for e in episodes]))) for name in ("seams", "others")}
    return {
        "delay_ms": delay_ms,
        "way": way,
        "n": n,
        "successes": successes,
        "interval": wilson_interval(successes, n),
        "steps": float(np.mean([episode["steps"] for episode in episodes])),
        "held": float(np.mean([episode["held"] for episode in episodes])),
        "seam_jump": mean["seams"],
        "other_jump": mean["others"],
    }


def main() -> None:
    args = parse(Arguments, __doc__)
    from vla0_trl.policy.policy import VLAPolicy, resolve_device  # after parsing: it imports torch

    with user_errors():
        policy = VLAPolicy.from_pretrained(args.model_name_or_path, *resolve_device(args.device, args.dtype))
        if policy.config.ensemble_size > 1:
            policy.config = policy.config.replace(ensemble_size=1)
        env, fps = open_simulator(args, policy.config)
    if args.suite is not None:
        policy.config = policy.config.replace(gripper="sign")
    first = (100_000 if args.suite is None else 0) if args.seed is None else args.seed
    cells = []
    print("| delay | way | success (95 %) | steps | held | jump at a seam, else |\n|---|---|---|---|---|---|")
    for delay_ms in args.delays_ms:
        for way, options in WAYS.items():
            delay = math.ceil(delay_ms / 1000 * fps)
            if not delay and way != next(iter(WAYS)):
                continue  # without delay all three ask when nothing is left, and execute at once
            policy.reset()
            seeds = tqdm(range(first, first + args.num_episodes), desc=f"{delay_ms} ms {way}", leave=False)
            found = cell([run_episode(policy, env, seed, delay, options) for seed in seeds], delay_ms, way)
            cells.append(found)
            low, high = (100 * bound for bound in found["interval"])
            print(
                f"| {delay_ms} ms | {way if delay else 'all'} | {100 * found['successes'] / found['n']:.0f} % "
                f"({low:.0f} to {high:.0f}, n = {found['n']}) | {found['steps']:.0f} | {found['held']:.0f} "
                f"| {found['seam_jump']:.3g}, {found['other_jump']:.3g} |",
                flush=True,
            )
    env.close()
    if args.json is not None:
        args.json.write_text(json.dumps({"checkpoint": str(args.model_name_or_path), "cells": cells}, indent=2) + "\n")


if __name__ == "__main__":
    main()
