"""Episodes -> a chat dataset on disk. Every converter in data_prep/ is a `Source` and a call of `convert`.

Two phases, so that a conversion streams, runs in parallel and can be stopped at any moment:

1. every episode is read once, checked, its frames encoded, and written to a parquet of its own in OUTPUT_DIR.partial;
2. statistics over all of them, then the text columns and the final shards, and a rename to OUTPUT_DIR.

Both keep a piece of an episode in memory, and the vectors of one.
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
from vla0_trl.conversion.card import push_dataset, sampled_frames, write_card
from vla0_trl.conversion.shards import with_statistics, write_shards
from vla0_trl.conversion.staging import (
    ConversionError,
    StagedInfo,
    Staging,
    read_staged,
    stage_episodes,
    staged_frames,
    staged_info,
)
from vla0_trl.episodes import EpisodeError, ImageFormat, Source, SourceInfo
from vla0_trl.files import write_whole

CONVERSION_NAME = "conversion.json"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass
class Selection:
    """Which episodes of a source.

    Args:
        episodes (`slice`): of the source's indices.
        max_episodes_per_task (`int`, *optional*): keep at most so many of each instruction, drawn with `seed`.
        tasks (`list[str]`, *optional*): only episodes of these instructions.
    """

    episodes: slice = field(default_factory=lambda: slice(None))
    max_episodes_per_task: int | None = None
    seed: int = 0
    tasks: list[str] | None = None

    def indices(self, source: Source) -> list[int]:
        """Ascending."""
        chosen = list(range(len(source)))[self.episodes]
        if self.tasks is not None:
            chosen = [index for index in chosen if source.task(index) in self.tasks]
        if self.max_episodes_per_task is not None:
            by_task: dict[str, list[int]] = {}
            for index in np.random.default_rng(self.seed).permutation(chosen).tolist():
                by_task.setdefault(source.task(index), []).append(index)
            chosen = sorted(index for group in by_task.values() for index in group[: self.max_episodes_per_task])
        if not chosen:
            raise ConversionError(
                f"no episode is left of the {len(source)} in {source.info.source}: see --episodes"
                + (f" and --tasks ({self.tasks})" if self.tasks is not None else "")
            )
        return chosen


def convert(
    source: Source,
    config: VLAConfig,
    output_dir: str | Path,
    *,
    selection: Selection | None = None,
    num_proc: int = 1,
    image_format: ImageFormat = "png",
    skip_bad: bool = False,
    overwrite: bool = False,
    push_to_hub: str | None = None,
    public: bool = False,
    command: str = "",
    recipe: str = "recipes/sft_pusht.py",
) -> Path:
    """Write a source's episodes as a chat dataset; what is there already is continued or reused.

    Args:
        config (`VLAConfig`): without statistics; gives cameras, widths, chunks and text options.
        output_dir (`str` or `Path`): appears when it is complete; until then all is in `<output_dir>.partial`.
        num_proc (`int`): processes; the dataset's bytes don't depend on it.
        image_format (`str`): "png" or "jpeg", for frames that the source does not give as files.
        skip_bad (`bool`): leave bad episodes out and list them in the end, instead of stopping at the first.
        overwrite (`bool`): replace a finished dataset or the rest of another conversion.
        push_to_hub (`str`, *optional*): "USER/NAME" to upload to, private unless `public`.
        command (`str`): how this was called, for the card.
        recipe (`str`): what to train with, for the report.

    Returns:
        The absolute `output_dir`.

    Raises:
        EpisodeError: bad data, unless `skip_bad`; episodes read so far are kept.
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
    key = {"staging": staging_key, "episodes": indices, "config": config.to_dict(), "skip_bad": skip_bad}

    if _is_finished(output_dir, key, overwrite):
        print(f"already converted: {output_dir} (--overwrite to do it again)")
        shutil.rmtree(partial, ignore_errors=True)
    else:
        try:
            _claim(partial, staging_key, overwrite)
            staging = Staging(source, config, partial, image_format, skip_bad)
            staged = stage_episodes(staging, indices, num_proc)
            result = _finish(partial, output_dir, config, info, indices, key, command)
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            raise ConversionError(
                f"the disk is full: {error}. Make room and run the same command again: finished episodes are kept in "
                f"{partial}"
            ) from error
        _report(output_dir, result, staged, time.monotonic() - started, recipe)
    if push_to_hub:
        push_dataset(output_dir, push_to_hub, public)
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
    if all(found.get(name) == json.loads(json.dumps(value)) for name, value in key.items()):
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
        if found == json.loads(json.dumps(staging_key)):
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
    for name, value in json.loads(json.dumps(wanted)).items():
        other = found.get(name)
        if isinstance(value, dict) and isinstance(other, dict) and value != other:
            return _difference(other, value, f"{prefix}{name}.")
        if value != other:
            return f"{prefix}{name}: {str(other)[:60]} there, {str(value)[:60]} now"
    return "settings that this version does not know"


@dataclass
class _Result:
    """Frames and episodes of a finished dataset; `skipped` says why."""

    frames: int
    kept: list[int]
    rejected: list[int]
    skipped: dict[int, str]


def _finish(
    partial: Path,
    output_dir: Path,
    config: VLAConfig,
    info: SourceInfo,
    indices: list[int],
    key: dict[str, Any],
    command: str,
) -> _Result:
    """Phase 2."""
    result = _sorted_out({index: staged_info(partial, index) for index in indices}, key["skip_bad"])
    if not result.kept:
        reasons = "".join(f"\n  {reason}" for reason in result.skipped.values())
        raise ConversionError(f"all {len(indices)} episodes of {info.source} were rejected: nothing to write{reasons}")
    config = with_statistics(partial, result.kept, config)

    final = partial / "final"
    shutil.rmtree(final, ignore_errors=True)
    (final / "data").mkdir(parents=True)
    write_shards(final / "data", partial, result.kept, config)
    config.save_pretrained(final)
    sample = sampled_frames(staged_frames(partial, result.kept[0]), len(read_staged(partial, result.kept[0]).actions))
    left_out = sorted([*result.rejected, *result.skipped])
    write_card(final, sample, config, info, len(result.kept), result.frames, left_out, command)
    record = key | {"rejected": result.rejected, "skipped": result.skipped}
    (final / CONVERSION_NAME).write_text(json.dumps(record, indent=1) + "\n")

    if output_dir.exists():  # replaced only now, when what replaces it is complete
        output_dir.rename(partial / "replaced")
    final.rename(output_dir)
    shutil.rmtree(partial)
    return result


def _sorted_out(staged: dict[int, StagedInfo], skip_bad: bool) -> _Result:
    """Which episodes go into the dataset.

    Raises:
        EpisodeError: an episode's frames have another size than the first's, and bad ones are not skipped.
    """
    result = _Result(0, [], [], {})
    sizes = None
    for index, info in staged.items():
        error = info.error
        if info.frames:
            sizes = sizes or info.sizes
            if info.sizes != sizes:
                error = (
                    f"{info.name}: frames are {info.sizes} pixels, those of the first episode {sizes}: all frames of "
                    "a camera must have one size; leave the episode out with --episodes or --skip_bad_episodes"
                )
                if not skip_bad:
                    raise EpisodeError(error)
        if error:
            result.skipped[index] = error
        elif info.frames:
            result.kept.append(index)
            result.frames += info.frames
        else:
            result.rejected.append(index)
    return result


def _report(output_dir: Path, result: _Result, staged: int, seconds: float, recipe: str) -> None:
    names = f" ({', '.join(map(str, result.rejected))})" if result.rejected else ""
    chosen = len(result.kept) + len(result.rejected) + len(result.skipped)
    print(
        f"{len(result.kept)} episodes kept, {len(result.rejected)} rejected{names}; {staged} of {chosen} read now\n"
        f"{result.frames} frames in {seconds:.1f} s: {result.frames / seconds:.0f} frames/s\n"
        f"dataset: {output_dir}\n"
        f"look at it: python data_prep/inspect_dataset.py --dataset {output_dir} --output inspect.html\n"
        f"train on it: accelerate launch {recipe} --dataset_name {output_dir}"
    )
    if result.skipped:
        print(f"{len(result.skipped)} episodes skipped as bad:", *result.skipped.values(), sep="\n  ")
