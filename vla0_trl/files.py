"""Files whose existence means that they are whole."""

from __future__ import annotations

import os
import re
from pathlib import Path

_LEFTOVER = re.compile(r"\..+\.\d+\.partial")  # of `write_whole`, by a process that was killed


def write_whole(path: Path, text: str) -> None:
    """Write a text file beside `path` and rename it: a kill or a full disk leaves the old one or none, never half."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # several processes may write the same file
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def delete_leftovers(folder: Path) -> None:
    """Delete what killed calls of [`write_whole`] left in a folder that no other process writes to."""
    for path in folder.glob(".*.partial"):
        if _LEFTOVER.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)
