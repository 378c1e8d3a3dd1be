"""Episodes -> a chat dataset on disk. Every converter in data_prep/ is a `Source` and a call of `convert`.

Two phases, so that a conversion streams, runs in parallel and can be stopped at any moment:

1. every episode is read once, checked, its frames encoded, and written to a parquet of its own in OUTPUT_DIR.partial;
2. statistics over all of them, then the text columns and the final shards, and a rename to OUTPUT_DIR.

Both hold only a part of one episode in memory at a time.
"""

import errno
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vla0_trl.config import VLAConfig
from vla0_trl.data.episodes import EpisodeError, ImageFormat, Source, SourceInfo
from vla0_trl.data.shards import ClassifiedEpisodes, classify_episodes, write_dataset
from vla0_trl.data.staging import ConversionError, Staging
from vla0_trl.manifest import CONVERSION_NAME, damage, read_json
from vla0_trl.run_folder import FolderError, RunFolder, belongs_to_another, is_free

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass
class Selection:
    """Which episodes of a source."""

    episodes: slice = field(default_factory=lambda: slice(None))  # of the source's indices
    max_episodes_per_task: int | None = None  # at most this many of each instruction, drawn with `seed`
    seed: int = 0
    tasks: list[str] | None = None  # only episodes of these instructions
    num_episodes: int | None = None  # this many of the rest, drawn with `seed` over all instructions

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
    """Write a source's episodes as a chat dataset, and return its absolute path; what is there is continued or reused.

    Args:
        config (`VLAConfig`): without statistics; gives cameras, widths, chunks and text options.
        output_dir (`str` or `Path`): appears when it is complete; until then all is in `<output_dir>.partial`.
        num_proc (`int`): processes; the dataset's bytes don't depend on it.
        image_format (`str`): of frames that the source does not give as files.
        skip_bad_episodes (`bool`): leave bad episodes out and list them in the end, instead of stopping at the first.
        overwrite (`bool`): replace a finished dataset or the rest of another conversion.
        command, recipe (`str`): how this was called, and what to train with, for card and report.

    Raises:
        EpisodeError: bad data, unless `skip_bad_episodes`; episodes read so far are kept.
        FolderError: the output belongs to something else, or another command is at work there.
        ConversionError: the disk is full, no episode is left, …
    """
    started = time.monotonic()
    output_dir = Path(os.path.abspath(output_dir))
    info = source.info
    config = config.replace(
        robot=info.robot, units=info.units, fps=info.fps, source=info.source, source_revision=info.revision
    )
    indices = (selection or Selection()).indices(source)
    key = _identity(info, config, indices, image_format, skip_bad_episodes)
    with RunFolder(output_dir) as folder:
        folder.finish_publishing()
        work = key["staging"] | {"chunk_size": config.chunk_size}
        if _is_finished(folder, key, overwrite):
            print(f"already converted: {output_dir} (--overwrite to do it again)")
            if folder.unfinished() == work:
                folder.discard()
            return output_dir
        try:
            folder.begin(work, overwrite)
            staging = Staging(source, config, folder.partial / "episodes", image_format, skip_bad_episodes)
            staged = staging.stage_all(indices, num_proc)
            result = classify_episodes(staging, indices)
            write_dataset(folder.partial / "final", staging, result, key, command, recipe)
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            raise ConversionError(
                f"the disk is full: {error}. Make room and run the same command again: finished episodes are kept in "
                f"{folder.partial}"
            ) from error
        folder.publish()  # what was there is replaced only now, when what replaces it is complete

    _print_report(result, output_dir, recipe, staged, len(indices), time.monotonic() - started)
    return output_dir


def _identity(
    info: SourceInfo, config: VLAConfig, indices: list[int], image_format: ImageFormat, skip_bad_episodes: bool
) -> dict[str, Any]:
    """What makes this conversion another one than that of other data or settings, as it is read back from JSON."""
    staging = {
        "format": 2,
        "source": {"name": info.source, "revision": info.revision, "options": info.options},
        "cameras": config.cameras,
        "action_dim": config.action_dim,
        "state_dim": config.state_dim,
        "image_format": image_format,
    }
    words = ("units", "state_names", "action_names")  # no content
    content = {name: value for name, value in config.to_dict().items() if name not in words}
    key = {"staging": staging, "episodes": indices, "config": content, "skip_bad": skip_bad_episodes}
    return json.loads(json.dumps(key))


def _is_finished(folder: RunFolder, key: dict[str, Any], overwrite: bool) -> bool:
    """Whether the folder is this very conversion's result. Raises if it is something that may not be replaced."""
    if is_free(folder.path):
        return False
    found = read_json(folder.path / CONVERSION_NAME)
    if found is None:
        damaged = (folder.path / CONVERSION_NAME).exists()
        problem = f"has a damaged {CONVERSION_NAME}" if damaged else "exists and is not a dataset made by data_prep/"
        raise FolderError(f"{folder.path} {problem}: choose another --output_dir")
    if overwrite:
        return False
    if found | key != found:
        raise belongs_to_another(folder.path, "run", {name: found.get(name) for name in key}, key)
    if error := damage(folder.path):
        raise FolderError(f"{folder.path} is damaged: {error}: convert it again with --overwrite")
    return True


def _print_report(
    result: ClassifiedEpisodes, output_dir: Path, recipe: str, read_now: int, wanted: int, seconds: float
) -> None:
    names = f" ({', '.join(map(str, result.rejected))})" if result.rejected else ""
    print(
        f"{len(result.included)} episodes kept, {len(result.rejected)} rejected{names}; "
        f"{read_now} of {wanted} read now\n"
        f"{result.frames} frames in {seconds:.1f} s: {result.frames / seconds:.0f} frames/s\n"
        f"dataset: {output_dir}\n"
        f"look at it: python data_prep/inspect_dataset.py --dataset {output_dir} --output inspect.html\n"
        f"train on it: accelerate launch {recipe} --dataset_name {output_dir}"
    )
    if result.clipped:
        print("clipped:", *result.clipped, sep="\n  ")
    if result.skipped:
        print(f"{len(result.skipped)} episodes skipped as bad:", *result.skipped.values(), sep="\n  ")
