"""Files whose existence means that they are whole, and what is raised for those that are not."""

import os
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What Pillow raises for damaged files.
DAMAGED_IMAGE = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, struct.error, zlib.error)
# Of `whole_file`, and of safetensors (0.8), which writes so, too: what a process that was killed left.
_LEFTOVER = re.compile(r"\..+\.\d+\.partial|\.tmp[A-Za-z0-9]{6}")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Another file in the folder of `path`, to write to; it becomes `path` when the block ends well.

    A kill, an error or a full disk leaves the old file or none, never half of one.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # several processes may write the same file
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file, whole or not at all; an error names it, which Python's own of a full disk does not."""
    try:
        with whole_file(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def delete_leftovers(folder: Path) -> None:
    """Delete what killed writes, our own and safetensors', left in a folder that no other process writes to."""
    for path in folder.glob(".*"):
        if _LEFTOVER.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)
