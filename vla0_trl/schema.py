"""What the fields of a file from outside may be. A wrong one is one line: file, field, found, wanted.

A kind reads one value: it gives it as the type that we go on with, or raises `ValueError` with what it wanted. An
absent field reads as null.
"""

from __future__ import annotations

import json
import reprlib
import sys
from collections.abc import Callable
from functools import cache
from numbers import Real
from pathlib import Path
from types import UnionType
from typing import Any

Kind = Callable[[Any], Any]
Kinds = dict[str, Kind]

_MAX_BYTES = 64 << 20  # of a file that is read at once; ours are a few kilobytes
_FIX = "correct it, or get the file again"
_SHOWN = reprlib.Repr()  # of a YAML whose lists hold each other, `repr` would never end
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 60


def whole(value: Any) -> int:
    """0, 1, 2, …; pandas writes whole numbers as floats where others of the column are null."""
    if not is_number(value) or value < 0 or value % 1 != 0:
        raise ValueError("a whole number")
    return int(value)


def between(low: float, high: float) -> Kind:
    """A whole number within limits, both included."""

    def kind(value: Any) -> int:
        if not is_number(value) or value % 1 != 0 or not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return int(value)

    return kind


def number(value: Any) -> float:
    if not is_number(value):
        raise ValueError("a number")
    return float(value)


def numeric(holds: Callable[[float], bool], wanted: str) -> Kind:
    """A number for which a condition holds, as it is."""

    def read(value: Any) -> float:
        if not is_number(value) or not holds(value):
            raise ValueError(wanted)
        return value

    return read


positive = numeric(lambda value: value > 0, "a number above 0")
share = numeric(lambda value: 0 <= value <= 1, "a number from 0 to 1")
positive_share = numeric(lambda value: 0 < value <= 1, "a number above 0, at most 1")
not_negative = numeric(lambda value: value >= 0, "a number from 0")


def instance(of: type | UnionType, wanted: str) -> Kind:
    """A value of a type, as it is."""

    def read(value: Any) -> Any:
        if not isinstance(value, of):
            raise ValueError(wanted)
        return value

    return read


boolean = instance(bool, "true or false")
text = instance(str, "text")
mapping = instance(dict, "an object with fields")


def line_of_text(value: Any) -> str:
    """Text that stays in its line, whatever it is written into."""
    if not isinstance(value, str) or not value.strip() or not value.isprintable() or len(value) > 1000:
        raise ValueError("a line of text")
    return value


def items(kind: Kind, least: int = 0, most: int = 1_000_000) -> Kind:
    """A list of `least` to `most` values of a kind."""

    def read(value: Any) -> list[Any]:
        size = f"{least} to {most} values" if least != most else f"{least} values"
        if not isinstance(value, list | tuple) or not least <= len(value) <= most:
            raise ValueError(f"a list of {size}")
        try:
            return [kind(item) for item in value]
        except ValueError as error:
            raise ValueError(f"a list of {size}, each {error}") from error

    return read


def optional(kind: Kind, default: Any = None) -> Kind:
    """`default` for null."""
    return lambda value: default if value is None else kind(value)


def each(kind: Kind, most: int = 1_000_000) -> Kind:
    """An object whose values, at most `most`, are of one kind."""

    def read(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or len(value) > most or not all(isinstance(name, str) for name in value):
            raise ValueError(f"an object with at most {most} names")
        try:
            return {name: kind(item) for name, item in value.items()}
        except ValueError as error:
            raise ValueError(f"an object whose values are {error}") from error

    return read


def mistakes(found: dict[str, Any], kinds: Kinds) -> list[str]:
    """A line for each field that is not of its kind: "fps is 'x', wanted a number above 0"."""
    lines = []
    for field, kind in kinds.items():
        try:
            kind(found.get(field))
        except ValueError as error:
            there = short(found[field]) if field in found else "absent"
            lines.append(f"{field} is {there}, wanted {error}")
    return lines


def checked(where: str, found: Any, kinds: Kinds, fix: str = _FIX) -> dict[str, Any]:
    """A record with the fields of `kinds` read; others stay as they are.

    `ValueError` has a line for each field that is not of its kind: `where`, the mistake, and the `fix`.
    """
    if not isinstance(found, dict):
        raise ValueError(f"{where}: found {short(found)}, wanted an object with fields: {fix}")
    if lines := mistakes(found, kinds):
        raise ValueError("\n".join(f"{where}: {line}: {fix}" for line in lines))
    return found | {field: kind(found.get(field)) for field, kind in kinds.items()}


def read_record(path: Path, kinds: Kinds) -> dict[str, Any]:
    """A JSON file (or, by its name, a YAML) that holds an object, checked; `ValueError` for what is wrong."""
    if not path.is_file():
        raise ValueError(f"{path}: is not a file")
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path}: has {path.stat().st_size} bytes, wanted at most {_MAX_BYTES}: is it the file?")
    parse = parse_yaml if path.suffix in (".yaml", ".yml") else parse_json
    return checked(str(path), parse(str(path), path.read_bytes()), kinds)


def read_if_whole(path: Path, kinds: Kinds, loss: str) -> dict[str, Any] | None:
    """A record that its reader can do without: None if it is absent; if it is damaged, a warning names the `loss`."""
    if not path.exists():
        return None
    try:
        return read_record(path, kinds)
    except (ValueError, OSError) as error:
        warn_once(f"{one_line(error, 1000)}; {loss}")
        return None


@cache
def warn_once(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


def parse_json(where: str, data: str | bytes) -> Any:
    """What JSON says, however damaged or deep: `ValueError` in one line."""
    return _parsed(where, data, json.loads, "JSON")


def parse_yaml(where: str, data: str | bytes) -> Any:
    """The same of YAML."""
    import yaml  # here, because a robot's client imports this file, and needs no PyYAML

    return _parsed(where, data, yaml.safe_load, "YAML", yaml.YAMLError)


def _parsed(where: str, data: str | bytes, parse: Callable, form: str, *errors: type[Exception]) -> Any:
    try:
        return parse(data)
    except RecursionError as error:
        raise ValueError(f"{where}: is nested too deep: {_FIX}") from error
    except (*errors, ValueError, TypeError, LookupError) as error:  # PyYAML raises all of these
        raise ValueError(f"{where}: is not {form} ({one_line(error, 200)}): {_FIX}") from error


def one_line(text: object, longest: int = 500) -> str:
    """A text as messages quote it: without line breaks and control characters, cut where it is longer."""
    printable = "".join(char if char.isprintable() else " " for char in str(text)[: 4 * longest])
    words = " ".join(printable.split())
    return words if len(words) <= longest else words[: longest - 1] + "…"


def short(value: Any) -> str:
    """A value as messages show it."""
    return "null" if value is None else _SHOWN.repr(value)[:60]


def is_number(value: Any) -> bool:
    """Whether it is a finite number that fits a float; true and false are not."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    return abs(value) <= 1e300  # neither nan, nor a whole number that no float holds
