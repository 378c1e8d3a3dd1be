"""What the fields of a LeRobotDataset's `meta/` may be. A wrong one is one line: file, field, found, wanted.

A kind reads one value: it gives it as the type that we go on with, or raises `ValueError` with what it wanted. An
absent field reads as null.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from vla0_trl.data.staging import ConversionError

Kind = Callable[[Any], Any]


def whole(value: Any) -> int:
    """0, 1, 2, …; pandas writes whole numbers as floats where others of the column are null."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value % 1 != 0:
        raise ValueError("a whole number")
    return int(value)


def seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("a number")
    return float(value)


def positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError("a number above 0")
    return value


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("text")
    return value


def mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("an object with fields")
    return value


def shape(value: Any) -> list[int]:
    """`[7]`, `7` and `[]` are vectors; so are `[1, 7]` and the like where a vector is wanted."""
    try:
        return [whole(size) for size in (value if isinstance(value, list | tuple) else [value])]
    except ValueError as error:
        raise ValueError("a list of whole numbers") from error


def texts(value: Any) -> list[str]:
    """What there is of text. Nothing is decided by it alone, so that nothing is wrong."""
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str) and item.strip()]


def optional(kind: Kind, default: Any = None) -> Kind:
    """`default` for null."""
    return lambda value: default if value is None else kind(value)


def features(value: Any) -> dict[str, dict[str, Any]]:
    """Name -> {dtype, shape, …}."""
    if not isinstance(value, dict) or not value:
        raise ValueError("an object with a feature or more")
    return value


INFO = {
    "codebase_version": text,
    "fps": positive,
    "features": features,
    "data_path": text,
    "video_path": optional(text),
    "chunks_size": optional(whole, 1000),
    "robot_type": optional(str, "unknown"),
    "total_episodes": optional(whole),
}
FEATURE = {"dtype": text, "shape": shape, "info": optional(mapping, {}), "video_info": optional(mapping, {})}
TASK = {"task_index": whole, "task": optional(text, "")}
EPISODE = {"episode_index": whole, "length": whole, "tasks": texts}
EPISODE_STATS = {"episode_index": whole, "stats": optional(mapping, {})}
DATA_FILE = {"data/chunk_index": whole, "data/file_index": whole}
VIDEO_FILE = {"chunk_index": whole, "file_index": whole, "from_timestamp": seconds, "to_timestamp": seconds}


def checked(where: str, found: Any, kinds: dict[str, Kind]) -> dict[str, Any]:
    """A record with the fields of `kinds` read; others stay as they are.

    Args:
        where (`str`): the file, and the record in it.

    Raises:
        ConversionError: the first field that is none of its kind.
    """
    if not isinstance(found, dict):
        raise ConversionError(f"{where}: found {_short(found)}, wanted an object with fields: fetch the file again")
    record = dict(found)
    for name, kind in kinds.items():
        try:
            record[name] = kind(found.get(name))
        except ValueError as error:
            there = _short(found[name]) if name in found else "absent"
            raise ConversionError(
                f"{where}: {name} is {there}, wanted {error}: correct it, or fetch the file again"
            ) from error
    return record


def filled(where: str, name: str, template: str | None, **numbers: Any) -> str:
    """A path that info.json gives as a template.

    Raises:
        ConversionError: it is null, or has other fields than `numbers`.
    """
    try:
        return text(template).format(**numbers)
    except (ValueError, KeyError, IndexError) as error:
        fields = ", ".join(f"{{{number}}}" for number in numbers)
        raise ConversionError(f"{where}: {name} is {_short(template)}, wanted a path with {fields}") from error


def _short(value: Any) -> str:
    return "null" if value is None else repr(value)[:60]
