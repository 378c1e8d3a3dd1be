"""Evaluations of a tiny checkpoint in PushT, and what they left, without what differs from run to run."""

import json
from pathlib import Path

from support.backbones import TINY
from vla0_trl.actions import NormStats
from vla0_trl.config import VLAConfig
from vla0_trl.models.nano import NanoConfig, build_nano

TIMES = {"seconds", "model_seconds", "seconds_per_episode", "ms_per_chunk", "environment_seconds"}
RUN_BY = {"command", "git_commit"}


def save_checkpoint(folder: Path, seed: int, **changes) -> str:
    def stats(low: float, high: float, dim: int) -> NormStats:
        return NormStats([low] * dim, [high] * dim, [low] * dim, [high] * dim, [0.0] * dim, [1.0] * dim, 9)

    fields = {"action_dim": 2, "state_dim": 2, "chunk_size": 2, "image_size": 48, "num_bins": 99}
    fields |= {"use_state": True, "relative_actions": True} | changes
    config = VLAConfig(action_stats=stats(-60, 60, 2), state_stats=stats(0, 512, fields["state_dim"]), **fields)
    model, processor = build_nano(NanoConfig(**TINY), seed=seed)
    for part in (model, processor, config):
        part.save_pretrained(folder)
    return str(folder)


def flags_of(checkpoint: str, output_dir: Path) -> list[str]:
    flags = ["--model_name_or_path", checkpoint, "--output_dir", str(output_dir), "--max_steps", "6"]
    return [*flags, "--num_episodes", "4", "--num_envs", "4", "--num_videos", "0"]


def _read(text: str) -> dict:
    # of the same polygons, GEOS's intersection area differs in its last bit with the heap's layout: coverage does, too
    return json.loads(text, parse_float=lambda number: round(float(number), 9))


def rows_of(folder: Path) -> list[dict]:
    rows = [_read(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]
    return [without(row, TIMES) for row in sorted(rows, key=lambda row: row["seed"])]


def without(data: dict, keys: set[str]) -> dict:
    return {key: value for key, value in data.items() if key not in keys}


def results_of(folder: Path) -> dict:
    return without(_read((folder / "results.json").read_text()), TIMES | RUN_BY)
