"""What a program reads and prints is UTF-8, and readers of its output may stop before its end."""

import atexit
import codecs
import errno
import locale
import os
import select
import signal
import sys
from typing import Any

_STDOUT = 1
_ended_by: list[BaseException] = []  # writes whose reader had gone
_said: list[BaseException] = []  # printed as one line


def prepare_streams() -> None:
    """What every script does first, so that neither locale nor reader of its output can end it in the middle.

    Where the locale is not UTF-8, the program starts again in Python's UTF-8 mode: libraries open files by the
    locale. A reader that has gone (`… | head`) ends it as usual tools end: without a traceback, by SIGPIPE. A full
    disk, and a file that can't be read or written, is one line. Streams that are closed (`>&-`) become /dev/null:
    one of our files would get their number, and all that libraries print.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, os.fdopen(number, "w" if number else "r"))
    if codecs.lookup(locale.getencoding()).name != "utf-8" and not sys.flags.utf8_mode:
        words = [sys.executable, "-X", "utf8", *sys.orig_argv[1:]]
        os.execve(sys.executable, words, os.environ | {"PYTHONUTF8": "1"})
    if sys.excepthook is not _unless_nobody_reads:
        sys.excepthook = _unless_nobody_reads
        atexit.register(_end_if_nobody_reads)  # the first one is called last


def _nobody_reads() -> bool:
    poll = select.poll()
    poll.register(_STDOUT, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _unless_nobody_reads(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if issubclass(kind, BrokenPipeError) and _nobody_reads():
        _ended_by.append(error)
    elif isinstance(error, OSError) and (error.errno == errno.ENOSPC or error.filename is not None):
        print(f"error: {error}", file=sys.stderr)
        _said.append(error)
    else:
        sys.__excepthook__(kind, error, trace)


def _end_if_nobody_reads() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError as error:
        _ended_by.append(error)
    except OSError as error:
        if not _said:
            print(f"error: what was printed can't be written: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    if _ended_by:
        os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGPIPE)
