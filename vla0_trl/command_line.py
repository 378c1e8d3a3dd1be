"""The command line of every script: a dataclass of fields, set by flags and by `--config YAML`, read by TRL's parser.

Nothing here imports torch or transformers, and a script imports what it runs after it has parsed: `--help` and a
mistake in a flag are answered at once.
"""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, field, fields
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from trl import TrlParser

from vla0_trl.limits import check_limits
from vla0_trl.schema import checked, parse_yaml, short
from vla0_trl.streams import prepare_streams

T = TypeVar("T")
_FILES = {"json", "png", "trace"}  # fields: files that a script writes when its work is done


def option(default: Any = MISSING, help: str = "", **argparse_options: Any) -> Any:
    """A field of a script's dataclass. Without a default it must be given; `argparse_options` go to `add_argument`."""
    metadata = {"help": help, **argparse_options}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def parse(arguments: type[T], description: str, words: list[str] | None = None) -> T:
    """A script's arguments, from `words` or the command line; mistakes end the program with one line, status 2."""
    return ScriptParser(arguments, description).parse(words)[0]


class ScriptParser(TrlParser):
    """TRL's parser for one dataclass; `add_argument` adds what is not a field, such as file names.

    A boolean field can be set by `--name`, `--name true`, `--name false` and `--no-name`.
    """

    def __init__(self, arguments: type, description: str):
        super().__init__(arguments, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        for action in self._actions:
            if action.const is False:  # TRL's --no_name, which it describes with the words of --name
                action.help = f"the same as --{action.dest} false"
        for name, kind in get_type_hints(arguments).items():
            if bool in (kind, *get_args(kind)) and "_" in name:
                hidden = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
                self.add_argument(f"--no-{name}", dest=name, action="store_false", **hidden)
        self.add_argument("--config", metavar="YAML", help="a file with any of these settings; flags win")

    def parse(self, words: list[str] | None = None, unknown_allowed: bool = False):
        """`(arguments, others as a namespace, unknown words)`; ends the program where unknown ones aren't allowed."""
        if words is None:
            prepare_streams()
        words = separated(sys.argv[1:] if words is None else words)
        try:
            config = next((Path(path) for flag, path in pairwise(words) if flag == "--config"), None)
            words = (self._words_of(config) if config else []) + words
            arguments, others, unknown = self.parse_args_into_dataclasses(words, return_remaining_strings=True)
            check_limits(vars(arguments) | vars(others))
            for name in _FILES & vars(arguments).keys():
                _check_writable(name, getattr(arguments, name))
        except (ValueError, OSError) as error:
            self.error(str(error))
        if unknown and not unknown_allowed:
            self.error(unknown_flag(unknown[0], {f.name for f in fields(arguments)}))
        return arguments, others, unknown

    def _words_of(self, config: Path) -> list[str]:
        """A YAML's settings as the command line would give them, which checks them alike; `env` sets variables."""
        settings = checked(str(config), parse_yaml(str(config), config.read_bytes()), {})
        variables = settings.pop("env", {})
        if not isinstance(variables, dict):
            raise ValueError(f"{config}: env is {short(variables)}, wanted an object with fields")
        os.environ.update({str(name): str(value) for name, value in variables.items()})
        takes_list = {action.dest: action.nargs in ("+", "*") for action in self._actions}
        words = []
        for name, value in settings.items():
            if name not in takes_list:
                raise ValueError(unknown_flag(str(name), takes_list))
            if value is None or value == []:  # not set
                continue
            values = value if isinstance(value, list) and takes_list[name] else [value]
            if not all(isinstance(value, str | int | float | date) for value in values):
                raise ValueError(f"{config}: {name} is {short(value)}, wanted what --{name} takes")
            texts = [str(value).lower() if isinstance(value, bool) else str(value) for value in values]
            words += [f"--{name}", *texts] if takes_list[name] else [f"--{name}={texts[0]}"]
        return [*words, "--config", str(config)]  # so that a list ends

    def error(self, message: str) -> None:
        """One line, exit status 2."""
        self.exit(2, f"error: {message}\n")


def _check_writable(name: str, path: Path | None) -> None:
    """`ValueError` for a file that can't be written: found before the work of which it takes the result."""
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise ValueError(f"--{name} {path} can't be written: name a file in a folder that exists")


def unknown_flag(word: str, names: Collection[str]) -> str:
    """What to say of a word that is not a flag, with the one that it resembles."""
    close = difflib.get_close_matches(word.lstrip("-").replace("-", "_"), names, n=1)
    return f"unknown argument {word}" + (f": did you mean --{close[0]}?" if close else " (--help lists all)")


def separated(words: list[str]) -> list[str]:
    """Words as TRL's parser takes them.

    It knows `--config FILE` but not `--config=FILE`, and argparse takes a value such as `-1,1` or `-1e-3` for a flag
    unless "=" joins the two.
    """
    result: list[str] = []
    for word in words:
        if word.startswith("--config="):
            result += word.split("=", 1)
        elif re.match(r"-([\d.]+[,e]|inf|nan)", word, re.IGNORECASE) and result and result[-1].startswith("--"):
            result[-1] += f"={word}"
        else:
            result.append(word)
    return result


def as_flags(arguments: Any, leave_out: Collection[str] = ()) -> list[list[str]]:
    """`[flag, value …]` of each field that differs from its default."""
    flags = []
    for f in fields(arguments):
        value = getattr(arguments, f.name)
        default = f.default if f.default_factory is MISSING else f.default_factory()
        if f.name in leave_out or value == default:
            continue
        values = {True: [], False: ["false"]}[value] if isinstance(value, bool) else value
        flags.append([f"--{f.name}", *map(str, values if isinstance(values, list) else [values])])
    return flags


@contextmanager
def user_errors() -> Iterator[None]:
    """Errors that a user can fix (`ValueError`, `OSError`): one line on stderr, and exit status 2."""
    try:
        yield
    except BrokenPipeError:  # see `streams`
        raise
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
