"""What a slow answer costs in PushT: success and jumps of a robot that (a) stops and thinks, (b) asks ahead, (c) asks
ahead and sends the actions that it executes meanwhile, for the chunk to begin with.

    python eval/bench_delay.py --model_name_or_path recipes/pusht/checkpoint --num_episodes 100 --json delay.json

Each reply comes --delays_ms after its observation, at the next step of 100 ms; meanwhile the simulator goes on.
`ChunkStream`, which robots use, decides what is executed. A jump is the distance of two targets that follow each
other, in pixels: at a seam, where a new chunk begins to be executed, and between other steps.
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
    seed: int = option(100_000, "of the first episode (default: %(default)s)")
    delays_ms: list[int] = option([0, 100, 300], "from an observation to its chunk (default: 0 100 300)")
    max_steps: int = option(MAX_EPISODE_STEPS, "time limit of an episode (default: %(default)s)")
    json: Path | None = option(None, "write the cells to this file, too")


def run_episode(policy: Any, env: PushTEnv, seed: int, delay: int, way: dict) -> dict:
    """One episode whose chunks come `delay` steps after their observations; its jumps in pixels, success and steps."""
    stream = ChunkStream(policy.config.chunk_size, policy.config.n_action_steps, **way)
    replies: deque[tuple[int, np.ndarray]] = deque()
    seams, others, held = [], [], 0
    env.reset(seed)
    target, new, done = env.observe()["state"][:2], False, False
    first = True
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
            held += 1  # a robot keeps its last target
        else:
            if not first:
                (seams if new else others).append(float(np.linalg.norm(action - target)))
            target, new, first = action, False, False
        done = env.step(target)
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
        "seam_jump_px": mean["seams"],
        "other_jump_px": mean["others"],
    }


def main() -> None:
    args = parse(Arguments, __doc__)
    from vla0_trl.policy.policy import VLAPolicy, resolve_device  # after parsing: it imports torch

    with user_errors():
        policy = VLAPolicy.from_pretrained(args.model_name_or_path, *resolve_device(args.device, args.dtype))
        check_speaks_pusht(policy.config, args.model_name_or_path)
        if policy.config.ensemble_size > 1:
            policy.config = policy.config.replace(ensemble_size=1)
    env = PushTEnv(state_mode(policy.config.state_dim), args.max_steps)
    cells = []
    print("| delay | way | success (95 %) | steps | held | jump at a seam, else (px) |\n|---|---|---|---|---|---|")
    for delay_ms in args.delays_ms:
        for way, options in WAYS.items():
            delay = math.ceil(delay_ms / 1000 * FPS)
            if not delay and way != next(iter(WAYS)):
                continue  # without delay all three ask when nothing is left, and execute at once
            policy.reset()
            seeds = tqdm(range(args.seed, args.seed + args.num_episodes), desc=f"{delay_ms} ms {way}", leave=False)
            found = cell([run_episode(policy, env, seed, delay, options) for seed in seeds], delay_ms, way)
            cells.append(found)
            low, high = (100 * bound for bound in found["interval"])
            print(
                f"| {delay_ms} ms | {way if delay else 'all'} | {100 * found['successes'] / found['n']:.0f} % "
                f"({low:.0f} to {high:.0f}, n = {found['n']}) | {found['steps']:.0f} | {found['held']:.0f} "
                f"| {found['seam_jump_px']:.1f}, {found['other_jump_px']:.1f} |",
                flush=True,
            )
    env.close()
    if args.json is not None:
        args.json.write_text(json.dumps({"checkpoint": str(args.model_name_or_path), "cells": cells}, indent=2) + "\n")


if __name__ == "__main__":
    main()
