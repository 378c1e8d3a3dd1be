"""Phase 2 of a conversion: staged episodes -> statistics, text columns, the parquet shards of the dataset."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from vla0_trl.actions import NormStats
from vla0_trl.chat_dataset import FEATURES
from vla0_trl.config import VLAConfig
from vla0_trl.conversion.staging import ConversionError, read_staged, staged_frames, staged_path
from vla0_trl.episodes import action_windows, chat_columns, relative_windows

ROW_GROUP_ROWS = 100  # what a reader must decompress to get at one row
SHARD_BYTES = 400_000_000  # of staged episodes; with the text columns a shard stays below the Hub's usual 500 MB
SHARD_ROWS = 100_000  # a writer keeps 20 kB for every row group until its file is closed


def with_statistics(partial: Path, kept: list[int], config: VLAConfig) -> VLAConfig:
    """The config with the statistics of what its text will hold, in constant memory.

    Raises:
        ConversionError: a dimension that is to be written never changes.
    """

    def actions() -> Iterator[np.ndarray]:
        for index in kept:
            episode = read_staged(partial, index)
            windows = action_windows(episode.actions, config.chunk_size)
            if config.relative_actions:
                windows = relative_windows(windows, episode.states)
            yield windows.reshape(-1, config.action_dim)

    def states() -> Iterator[np.ndarray]:
        return (read_staged(partial, index).states for index in kept)

    config = config.replace(
        action_stats=NormStats.from_batches(actions),
        state_stats=NormStats.from_batches(states) if config.state_dim else None,
    )
    for field, codec in (("action", config.action_tokenizer), ("state", config.state_quantizer)):
        try:
            codec()
        except ValueError as error:
            raise ConversionError(f"{field}: {error} (episodes read so far are kept in {partial})") from error
    return config


def write_shards(directory: Path, partial: Path, kept: list[int], config: VLAConfig) -> None:
    """Write `train-*.parquet` into `directory`, a piece of an episode in memory at a time."""
    shards = _shards(partial, kept)
    with tqdm(total=len(kept), desc="writing", unit="episode") as progress:
        for number, shard in enumerate(shards):
            path = directory / f"train-{number:05d}-of-{len(shards):05d}.parquet"
            _write_shard(path, _columns(partial, shard, config, progress))


def _shards(partial: Path, kept: list[int]) -> list[list[int]]:
    """Consecutive episodes, as many as `SHARD_BYTES` and `SHARD_ROWS` allow."""
    shards: list[list[int]] = [[]]
    size = rows = 0
    for index in kept:
        path = staged_path(partial, index)
        size += path.stat().st_size
        rows += pq.read_metadata(path).num_rows
        if shards[-1] and (size > SHARD_BYTES or rows > SHARD_ROWS):
            shards.append([])
            size, rows = path.stat().st_size, pq.read_metadata(path).num_rows
        shards[-1].append(index)
    return shards


def _columns(partial: Path, shard: list[int], config: VLAConfig, progress: tqdm) -> Iterator[dict[str, list]]:
    for index in shard:
        episode = read_staged(partial, index)
        first_frame = 0
        for images in staged_frames(partial, index):
            columns = chat_columns(replace(episode, images=images), config, index, first_frame)
            first_frame += len(columns["frame_index"])
            yield columns
        progress.update()


def _write_shard(path: Path, pieces: Iterator[dict[str, list]]) -> None:
    schema = FEATURES.arrow_schema  # its metadata tells load_dataset that images are images
    rest = schema.empty_table()
    # Without a list, the smallest and largest image of every row group would go into the footer, too.
    with_stats = ["episode_index", "frame_index"]
    with pq.ParquetWriter(path, schema, compression="zstd", write_statistics=with_stats) as writer:
        for columns in pieces:
            rest = pa.concat_tables([rest, pa.table(columns, schema=schema)])
            whole = len(rest) // ROW_GROUP_ROWS * ROW_GROUP_ROWS
            if whole:
                writer.write_table(rest.slice(0, whole), row_group_size=ROW_GROUP_ROWS)
            rest = rest.slice(whole)
        if len(rest):
            writer.write_table(rest)
