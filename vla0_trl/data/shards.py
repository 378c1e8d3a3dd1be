"""Phase 2 of a conversion: staged episodes -> statistics, text, the parquet shards and the card of the dataset."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from vla0_trl.config import VLAConfig
from vla0_trl.data.card import sampled_frames, write_card
from vla0_trl.data.chat_dataset import SCHEMA, chat_rows, clipped_shares, with_statistics
from vla0_trl.data.episodes import EpisodeError
from vla0_trl.data.staging import ConversionError, Staging, parquet_writer
from vla0_trl.manifest import CONVERSION_NAME, files_of

ROW_GROUP_ROWS = 100  # what a reader must decompress to read one row
SHARD_BYTES = 400_000_000  # of staged episodes; with the text columns a shard stays below the Hub's usual 500 MB

SAID_CLIPPED, MOST_CLIPPED = 0.001, 0.05  # of a dimension's values; quantiles clip 0.02


@dataclass
class ClassifiedEpisodes:
    """What becomes of each episode, by its index in the source."""

    included: list[int] = field(default_factory=list)  # in the order of the dataset
    frames: int = 0  # of all included episodes
    rejected: list[int] = field(default_factory=list)  # by the source, for example because the demonstration failed
    skipped: dict[int, str] = field(default_factory=dict)  # bad ones, and why
    clipped: list[str] = field(default_factory=list)  # a line per dimension that is partly outside of the bins' range


def classify_episodes(staging: Staging, indices: list[int]) -> ClassifiedEpisodes:
    """Decide which of the staged episodes are included in the dataset; all must have the first one's frame sizes."""
    result, sizes = ClassifiedEpisodes(), ""
    for index in indices:
        info = staging.info(index)
        error = info.error
        if info.frames:
            sizes = sizes or info.sizes
            if info.sizes != sizes:
                error = (
                    f"{info.name}: frames are {info.sizes} pixels, those of the first episode {sizes}: all frames of "
                    "a camera must have one size; leave the episode out with --episodes or --skip_bad_episodes"
                )
                if not staging.skip_bad:
                    raise EpisodeError(error)
        if error:
            result.skipped[index] = error
        elif info.frames:
            result.included.append(index)
            result.frames += info.frames
        else:
            result.rejected.append(index)
    if not result.included:
        reasons = "".join(f"\n  {reason}" for reason in result.skipped.values())
        raise ConversionError(
            f"all {len(indices)} episodes of {staging.source.info.source} were rejected: nothing to write{reasons}"
        )
    return result


def write_dataset(
    final: Path, staging: Staging, result: ClassifiedEpisodes, key: dict[str, Any], command: str, recipe: str
) -> None:
    """Phase 2: write the whole dataset into the folder `final`, which is published afterwards."""

    def vectors() -> Iterator[pa.Table]:
        return (rows for index in result.included for rows in staging.rows(index, ["raw_state", "raw_action"]))

    try:
        config = with_statistics(staging.config, vectors)
    except ValueError as error:
        raise ConversionError(f"{error} (episodes read so far are kept in {staging.folder})") from error
    result.clipped = _clipped(clipped_shares(config, vectors), config)
    shutil.rmtree(final, ignore_errors=True)
    (final / "data").mkdir(parents=True)
    shards = _shards(staging, result.included)
    for number, shard in enumerate(shards):
        name = f"train-{number:05d}-of-{len(shards):05d}.parquet"
        with tqdm(shard, desc=f"writing {name}", unit="episode") as episodes:
            _write_shard(final / "data" / name, (rows for index in episodes for rows in staging.rows(index)), config)
    rows = sum(pq.read_metadata(path).num_rows for path in (final / "data").iterdir())
    if rows != result.frames:
        raise ConversionError(f"{rows} rows were written instead of {result.frames}: run the same command again")
    config.save_pretrained(final)
    first = result.included[0]
    sample = sampled_frames(staging.rows(first, ["images"]), staging.info(first).frames)
    left_out = sorted([*result.rejected, *result.skipped])
    tasks = Counter(next(staging.rows(index, ["task"]))["task"][0].as_py() for index in result.included)
    write_card(
        final, sample, config, staging.source.info, tasks, result.frames, left_out, result.clipped, command, recipe
    )
    outcome = {"rejected": result.rejected, "skipped": result.skipped, "clipped": result.clipped}
    record = key | outcome | {"files": files_of(final)}
    (final / CONVERSION_NAME).write_text(json.dumps(record, indent=1) + "\n")


def _clipped(shares: dict[str, np.ndarray], config: VLAConfig) -> list[str]:
    """One line per dimension that loses more than `SAID_CLIPPED` of its values.

    An action that loses more than `MOST_CLIPPED` is an error: it would be trained to be something else.
    """
    lines = []
    fixed = config.normalization != "quantile"  # which never loses what is not rare
    for name, of_dimensions in shares.items():
        for dim, share in enumerate(of_dimensions):
            line = f"{name}[{dim}]: {share:.1%} of the values are outside of {config.normalization} and clipped"
            if fixed:
                stats = config.action_stats if name == "action" else config.state_stats
                span = f"{stats.min[dim]:g} to {stats.max[dim]:g}"
                line += f"; they run from {span}: --normalization min_max gives every dimension its range"
            if name == "action" and fixed and share > MOST_CLIPPED:
                raise ConversionError(line)
            lines += [line] if share > SAID_CLIPPED else []
    return lines


def _shards(staging: Staging, included: list[int]) -> list[list[int]]:
    """Consecutive episodes, as many as `SHARD_BYTES` allow."""
    shards: list[list[int]] = []
    size = 0
    for index in included:
        episode_size = staging.path(index).stat().st_size
        if not shards or size + episode_size > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(index)
        size += episode_size
    return shards


def _write_shard(path: Path, pieces: Iterator[pa.Table], config: VLAConfig) -> None:
    rest = SCHEMA.empty_table()
    # Without a list, the smallest and largest image of every row group would go into the footer, too.
    with_stats = ["episode_index", "frame_index"]
    with parquet_writer(path, SCHEMA, compression="zstd", write_statistics=with_stats) as writer:
        for raw in pieces:
            rest = pa.concat_tables([rest, chat_rows(raw, config)])
            whole = len(rest) // ROW_GROUP_ROWS * ROW_GROUP_ROWS
            if whole:
                writer.write_table(rest.slice(0, whole), row_group_size=ROW_GROUP_ROWS)
            rest = rest.slice(whole)
        if len(rest):
            writer.write_table(rest)
