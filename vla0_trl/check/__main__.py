"""Tell what will work on this machine, and how to fix what won't. Exit status 1 if anything fails.

    python -m vla0_trl.check                         # everything, in about a minute
    python -m vla0_trl.check gpu disk                # only these
    python -m vla0_trl.check --json > check.json     # the same for programs; the lines go to stderr

A warning means: something optional won't work, or not as it was tested.
"""

import argparse
import json
import os
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from vla0_trl import __version__
from vla0_trl.check.checks import CHECKS
from vla0_trl.check.process import FAILURE, OK, WARNING, Finding, run_probe
from vla0_trl.streams import prepare_streams

_COLORS = {OK: "32", WARNING: "33", FAILURE: "31"}  # ANSI: green, yellow, red
_INDENT = " " * 9  # of a status and a space
_WIDTH = 119


def main() -> None:
    """Run the checks that the command line names; exit with 0 or 1."""
    prepare_streams()
    parser = argparse.ArgumentParser(
        prog="python -m vla0_trl.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"only these: {', '.join(CHECKS)} (default: all)")
    parser.add_argument("--json", action="store_true", help="write one JSON object to stdout, and the lines to stderr")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs"), help="where checkpoints will go (default: %(default)s)"
    )
    parser.add_argument("--timeout", type=float, default=180, help="seconds for each check (default: %(default)g)")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in CHECKS]
    if unknown:
        parser.error(f"there is no check {unknown[0]!r}; there are {', '.join(CHECKS)}")
    stream = sys.stderr if args.json else sys.stdout
    print(f"vla0_trl {__version__}, Python {sys.version.split()[0]}", file=stream, flush=True)
    color, results = stream.isatty() and "NO_COLOR" not in os.environ, []
    try:
        for name in args.names or CHECKS:
            check, begin = CHECKS[name], time.perf_counter()
            with progress(check.title, stream):
                found = run_probe(name, check.fix, args.output_dir, args.timeout)
            if found is not None:
                print(line(check.title, found, color), file=stream, flush=True)
                seconds = round(time.perf_counter() - begin, 2)
                results.append({"name": name, "title": check.title, **found._asdict(), "seconds": seconds})
    except KeyboardInterrupt:
        sys.exit(130)
    counts = {status: sum(result["status"] == status for result in results) for status in _COLORS}
    print(", ".join(f"{status} {count}" for status, count in counts.items()), file=stream)
    if args.json:
        print(json.dumps({"ok": not counts[FAILURE], "version": __version__, "checks": results}))
    sys.exit(1 if counts[FAILURE] else 0)


def line(title: str, found: Finding, color: bool) -> str:
    """The line of a check, and below it what to do."""
    status = f"{found.status:8}"
    if color:
        status = f"\033[{_COLORS[found.status]}m{status}\033[0m"
    text = [f"{status} {title}: {found.text}"]
    if found.fix:
        text += textwrap.wrap(
            f"→ {found.fix}",
            _WIDTH,
            initial_indent=_INDENT,
            subsequent_indent=f"{_INDENT}  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(text)


@contextmanager
def progress(title: str, stream: TextIO) -> Iterator[None]:
    """On a terminal, show what is being checked for as long as it takes."""
    if stream.isatty():
        print(f"{_INDENT}{title} …", end="", file=stream, flush=True)
    try:
        yield
    finally:
        if stream.isatty():
            print("\r\033[K", end="", file=stream, flush=True)


if __name__ == "__main__":
    main()
