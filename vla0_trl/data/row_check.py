"""All rows of a chat dataset are looked at before training starts: column by column, images by their headers alone."""

import warnings
from collections.abc import Iterator

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Image

from vla0_trl.config import VLAConfig
from vla0_trl.data.episodes import IMAGE_ENDS, IMAGE_FORMATS, MAX_PIXELS, size_mistake
from vla0_trl.files import DAMAGED_IMAGE
from vla0_trl.processing.chat import task_mistake
from vla0_trl.processing.collator import VLADataCollator
from vla0_trl.schema import one_line

_TAIL = 64  # bytes, in which a whole image file has its end
_BATCH = 10_000  # rows
_COLUMNS = ("images", "task", "state", "action", "raw_state", "raw_action", "episode_index", "frame_index")
_FIX = "repair the row, or convert the episodes again"


def check_rows(name: str, dataset: Dataset, config: VLAConfig) -> None:
    """Check what does not depend on a model: presence, widths, finite numbers, integers in range, task, images.

    `ValueError` names the first row that can't be trained on, the column, what was found and what is wanted.
    """
    _check_types(name, dataset.select_columns(list(_COLUMNS)).features.arrow_schema)
    known: set[str] = set()
    sizes: dict[int, tuple[int, int]] = {}  # of each camera's images
    start = 0
    for rows in dataset.select_columns(list(_COLUMNS)).with_format("arrow").iter(_BATCH):
        for column, bad, wanted in _mistakes(rows, config, known, sizes):
            if len(bad):
                row = int(bad[0])
                raise ValueError(f"{_place(name, rows, row, start)}: {column} {wanted}: {_FIX}")
        start += len(rows)


def check_tasks(name: str, dataset: Dataset, collator: VLADataCollator, max_tokens: int) -> None:
    """`ValueError` for the first task that holds a special token of the processor, or makes rows too long for it."""
    tasks = dataset.select_columns("task").unique("task")
    longest_rest = collator.longest_text("task")
    for task in tasks:
        mistake = task_mistake(task, collator.chat_tokenizer.special_tokens)
        # No tokenizer makes more tokens of a text than it has bytes, so that few tasks have to be counted.
        if mistake is None and longest_rest + len(task.encode()) > max_tokens:
            length = collator.longest_text(task)
            if length > max_tokens:
                mistake = f"makes {length} tokens with image and answer, and the model reads {max_tokens}"
        if mistake is not None:
            column = dataset.select_columns(["task", "episode_index", "frame_index"]).with_format("arrow")[:]
            row = pc.index(column["task"], task).as_py()
            raise ValueError(f"{_place(name, column, row, 0)}: task {mistake}: {_FIX}")


def _check_types(name: str, schema: pa.Schema) -> None:
    types = pa.types
    wanted = {
        "images": ("a list of images", lambda t: types.is_list(t) and t.value_type == Image().pa_type),
        **dict.fromkeys(
            ("task", "state", "action"), ("text", lambda t: types.is_string(t) or types.is_large_string(t))
        ),
        **dict.fromkeys(
            ("raw_state", "raw_action"),
            ("a list of numbers", lambda t: types.is_list(t) and types.is_floating(t.value_type)),
        ),
        **dict.fromkeys(("episode_index", "frame_index"), ("whole numbers", types.is_integer)),
    }
    for column, (words, fits) in wanted.items():
        if not fits(schema.field(column).type):
            raise ValueError(f"{name}: column {column} is of {schema.field(column).type}, wanted {words}: {_FIX}")


def _mistakes(
    rows: pa.Table, config: VLAConfig, known: set[str], sizes: dict[int, tuple[int, int]]
) -> Iterator[tuple[str, np.ndarray, str]]:
    """(column, indices of bad rows, what is wrong), each column's null values first.

    `known` tasks are those of earlier rows, `sizes` those of each camera.
    """
    for column in _COLUMNS:
        yield column, _where(pc.is_null(rows[column])), "is null"
    for column, size in (
        ("images", len(config.cameras)),
        ("raw_state", config.state_dim),
        ("raw_action", config.chunk_size * config.action_dim),
    ):
        lengths = pc.list_value_length(rows[column]).to_numpy()
        bad = np.flatnonzero(lengths != size)
        found = f"has {lengths[bad[0]]} values, wanted {size}" if len(bad) else ""
        yield column, bad, found
    for column in ("episode_index", "frame_index"):
        numbers = rows[column].to_numpy()
        yield column, np.flatnonzero((numbers < 0) | (numbers >= 2**62)), "is negative, or too large"
    files = pc.struct_field(rows["images"].combine_chunks().flatten(), "bytes")
    outside = np.flatnonzero(pc.is_null(files).to_numpy(zero_copy_only=False))
    yield "images", outside // len(config.cameras), "holds a path in place of an image: embed it"
    for place, file in enumerate(files):
        row, camera = divmod(place, len(config.cameras))
        try:
            size = image_size(file.as_buffer())
            if sorted(size) != sorted(sizes.setdefault(camera, size)):  # EXIF data may turn some of them
                first = "×".join(map(str, sizes[camera]))
                raise ValueError(f"holds an image of {size[0]}×{size[1]} pixels, that of the first row has {first}")
        except ValueError as error:
            yield "images", np.array([row]), str(error)
    for column in ("raw_state", "raw_action"):
        values = rows[column].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        bad = np.flatnonzero(~np.isfinite(values).reshape(len(rows), -1).all(1))
        yield column, bad, "holds a value that is not a finite number"
    for column, size in (("state", config.state_dim), ("action", config.num_values)):
        yield from _bad_integers(rows, column, size, config.num_bins)
    for task in set(pc.unique(rows["task"]).to_pylist()) - known:
        known.add(task)
        if mistake := task_mistake(task):
            yield "task", _where(pc.equal(rows["task"], task)), mistake


def image_mistake(file: pa.Buffer) -> str | None:
    """What keeps an image file from being read."""
    try:
        image_size(file)
    except ValueError as error:
        return str(error)
    return None


def image_size(file: pa.Buffer) -> tuple[int, int]:
    """Width and height; of a PNG or JPEG only header and end are looked at, other images are decoded.

    `ValueError` for one that can't be read.
    """
    try:
        with warnings.catch_warnings(action="ignore", category=PIL.Image.DecompressionBombWarning):
            image = PIL.Image.open(pa.BufferReader(file), formats=IMAGE_FORMATS)
        mistake = size_mistake(*image.size)
        if mistake is None and image.format not in IMAGE_ENDS:
            image.load()
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(f"holds an image of more than {MAX_PIXELS} pixels") from error
    except PIL.UnidentifiedImageError as error:
        raise ValueError(f"holds no image that can be read: wanted {', '.join(IMAGE_FORMATS)}") from error
    except DAMAGED_IMAGE as error:
        raise ValueError(f"holds no image that can be read ({one_line(error, 100)})") from error
    if mistake is not None:
        raise ValueError(f"holds an image of {mistake}")
    end = IMAGE_ENDS.get(image.format, b"")
    # The tail first: a dataset of gigabytes would otherwise be read whole before training starts.
    if end not in file.slice(max(0, file.size - _TAIL)).to_pybytes() and end not in file.to_pybytes():
        raise ValueError(f"holds a {image.format} that is cut off")
    return image.size


def _bad_integers(rows: pa.Table, column: str, size: int, num_bins: int) -> Iterator[tuple[str, np.ndarray, str]]:
    text = rows[column]
    if column == "state":  # may be left out
        text = text.filter(pc.not_equal(text, ""))
        if len(text) not in (0, len(rows)):
            yield column, _where(pc.equal(rows[column], "")), "is empty, and other rows have one"
        if not len(text):
            return
    yield column, _where(pc.invert(pc.match_substring_regex(text, r"^\d{1,9}( \d{1,9})*$"))), "is not integers"
    counts = pc.add(pc.count_substring(text, " "), 1).to_numpy()
    bad = np.flatnonzero(counts != size)
    yield column, bad, f"has {counts[bad[0]]} integers, wanted {size}" if len(bad) else ""
    integers = pc.split_pattern(text, " ").combine_chunks().flatten().cast(pa.int64()).to_numpy().reshape(-1, size)
    bad = np.flatnonzero((integers > num_bins).any(1))
    yield column, bad, f"holds an integer above num_bins={num_bins}"


def _where(mask: pa.ChunkedArray) -> np.ndarray:
    return np.flatnonzero(mask.to_numpy())


def _place(name: str, rows: pa.Table, row: int, start: int) -> str:
    episode, frame = (rows[column][row].as_py() for column in ("episode_index", "frame_index"))
    return f"{name}: row {start + row} (episode {episode}, frame {frame})"
