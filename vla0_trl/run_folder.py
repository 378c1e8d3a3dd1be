"""A folder from claim to rename: who is at work in it, what in it is ours, and whether it is whole.

Conversions, trainings and evaluations all write their output through a [`RunFolder`]. Three rules keep it whole:

1. One command (or one launch of several processes) at a time holds a lock. The kernel frees it when the process dies.
2. What was made is listed, with sizes, in a manifest that is written last. A folder is whole if all of that is there.
3. Only what a manifest lists is ever deleted. Notes and evaluations that users keep in the folder stay.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import socket
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vla0_trl.files import delete_leftovers, write_whole
from vla0_trl.manifest import CONVERSION_NAME, damage, delete_claimed, move_files, read_json

RUN_FILE = "run.json"  # every setting that changes what is learnt; `training.claim` writes it
STATE_FILE = "trainer_state.json"  # steps and logs: transformers' TRAINER_STATE_NAME, without importing its trainer
BEST = "best"  # the policy that did best in the rollouts during training
ENERGY_FILE = "energy.json"  # what the training took; `training.progress` writes it, `report` reads it

_NOT_OURS_TO_MIND = ("lost+found", ".lock", ".partial")  # an empty disk has the first, the others are the lock's own
_SHORT_WAIT = 2.0  # seconds, for a process that is just letting go of the lock


class FolderError(ValueError):
    """The folder belongs to something else, or another command is at work in it; the message says what to do."""


class RunFolder:
    """The folder that a command makes, and the lock that keeps others out until [`close`] or the end of the process.

    A context manager.

    Args:
        path (`str` or `Path`): where the result will be; a link is followed.
        launch (`str`, *optional*): processes that give the same word share the folder once the first of them calls
            [`share`]; all others are kept out.

    Attributes:
        path (`Path`): absolute.
        first (`bool`): whether no other process of this launch is here.
        partial (`Path`): beside it, for unfinished work; inside it where nothing can be renamed to `path`.

    Raises:
        FolderError: another command is at work; names process, machine, command and time. Or `path` is a file.
    """

    def __init__(self, path: str | Path, launch: str | None = None):
        self.path = Path(os.path.realpath(path))
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise FolderError(f"{path} is a file, or a link that leads to itself: choose another --output_dir")
        beside = self.path.parent
        # A mount point can't be replaced, nor can a folder whose parent we may not write to.
        self.inside = self.path.is_dir() and (os.path.ismount(self.path) or not os.access(beside, os.W_OK))
        self.partial = self.path / ".partial" if self.inside else beside / f"{self.path.name}.partial"
        self._lock_path = self.path / ".lock" if self.inside else beside / f".{self.path.name}.lock"
        self._lock_path.parent.mkdir(parents=True, exist_ok=True)
        self._launch = launch
        self._lock = self._acquire()

    def _acquire(self) -> Any:
        deadline = time.monotonic() + _SHORT_WAIT
        while True:
            file = self._lock_path.open("a+b")
            _open_locks.add(file)
            self.first = _try_lock(file, fcntl.LOCK_EX)
            if self.first and _same_file(file, self._lock_path):
                self._write_record(file)
                return file
            holder = _read_record(self._lock_path)
            ours = self._launch is not None and holder["launch"] == self._launch
            if not self.first and ours and _try_lock(file, fcntl.LOCK_SH) and _same_file(file, self._lock_path):
                return file
            file.close()
            if not self.first and not ours and time.monotonic() > deadline:
                raise FolderError(
                    f"another command is at work in {self.path}: pid {holder['pid']} on {holder['host']} since "
                    f"{holder['since']}: {holder['command']}: wait for it, or stop it"
                )
            time.sleep(0.02)

    def _write_record(self, file: Any) -> None:
        record = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        record |= {"command": shlex.join(sys.argv), "launch": self._launch}
        with contextlib.suppress(OSError):  # a full disk: it still locks, others learn less
            file.truncate(0)
            file.write(json.dumps(record).encode())
            file.flush()

    def share(self) -> None:
        """Let the other processes of this launch in."""
        if self._launch is not None and self.first and not _try_lock(self._lock, fcntl.LOCK_SH):
            raise FolderError(f"another command has taken {self.path} at this very moment: run this again")

    def close(self) -> None:
        """Let others in."""
        if not self._lock.closed:
            # The last one tidies up; whoever has opened the file meanwhile sees that it is gone, and makes another.
            if _try_lock(self._lock, fcntl.LOCK_EX) and _same_file(self._lock, self._lock_path):
                self._lock_path.unlink()
            self._lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def begin(self, work: dict[str, Any], overwrite: bool) -> None:
        """Make `partial`, or continue it: its manifest.json says what is being made.

        Raises:
            FolderError: unfinished work of something else is there (unless `overwrite`), or what we never made.
        """
        manifest = self.partial / "manifest.json"
        if not is_free(self.partial):
            found = self.unfinished()
            if found is None:
                raise FolderError(f"{self.partial} is in the way, and was not made by data_prep/: move it elsewhere")
            if found == work:
                return
            if not overwrite:
                raise belongs_to_another(self.partial, "unfinished run", found, work)
            self.discard()
        self.partial.mkdir(parents=True, exist_ok=True)
        delete_leftovers(self.partial)
        write_whole(manifest, json.dumps(work, indent=2))

    def unfinished(self) -> dict[str, Any] | None:
        """What `partial` is the beginning of; None if we never made one."""
        found = read_json(self.partial / "manifest.json")
        return found if found is not None and found.keys() >= {"format", "source"} else None

    def discard(self) -> None:
        """Delete our unfinished work; its manifest goes last, so that a kill in between leaves it ours."""
        for name in ("episodes", "final"):
            if (self.partial / name).exists():
                shutil.rmtree(self.partial / name)
        delete_leftovers(self.partial)
        (self.partial / "manifest.json").unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody keeps something there
            self.partial.rmdir()

    def publish(self) -> None:
        """Put `partial / "final"`, which is whole, in the place of `path`. What users kept in the old one stays."""
        (self.partial / "final").rename(self.partial / "whole")
        self.finish_publishing()

    def finish_publishing(self) -> None:
        """The rest of [`publish`] after a kill, if there was one."""
        if self.unfinished() is None:
            if self.partial.is_dir() and is_free(self.partial):  # a kill at the end of `discard`
                self.discard()
            return
        whole, replaced = self.partial / "whole", self.partial / "replaced"
        if whole.exists() and self.inside:
            if (whole / CONVERSION_NAME).exists() and (self.path / CONVERSION_NAME).exists():  # the old one's
                delete_claimed(self.path)
            move_files(whole, self.path)
        elif whole.exists():
            if self.path.exists():
                self.path.rename(replaced)
            whole.rename(self.path)
        elif not replaced.exists():
            return
        if replaced.exists():
            delete_claimed(replaced)
            move_files(replaced, self.path)
        self.discard()


def is_free(folder: Path) -> bool:
    """Whether a folder is absent, or holds nothing but what a killed command of ours or an empty disk leaves."""
    if not folder.exists():
        return True
    if not folder.is_dir():
        return False
    names = (path.name for path in folder.iterdir())
    return all(name in _NOT_OURS_TO_MIND or re.fullmatch(r"\..+\.\d+\.partial", name) for name in names)


def belongs_to_another(folder: Path, what: str, found: dict[str, Any], wanted: dict[str, Any]) -> FolderError:
    """The one way to say that a folder is taken: the first settings in which two records differ."""
    changed = list(differences(found, wanted))
    shown = ", ".join(changed[:3]) or "settings that this version does not know"
    return FolderError(
        f"{folder} belongs to another {what} ({shown}{', …' if len(changed) > 3 else ''}): choose another "
        "--output_dir, or --overwrite to start again"
    )


def differences(found: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """What two records disagree in, such as "config.num_bins: 511 there, 255 here"."""
    for name in sorted(found.keys() | wanted.keys()):
        there, here = found.get(name), wanted.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            yield from differences(there, here, f"{prefix}{name}.")
        elif there != here:
            yield f"{prefix}{name}: {str(there)[:60]} there, {str(here)[:60]} here"


def checkpoints(output_dir: Path) -> list[Path]:
    """A run's folders checkpoint-N, the newest first, whole or not; other names are not ours."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest whole checkpoint-N of a run."""
    return next((path for path in checkpoints(output_dir) if damage(path) is None), None)


def _try_lock(file: Any, how: int) -> bool:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _same_file(file: Any, path: Path) -> bool:
    """Whether an open file is still what its name leads to: the holder before us may have deleted it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _read_record(lock_path: Path) -> dict[str, Any]:
    unknown = dict.fromkeys(("pid", "host", "since", "command"), "unknown")
    return unknown | {"launch": None} | (read_json(lock_path) or {})


# A forked child, such as a data loader's worker, must not keep the lock of a parent that was killed.
_open_locks: weakref.WeakSet[Any] = weakref.WeakSet()
os.register_at_fork(after_in_child=lambda: [file.close() for file in list(_open_locks)])
