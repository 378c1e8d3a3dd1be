"""Rows of true shape without a source, for benchmarks."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from PIL import Image

from vla0_trl.actions import NormStats
from vla0_trl.config import VLAConfig
from vla0_trl.data.chat_dataset import RAW_SCHEMA, chat_rows
from vla0_trl.data.episodes import Episode, raw_rows

_LIBERO_TASK = "turn on the stove and put the moka pot on it, then put both bowls on the plate"  # longer than any
# What the datasets of the recipes look like: (task, VLAConfig without statistics, side of a camera's image).
_DATASETS = {
    "libero": (
        _LIBERO_TASK,
        VLAConfig(cameras=["image", "image2"], action_dim=7, state_dim=8, chunk_size=8, image_size=256),
        256,
    ),
    "so100": (
        "Pick up the red block and put it into the box.",
        VLAConfig(cameras=["front", "wrist"], action_dim=6, state_dim=6, chunk_size=30, image_size=256),
        256,
    ),
    "pusht": ("Push the T onto its goal.", VLAConfig(action_dim=2, state_dim=2, chunk_size=10, image_size=96), 96),
}


def synthetic_dataset(kind: str, rows: int, **overrides: Any) -> tuple[Dataset, VLAConfig]:
    """Rows as a conversion for a folder of recipes/ gives them, with some fields of the [`VLAConfig`] changed.

    They have integers of mostly three digits, the usual length, and images as smooth as photographs, as JPEG.
    """
    task, config, side = _DATASETS[kind]
    rng = np.random.default_rng(0)
    stats = {
        f"{name}_stats": NormStats.from_array(np.array([[-1.0] * dim, [1.0] * dim]))
        for name, dim in (("action", config.action_dim), ("state", config.state_dim))
    }
    episode = Episode(
        task,
        rng.uniform(-1, 1, (rows, config.action_dim)),
        {camera: [_smooth_image(side, rng) for _ in range(rows)] for camera in config.cameras},
        rng.uniform(-1, 1, (rows, config.state_dim)),
    )
    config = config.replace(**stats | overrides)
    pieces = [pa.table(piece, RAW_SCHEMA) for piece in raw_rows(episode, config, index=0, image_format="jpeg")]
    return Dataset(chat_rows(pa.concat_tables(pieces), config)), config


def save_synthetic(kind: str, rows: int, folder: Path) -> tuple[Dataset, VLAConfig]:
    """[`synthetic_dataset`] as a chat dataset on disk."""
    dataset, config = synthetic_dataset(kind, rows)
    (folder / "data").mkdir(parents=True)
    dataset.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    config.save_pretrained(folder)
    return dataset, config


def _smooth_image(side: int, rng: np.random.Generator) -> np.ndarray:
    coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
    return np.asarray(coarse.resize((side, side)))
