"""What belongs to a dataset or a checkpoint, and whether it is whole: a manifest, written last, lists files and sizes.

Only what a manifest lists is ever deleted. Notes and evaluations that users keep in such a folder stay.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from vla0_trl.config import CONFIG_NAME
from vla0_trl.files import delete_leftovers, write_whole
from vla0_trl.schema import each, items, mistakes, optional, text, whole

CONVERSION_NAME = "conversion.json"  # a dataset's manifest
CHECKPOINT_FILE = "checkpoint.json"  # a checkpoint's manifest

_MANIFESTS = (CONVERSION_NAME, CHECKPOINT_FILE)


def _seed(value: Any) -> Any:
    """A number, or in LIBERO suite, task and number."""
    if isinstance(value, list) and len(value) == 3:
        return [text(value[0]), whole(value[1]), whole(value[2])]
    return whole(value)


_FILES = {"files": optional(each(whole))}
_TRAINED_ON = {"dataset": text, "episodes": items(whole, most=10**8), "seeds": items(_seed, most=10**8)}
# What versions before manifests listed files wrote beside these files.
_BEFORE_MANIFESTS = {
    CONVERSION_NAME: ("data/train-*.parquet", "README.md", "sample.png", CONFIG_NAME),
    CONFIG_NAME: (
        *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json"),
        *("*processor_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
        *("merges.txt", "chat_template.*", "base_model.json", "README.md", "training_args.bin", "trainer_state.json"),
        *("optimizer.*", "scheduler.pt", "scaler.pt", "rng_state*.pth", "latest", "zero_to_fp32.py"),
        *("global_step*/*", "optimizer_0/*", "pytorch_model_fsdp_0/*"),
    ),
}


def files_of(folder: Path, pattern: str = "**/*") -> dict[str, int]:
    """The size of every file below a folder, by its relative name."""
    files = (path for path in sorted(folder.glob(pattern)) if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def damage(folder: Path) -> str | None:
    """What keeps a dataset or checkpoint from being whole, in words; None if it is whole."""
    if not folder.is_dir():
        return "there is no such folder"
    manifest = next((folder / name for name in _MANIFESTS if (folder / name).is_file()), None)
    if manifest is None:  # by an earlier version, which wrote this file last
        return None if (folder / CONFIG_NAME).is_file() else "it was never finished"
    record = read_json(manifest)
    if record is None or mistakes(record, _FILES):
        return f"{manifest.name} is damaged"
    if record.get("files") is None:
        return None if manifest.name == CONVERSION_NAME else f"{manifest.name} is damaged"
    for name, size in record["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            there = f"has {path.stat().st_size} bytes instead of {size}" if path.is_file() else "is missing"
            return f"{name} {there}"
    return None


def claimed(folder: Path, unfinished: bool = False) -> list[Path]:
    """The files of a dataset or checkpoint that we wrote, its manifest last; none of any other folder.

    Args:
        unfinished (`bool`): something else says that the folder is ours: it may have no manifest yet.
    """
    for name in (*_MANIFESTS, CONFIG_NAME):
        record = read_json(folder / name)
        if record is not None or (unfinished and name == CONFIG_NAME):
            damaged = record is None or name not in _MANIFESTS or mistakes(record, _FILES)
            listed = () if damaged else record.get("files") or ()
            patterns = () if listed else _BEFORE_MANIFESTS.get(name, ())
            files = [folder / file for file in listed] + [p for pattern in patterns for p in folder.glob(pattern)]
            home = folder.resolve()  # a manifest from elsewhere may name anything
            return [path for path in files if path.resolve().is_relative_to(home)] + [folder / name]
    return []


def delete_claimed(folder: Path, unfinished: bool = False) -> None:
    """Delete a dataset or checkpoint. Other files in the folder stay, and then the folder stays, too."""
    for path in claimed(folder, unfinished):
        if not path.is_dir():
            path.unlink(missing_ok=True)
    if unfinished:
        delete_leftovers(folder)
    _delete_empty_folders(folder)


def replace_folder(fresh: Path, target: Path) -> None:
    """Put a whole folder in another's place; after a kill in between the next call goes on from `target.old`."""
    if target.exists():
        _move_folder(target, target.with_name(f"{target.name}.old"))
    fresh.rename(target)
    restore_replaced(target)


def restore_replaced(target: Path) -> None:
    """What a kill inside [`replace_folder`] left: the old folder comes back, or its rest is tidied up."""
    old = target.with_name(f"{target.name}.old")
    if old.exists():
        _move_folder(old, target)


def _move_folder(folder: Path, place: Path) -> None:
    """Rename a folder; where the place is taken, only what users put into the folder goes there."""
    if not place.exists():
        folder.rename(place)
    else:
        delete_claimed(folder)
        move_files(folder, place)


def write_manifest(checkpoint: Path, files: dict[str, int], trained_on: dict[str, Any]) -> None:
    """Say that a checkpoint is whole, by the names and sizes of its files; and what it has learnt from."""
    write_whole(checkpoint / CHECKPOINT_FILE, json.dumps({"files": files, "trained_on": trained_on}) + "\n")


def renew_manifest(checkpoint: Path) -> None:
    """Take the sizes of a whole checkpoint's files again, after one of them was written anew."""
    files = [path for path in claimed(checkpoint) if path.name != CHECKPOINT_FILE]
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
    write_manifest(checkpoint, sizes, trained_on(checkpoint))


def trained_on(checkpoint: Path) -> dict[str, Any]:
    """`dataset`, `episodes` and simulator's `seeds` that a policy has learnt from; empty where nothing is known."""
    found = (read_json(checkpoint / CHECKPOINT_FILE) or {}).get("trained_on")
    return {} if not isinstance(found, dict) or mistakes(found, _TRAINED_ON) else found


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def move_files(source: Path, target: Path) -> None:
    """Move all files, those that say that the folder is whole last; what is in `target` already stays."""
    for path in sorted(source.rglob("*"), key=lambda path: (path.name in _MANIFESTS, path.name == CONFIG_NAME)):
        place = target / path.relative_to(source)
        if not path.is_dir() and not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            path.rename(place)
    _delete_empty_folders(source)


def _delete_empty_folders(folder: Path) -> None:
    for parent, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(parent)
