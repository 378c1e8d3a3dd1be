"""LeRobotDatasets by folder or Hub id: only the files that a conversion needs are fetched."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from huggingface_hub import constants, errors, snapshot_download

from vla0_trl.data.convert import Selection
from vla0_trl.data.sources.lerobot import LeRobotSource
from vla0_trl.data.sources.lerobot_meta import LeRobotMeta, read_meta
from vla0_trl.data.staging import ConversionError
from vla0_trl.schema import one_line

_FAILED = (errors.HFValidationError, errors.HTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)


def open_dataset(name: str, revision: str | None = None) -> LeRobotMeta:
    """What `meta/` tells of a folder or of "USER/NAME" on the Hub, at a branch, tag or commit."""
    if Path(name).is_dir():
        if revision is not None:
            raise ConversionError(f"--revision {revision}: {name} is a folder, revisions are the Hub's")
        return read_meta(Path(name))
    root = _download(name, revision, ["meta/*", "README.md"])
    # All that follows is of this commit, whatever is pushed meanwhile. The cache names folders by commit.
    commit = root.name if re.fullmatch("[0-9a-f]{40}", root.name) else revision
    return replace(read_meta(root), hub_id=name, revision=commit)


def fetch(source: LeRobotSource, selection: Selection, cameras: list[str]) -> None:
    """Bring what the selected episodes and cameras need; a folder has it all."""
    meta = source.meta
    if meta.hub_id is None:
        return
    if selection.by_task:  # what `meta/` does not tell, frames do
        asked = range(len(source))[selection.episodes]
        files = [meta.episodes[index].data for index in asked if source.listed_task(index) is None]
        if files:
            _download(meta.hub_id, meta.revision, list(dict.fromkeys(files)))
    indices = selection.indices(source)
    keys = [source.cameras[camera] for camera in cameras]
    videos = [key for key in keys if meta.features[key]["dtype"] == "video"]
    if len(indices) == len(source):  # a pattern for each of many files would take minutes to match
        patterns = [_wildcard(meta.info["data_path"])]
        patterns += [_wildcard(meta.info["video_path"].replace("{video_key}", key)) for key in videos]
    else:
        episodes = [meta.episodes[index] for index in indices]
        patterns = [episode.data for episode in episodes]
        patterns += [episode.videos[key].path for episode in episodes for key in videos]
    patterns = list(dict.fromkeys(patterns))
    _say_what_is_left(meta.hub_id, meta.revision, patterns)
    _download(meta.hub_id, meta.revision, patterns)


def _say_what_is_left(hub_id: str, revision: str | None, patterns: list[str]) -> None:
    """Print how many files, and how much, are not here yet; `ConversionError` if they don't fit on the disk."""
    options = {"repo_type": "dataset", "revision": revision, "allow_patterns": patterns}
    try:
        with _readable(hub_id, revision):
            files = snapshot_download(hub_id, **options, dry_run=True)
    except errors.DryRunError:  # no connection, or offline on purpose: what is here may do
        return
    missing = [file for file in files if file.will_download]
    if not missing:
        return
    size, cache = sum(file.file_size or 0 for file in missing), Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    wanted = f"{len(missing)} of {len(files)} files, {size / 1e9:.2f} GB"
    if size > free:
        raise ConversionError(
            f"{wanted} of {hub_id} are to be downloaded into {cache}, where {free / 1e9:.2f} GB are free: set HF_HOME "
            "to a larger disk, or take fewer episodes (--tasks, --num_episodes)"
        )
    print(f"downloading {wanted}, of {hub_id}; stopped, it goes on where it was", flush=True)


def _wildcard(template: str) -> str:
    """A path of info.json as a pattern for all of its files: "data/*/episode_*.parquet"."""
    return re.sub(r"\{[^}]*\}", "*", template)


def _download(hub_id: str, revision: str | None, patterns: list[str]) -> Path:
    with _readable(hub_id, revision):
        return Path(snapshot_download(hub_id, repo_type="dataset", revision=revision, allow_patterns=patterns))


@contextmanager
def _readable(hub_id: str, revision: str | None) -> Iterator[None]:
    """What the Hub's client raises, as a [`ConversionError`] of one line."""
    try:
        yield
    except _FAILED as error:
        at = f" at revision {revision}" if revision else ""
        raise ConversionError(
            f"no folder {hub_id!r} here, and the Hub's dataset of that name{at} can't be read "
            f"({type(error).__name__}: {one_line(error)})"
        ) from error
