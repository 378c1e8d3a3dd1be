"""The chat dataset as recipes read it: its columns, loading it, and fitting its config to what a recipe asks for.

`conversion` writes such datasets.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, List, Value, load_dataset

from vla0_trl.actions import NormStats
from vla0_trl.config import VLAConfig
from vla0_trl.episodes import relative_windows

_MESSAGES = List({"role": Value("string"), "content": Value("string")})
# One row a frame. `prompt` and `completion` are TRL's own form of the text columns, for training with plain TRL;
# the raw columns are in environment units, so that bins and the like can change without reading episodes again.
FEATURES = Features(
    {
        "images": List(Image()),
        "task": Value("string"),
        "state": Value("string"),
        "action": Value("string"),
        "prompt": _MESSAGES,
        "completion": _MESSAGES,
        "episode_index": Value("int64"),
        "frame_index": Value("int64"),
        "raw_state": List(Value("float32")),
        "raw_action": List(Value("float32")),
    }
)
_STATS_BATCH = 10_000  # rows of the raw columns in memory at once: 2 MB at 10 × 5 values


def load_chat_dataset(
    name_or_path: str | Path, split: str = "train", revision: str | None = None
) -> tuple[Dataset, VLAConfig]:
    """A chat dataset and its config, from a local folder or the Hub.

    Raises:
        FileNotFoundError: no `vla_config.json` there.
        ValueError: columns of the contract are missing.
    """
    config = VLAConfig.from_pretrained(name_or_path, repo_type="dataset", revision=revision)
    dataset = load_dataset(str(name_or_path), split=split, revision=revision)
    missing = FEATURES.keys() - set(dataset.column_names)
    if missing:
        raise ValueError(
            f"{name_or_path}: columns {sorted(missing)} are missing, it has {sorted(dataset.column_names)}: convert "
            "the episodes again with data_prep/"
        )
    return dataset, config


def episode_indices(dataset: Dataset) -> np.ndarray:
    """int64 (rows,): which episode each row is of."""
    return np.asarray(dataset.with_format("numpy")["episode_index"][:])


def align_config(dataset: Dataset, dataset_config: VLAConfig, **overrides: Any) -> VLAConfig:
    """The config of a training run: the dataset's with a recipe's changes, with statistics that fit them.

    What is written as text may change freely, because the raw columns are still there: num_bins, normalization,
    use_state, relative_actions, use_system_prompt, a smaller chunk_size, a subset or another order of the cameras, and
    all that concerns only the images' way into the model or the execution. The statistics are taken again, in constant
    memory, when `relative_actions` or `chunk_size` changes.

    Args:
        dataset ([`~datasets.Dataset`]): all rows that the statistics should cover, with the raw columns.
        overrides: [`VLAConfig`] fields.

    Raises:
        ValueError: the stored data can't give what is asked for; names the field, both values and the fix.
    """
    for field in ("action_dim", "state_dim", "fps"):
        stored, asked = getattr(dataset_config, field), overrides.get(field, getattr(dataset_config, field))
        if asked != stored:
            raise ValueError(
                f"{field}={asked}, but the dataset was recorded with {field}={stored}: leave {field} out, or use "
                "another dataset"
            )
    chunk_size = overrides.get("chunk_size", dataset_config.chunk_size)
    if chunk_size > dataset_config.chunk_size:
        raise ValueError(
            f"chunk_size={chunk_size}, but the dataset stores chunks of {dataset_config.chunk_size}: convert it again "
            f"with --chunk_size {chunk_size}, or train with chunk_size={dataset_config.chunk_size}"
        )
    unknown = [camera for camera in overrides.get("cameras", []) if camera not in dataset_config.cameras]
    if unknown:
        raise ValueError(
            f"cameras={overrides['cameras']}, but the dataset has {dataset_config.cameras}: leave out {unknown}, or "
            "convert it again with --cameras"
        )
    config = dataset_config.replace(**overrides)
    if (config.relative_actions, config.chunk_size) != (dataset_config.relative_actions, dataset_config.chunk_size):
        config = config.replace(action_stats=NormStats.from_batches(lambda: _action_batches(dataset, config)))
    return config


def _action_batches(dataset: Dataset, config: VLAConfig) -> Iterator[np.ndarray]:
    """What the action text will hold, (rows · chunk_size, action_dim) at a time, from the raw columns alone."""
    raw = dataset.select_columns(["raw_action", "raw_state"]).with_format("arrow")
    for table in raw.iter(batch_size=_STATS_BATCH):
        actions, states = (
            table[name].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
            for name in ("raw_action", "raw_state")
        )
        windows = actions.reshape(len(table), -1, config.action_dim)[:, : config.chunk_size]
        yield (relative_windows(windows, states) if config.relative_actions else windows).reshape(
            -1, config.action_dim
        )
