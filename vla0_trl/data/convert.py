"""Episodes -> a chat dataset on disk. Every converter in data_prep/ is a `Source` and a call of `convert`.

Two phases, so that a conversion streams, runs in parallel and can be stopped at any moment:

1. every episode is read once, checked, its frames encoded, and written to a parquet of its own in OUTPUT_DIR.partial;
2. statistics over all of them, then the text columns and the final shards, and a rename to OUTPUT_DIR.

Both keep a piece of an episode in memory.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vla0_trl.config import VLAConfig
from vla0_trl.data.episodes import EpisodeError, ImageFormat, Source
from vla0_trl.data.shards import CONVERSION_NAME, sorted_out, write_dataset
from vla0_trl.data.staging import ConversionError, Staging
from vla0_trl.files import write_whole

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass
class Selection:
    """Which episodes of a source.

    Args:
        episodes (`slice`): of the source's indices.
        max_episodes_per_task (`int`, *optional*): keep at most so many of each instruction, drawn with `seed`.
        tasks (`list[str]`, *optional*): only episodes of these instructions.
        num_episodes (`int`, *optional*): keep so many of what is left, drawn with `seed` whatever their instructions.
    """

    episodes: slice = field(default_factory=lambda: slice(None))
    max_episodes_per_task: int | None = None
    seed: int = 0
    tasks: list[str] | None = None
    num_episodes: int | None = None

    @property
    def by_task(self) -> bool:
        return self.tasks is not None or self.max_episodes_per_task is not None

    def indices(self, source: Source) -> list[int]:
        """Ascending. An episode whose task can't be read is among them, and is bad when it is read."""
        chosen = list(range(len(source)))[self.episodes]
        if self.by_task:
            chosen = self._of_tasks({index: _task(source, index) for index in chosen})
        if self.num_episodes is not None:
            if self.num_episodes > len(chosen):
                raise ConversionError(f"--num_episodes {self.num_episodes}: there are {len(chosen)} to draw from")
            chosen = sorted(np.random.default_rng(self.seed).permutation(chosen)[: self.num_episodes].tolist())
        if not chosen:
            raise ConversionError(
                f"no episode is left of the {len(source)} in {source.info.source}: see --episodes"
                + (f" and --tasks ({self.tasks})" if self.tasks is not None else "")
            )
        return chosen

    def _of_tasks(self, tasks: dict[int, str | None]) -> list[int]:
        """Of the episodes with these tasks, those that the flags about tasks leave."""
        unknown = [index for index, task in tasks.items() if task is None]
        chosen = [index for index, task in tasks.items() if task is not None]
        if self.tasks is not None:
            chosen = [index for index in chosen if tasks[index] in self.tasks]
        if self.max_episodes_per_task is not None:
            by_task: dict[str, list[int]] = {}
            for index in np.random.default_rng(self.seed).permutation(chosen).tolist():
                by_task.setdefault(tasks[index], []).append(index)
            chosen = [index for group in by_task.values() for index in group[: self.max_episodes_per_task]]
        return sorted(unknown + chosen)


def _task(source: Source, index: int) -> str | None:
    try:
        return source.task(index)
    except EpisodeError:
        return None


def convert(
    source: Source,
    config: VLAConfig,
    output_dir: str | Path,
    *,
    selection: Selection | None = None,
    num_proc: int = 1,
    image_format: ImageFormat = "png",
    skip_bad_episodes: bool = False,
    overwrite: bool = False,
    command: str = "",
    recipe: str = "recipes/sft_pusht.py",
) -> Path:
    """Write a source's episodes as a chat dataset; what is there already is continued or reused.

    Args:
        config (`VLAConfig`): without statistics; gives cameras, widths, chunks and text options.
        output_dir (`str` or `Path`): appears when it is complete; until then all is in `<output_dir>.partial`.
        num_proc (`int`): processes; the dataset's bytes don't depend on it.
        image_format (`str`): "png" or "jpeg", for frames that the source does not give as files.
        skip_bad_episodes (`bool`): leave bad episodes out and list them in the end, instead of stopping at the first.
        overwrite (`bool`): replace a finished dataset or the rest of another conversion.
        command (`str`): how this was called, for the card.
        recipe (`str`): what to train with, for the report.

    Returns:
        The absolute `output_dir`.

    Raises:
        EpisodeError: bad data, unless `skip_bad_episodes`; episodes read so far are kept.
        ConversionError: the output belongs to something else, the disk is full, no episode is left, …
    """
    started = time.monotonic()
    output_dir = Path(os.path.abspath(output_dir))
    partial = output_dir.with_name(output_dir.name + ".partial")
    info = source.info
    config = config.replace(robot=info.robot, fps=info.fps, source=info.source, source_revision=info.revision)
    indices = (selection or Selection()).indices(source)
    staging_key = {
        "format": 2,
        "source": {"name": info.source, "revision": info.revision, "options": info.options},
        "cameras": config.cameras,
        "action_dim": config.action_dim,
        "state_dim": config.state_dim,
        "image_format": image_format,
    }
    key = {"staging": staging_key, "episodes": indices, "config": config.to_dict(), "skip_bad": skip_bad_episodes}
    key = json.loads(json.dumps(key))  # as it is read back

    if _is_finished(output_dir, key, overwrite):
        print(f"already converted: {output_dir} (--overwrite to do it again)")
        shutil.rmtree(partial, ignore_errors=True)
        return output_dir
    try:
        _claim(partial, key["staging"] | {"chunk_size": config.chunk_size}, overwrite)
        staging = Staging(source, config, partial / "episodes", image_format, skip_bad_episodes)
        staged = staging.stage_all(indices, num_proc)
        result = sorted_out(staging, indices)
        write_dataset(partial / "final", staging, result, key, command)
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise ConversionError(
            f"the disk is full: {error}. Make room and run the same command again: finished episodes are kept in "
            f"{partial}"
        ) from error
    if output_dir.exists():  # replaced only now, when what replaces it is complete
        output_dir.rename(partial / "replaced")
    (partial / "final").rename(output_dir)
    shutil.rmtree(partial)

    seconds = time.monotonic() - started
    names = f" ({', '.join(map(str, result.rejected))})" if result.rejected else ""
    print(
        f"{len(result.kept)} episodes kept, {len(result.rejected)} rejected{names}; {staged} of {len(indices)} read "
        f"now\n{result.frames} frames in {seconds:.1f} s: {result.frames / seconds:.0f} frames/s\n"
        f"dataset: {output_dir}\n"
        f"look at it: python data_prep/inspect_dataset.py --dataset {output_dir} --output inspect.html\n"
        f"train on it: accelerate launch {recipe} --dataset_name {output_dir}"
    )
    if result.skipped:
        print(f"{len(result.skipped)} episodes skipped as bad:", *result.skipped.values(), sep="\n  ")
    return output_dir


def _is_finished(output_dir: Path, key: dict[str, Any], overwrite: bool) -> bool:
    """Whether `output_dir` is this very conversion's result. Raises if it is something that may not be replaced."""
    if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
        return False
    record = output_dir / CONVERSION_NAME
    if not record.is_file():
        raise ConversionError(f"{output_dir} exists and is no dataset made by data_prep/: choose another --output_dir")
    if overwrite:
        return False
    found = json.loads(record.read_text())
    if found | key == found:
        return True
    raise ConversionError(
        f"{output_dir} was converted with other options ({_difference(found, key)}): choose another --output_dir, or "
        "replace it with --overwrite"
    )


def _claim(partial: Path, staging_key: dict[str, Any], overwrite: bool) -> None:
    """Make the working folder, or make sure that what it holds is the beginning of this conversion."""
    manifest = partial / "manifest.json"
    if partial.exists():
        found = json.loads(manifest.read_text()) if manifest.is_file() else {}
        if found == staging_key:
            return
        if not overwrite:
            raise ConversionError(
                f"{partial} holds an unfinished conversion of something else ({_difference(found, staging_key)}): "
                "delete it, choose another --output_dir, or start again with --overwrite"
            )
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    write_whole(manifest, json.dumps(staging_key, indent=2))


def _difference(found: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> str:
    """The first setting in which two records differ: "config.num_bins: 255 there, 511 now"."""
    for name, value in wanted.items():
        other = found.get(name)
        if isinstance(value, dict) and isinstance(other, dict) and value != other:
            return _difference(other, value, f"{prefix}{name}.")
        if value != other:
            return f"{prefix}{name}: {str(other)[:60]} there, {str(value)[:60]} now"
    return "settings that this version does not know"
