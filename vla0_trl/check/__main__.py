"""Tell what will work on this machine, and how to mend what won't. Exit status 1 if anything fails.

    python -m vla0_trl.check                         # everything, in about a minute
    python -m vla0_trl.check gpu disk                # only these
    python -m vla0_trl.check --json > check.json     # the same for programs; the lines go to stderr

A warning means: something optional won't work, or not as it was tested.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from vla0_trl import __version__
from vla0_trl.check.checks import CHECKS
from vla0_trl.check.process import FAILURE, OK, WARNING, run_probe
from vla0_trl.streams import prepare_streams

_COLORS = {OK: "32", WARNING: "33", FAILURE: "31"}  # ANSI: green, yellow, red
_INDENT = " " * 9  # of a status and a space
_WIDTH = 119


@dataclass(frozen=True)
class Result:
    """A check's outcome: `status` is "ok", "warning" or "failure"; `fix` says how to mend it, empty if all is well."""

    name: str
    title: str
    status: str
    text: str
    fix: str
    seconds: float


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
    results = []
    try:
        for name in args.names or CHECKS:
            with progress(CHECKS[name].title, stream):
                result = run_check(name, args.output_dir, args.timeout)
            if result is not None:
                print(line(result, stream.isatty() and "NO_COLOR" not in os.environ), file=stream, flush=True)
                results.append(result)
    except KeyboardInterrupt:
        sys.exit(130)
    counts = {status: sum(result.status == status for result in results) for status in _COLORS}
    print(", ".join(f"{status} {count}" for status, count in counts.items()), file=stream)
    if args.json:
        print(json.dumps({"ok": not counts[FAILURE], "version": __version__, "checks": list(map(asdict, results))}))
    sys.exit(1 if counts[FAILURE] else 0)


def run_check(name: str, output_dir: Path, timeout: float) -> Result | None:
    """One check; None if there is nothing to check, because an optional part isn't installed."""
    check, begin = CHECKS[name], time.perf_counter()
    finding = run_probe(name, check.fix, output_dir, timeout)
    if finding is None:
        return None
    return Result(name, check.title, *finding, round(time.perf_counter() - begin, 2))


def line(result: Result, color: bool) -> str:
    """The line of a result, and below it what to do."""
    status = f"{result.status:8}"
    if color:
        status = f"\033[{_COLORS[result.status]}m{status}\033[0m"
    text = [f"{status} {result.title}: {result.text}"]
    if result.fix:
        text += textwrap.wrap(
            f"→ {result.fix}",
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
