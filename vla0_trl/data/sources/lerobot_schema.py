"""What the fields of a LeRobotDataset's `meta/` may be. A wrong one is one line: file, field, found, wanted.

Kinds are explained in `vla0_trl.schema`.
"""

import re
from typing import Any

from vla0_trl.data.staging import ConversionError
from vla0_trl.schema import line_of_text, mapping, number, optional, positive, short, text, whole

_MAX_WIDTH = 20  # of a number in a path's template
_MAX_NAME = 255  # bytes of a file's name, on Linux


def shape(value: Any) -> list[int]:
    """`[7]`, `7` and `[]` are vectors; so are `[1, 7]` and the like where a vector is wanted."""
    try:
        return [whole(size) for size in (value if isinstance(value, list | tuple) else [value])]
    except ValueError as error:
        raise ValueError("a list of whole numbers") from error


def texts(value: Any) -> list[str]:
    """The text that is there. Nothing is decided by it alone, so nothing is an error."""
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str) and item.strip()]


def features(value: Any) -> dict[str, dict[str, Any]]:
    """Name -> {dtype, shape, …}."""
    if not isinstance(value, dict) or not value:
        raise ValueError("an object with a feature or more")
    return value


INFO = {
    "codebase_version": text,
    "fps": positive,
    "features": features,
    "data_path": line_of_text,
    "video_path": optional(line_of_text),
    "chunks_size": optional(whole, 1000),
    "robot_type": optional(lambda value: str(value)[:200], "unknown"),
    "total_episodes": optional(whole),
}
FEATURE = {"dtype": text, "shape": shape, "info": optional(mapping, {}), "video_info": optional(mapping, {})}
TASK = {"task_index": whole, "task": optional(text, "")}
EPISODE = {"episode_index": whole, "length": whole, "tasks": texts}
EPISODE_STATS = {"episode_index": whole, "stats": optional(mapping, {})}
DATA_FILE = {"data/chunk_index": whole, "data/file_index": whole}
VIDEO_FILE = {"chunk_index": whole, "file_index": whole, "from_timestamp": number, "to_timestamp": number}


def filled(where: str, name: str, template: str | None, **numbers: Any) -> str:
    """A path that info.json gives as a template, inside the dataset's folder.

    `ConversionError`: it is null, has other fields than `numbers` or other formats than a width, or leads outside.
    """
    fields = ", ".join(f"{{{number}}}" for number in numbers)
    wanted = ConversionError(f"{where}: {name} is {short(template)}, wanted a path with {fields}, inside the dataset")
    try:
        widths = [int(width) for width in re.findall(r"\{\w+:(\d+)d?\}", text(template))]
        # `format` would also look into attributes, and write as many zeros as a template asks for.
        if re.search(r"\{(?!\w+(:\d+d?)?\})", template) or max(widths, default=0) > _MAX_WIDTH:
            raise wanted
        path = template.format(**numbers)
    except (ValueError, KeyError, IndexError) as error:
        raise wanted from error
    if (
        max(map(len, path.split("/"))) > _MAX_NAME
        or path.startswith("/")
        or ".." in path.split("/")
        or not path.isprintable()
    ):
        raise wanted
    return path
