"""Episodes: what every converter reads, how it is checked, and the rows' columns before the text columns are added."""

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, Protocol

import numpy as np
from PIL import ExifTags, Image, ImageOps

from vla0_trl.config import VLAConfig
from vla0_trl.files import DAMAGED_IMAGE
from vla0_trl.processing.chat import task_mistake

# On one core, frames per second and bytes per frame: PushT's 96 px: level 2: 5,540 and 1,313, level 3: 5,430 and
# 1,261, the usual 6: 3,620 and 1,183. A noisy 256 px frame: 200 and 98 kB, 135 and 97 kB, 40 and 91 kB.
PNG_COMPRESS_LEVEL = 2
# What a video's frames become: 0.3 ms and 20 to 45 kB at 256 px. Colours keep their full resolution: the video has
# halved it once already.
JPEG_OPTIONS = {"quality": 95, "subsampling": "4:4:4"}
MAX_PIXELS = 1 << 24  # of a frame; 8K video has twice as many
MAX_ASPECT = 200  # longer side over shorter; Qwen's processor has the same limit
# What is read; Pillow knows many more, and runs Ghostscript for one of them.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
IMAGE_ENDS = {"PNG": b"IEND", "JPEG": b"\xff\xd9"}  # bytes that a file lacks if it is cut off
PIECE_FRAMES = 100  # of an episode in memory at once: 10 MB of two 256 px cameras as JPEG

ImageFormat = Literal["png", "jpeg"]


class EpisodeError(ValueError):
    """An episode that can't become training data; the message names the episode, the field, the frame and the fix."""


@dataclass
class Episode:
    """One demonstration of T frames.

    Args:
        task (`str`): the instruction.
        actions (`np.ndarray`): float32 (T, action_dim), absolute, in environment units; row t is what was done on
            seeing frame t. Or float32 (T, chunk_size, action_dim): a chunk for each frame, where a teacher labelled
            frames that do not follow each other.
        images (`dict[str, Iterable]`): camera -> T frames, each uint8 (H, W, 3) or the bytes of a PNG or JPEG, which
            go into the dataset untouched. They are read once, in order, all cameras in step: a source may decode them
            only then.
        states (`np.ndarray`, *optional*): float32 (T, state_dim), in environment units.
        name (`str`): where it is from, for messages: "pusht_cchi_v7_replay.zarr, episode 12".
    """

    task: str
    actions: np.ndarray
    images: dict[str, Iterable[np.ndarray | bytes]]
    states: np.ndarray | None = None
    name: str = "episode"


@dataclass
class SourceInfo:
    """Where episodes are from, for the dataset card, and so that a conversion never continues another one's.

    Args:
        revision (`str`): version or content hash of what is read.
        license (`str`): the Hub's identifier: "mit", "cc-by-4.0", "unknown".
        how (`str`): a sentence or two: who demonstrated, with which tool.
        options (`dict`): the source's own settings that change its episodes; JSON values.
        units (`str`): what the numbers of action and state measure, in words.
    """

    source: str
    revision: str
    license: str
    robot: str
    fps: float
    how: str
    options: dict[str, Any] = field(default_factory=dict)
    units: str = "as in the source"


class Source(Protocol):
    """Episodes by index. Must pickle: with several processes every one of them reads its own share."""

    info: SourceInfo

    def __len__(self) -> int: ...

    def task(self, index: int) -> str:
        """The instruction of an episode, without reading its frames."""

    def episode(self, index: int) -> Episode | None:
        """One episode, the same whenever and in whichever process it is asked for; None if it is rejected.

        Asked for in ascending order within a process. Raises [`EpisodeError`], which leaves the others readable.
        """


def raw_rows(
    episode: Episode, config: VLAConfig, index: int, image_format: ImageFormat = "png"
) -> Iterator[dict[str, list]]:
    """An episode as columns of the chat dataset, one entry per frame, without the text, which depends on all episodes.

    Yields:
        `dict[str, list]`: at most `PIECE_FRAMES` entries of images, task, episode_index, frame_index, raw_state
        (float32, [] without a state) and raw_action (chunk_size · action_dim float32, time-major, absolute).

    Raises:
        EpisodeError: no frames, no task, a vector of another width or not finite, a camera or state missing, another
            number of frames, a frame that does not decode, is not RGB or has another size than the first.
    """
    if mistake := task_mistake(episode.task):
        raise EpisodeError(f"{episode.name}: task {mistake}")
    if not len(episode.actions):
        raise EpisodeError(f"{episode.name}: has no frames: leave it out with --episodes")
    windows = _action_rows(episode, config)
    states = np.zeros((len(windows), 0), np.float32)
    if config.state_dim:
        if episode.states is None:
            raise EpisodeError(f"{episode.name}: state is missing, other episodes have {config.state_dim} dimensions")
        states = _checked_vectors(episode, "state", episode.states, config.state_dim)
        if len(states) != len(windows):
            raise EpisodeError(f"{episode.name}: state has {len(states)} frames, action has {len(windows)}")
    missing = [camera for camera in config.cameras if camera not in episode.images]
    if missing:
        raise EpisodeError(
            f"{episode.name}: camera {missing[0]!r} is missing, it has {sorted(episode.images)}: choose with --cameras"
        )
    views = zip(*(_encoded_frames(episode, camera, image_format) for camera in config.cameras), strict=True)
    start = 0
    while piece := list(islice(views, PIECE_FRAMES)):
        stop = start + len(piece)
        yield {
            "images": [[{"bytes": frame, "path": None} for frame in view] for view in piece],
            "task": [episode.task] * len(piece),
            "episode_index": [index] * len(piece),
            "frame_index": list(range(start, stop)),
            "raw_state": states[start:stop].tolist(),
            "raw_action": windows[start:stop].tolist(),
        }
        start = stop


def rows_of(pieces: Iterable[dict[str, list]]) -> list[dict[str, Any]]:
    """What [`raw_rows`] gives, row by row."""
    return [dict(zip(piece, row, strict=True)) for piece in pieces for row in zip(*piece.values(), strict=True)]


def action_windows(actions: np.ndarray, chunk_size: int) -> np.ndarray:
    """Every frame's next `chunk_size` actions: (T, D) -> (T, chunk_size, D).

    Past the end the last action repeats, as in LeRobot, so that episodes shorter than a chunk count too.
    """
    steps = np.arange(len(actions))[:, None] + np.arange(chunk_size)
    return actions[np.minimum(steps, len(actions) - 1)]


def _action_rows(episode: Episode, config: VLAConfig) -> np.ndarray:
    """float32 (T, chunk_size · action_dim): the next actions of every frame, or the chunk that it came with."""
    actions = np.asarray(episode.actions)
    if actions.ndim != 3:
        actions = _checked_vectors(episode, "action", actions, config.action_dim)
        return action_windows(actions, config.chunk_size).reshape(len(actions), -1)
    if actions.shape[1] != config.chunk_size:
        raise EpisodeError(
            f"{episode.name}: its chunks have {actions.shape[1]} steps, chunk_size is {config.chunk_size}: set "
            f"--chunk_size {actions.shape[1]}"
        )
    chunks = actions.reshape(len(actions), -1)
    return _checked_vectors(episode, "action", chunks, config.num_values)


def _checked_vectors(episode: Episode, field: str, values: np.ndarray, dim: int) -> np.ndarray:
    """float32 (T, dim), finite."""
    values = np.asarray(values, np.float32)
    if values.ndim != 2 or values.shape[1] != dim:
        raise EpisodeError(
            f"{episode.name}: {field} has shape {values.shape}, expected (frames, {dim}): every episode of a dataset "
            f"needs the same {field} dimensions"
        )
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        frame, index = bad[0]
        raise EpisodeError(
            f"{episode.name}, frame {frame}: {field}[{index}] is {values[frame, index]}: repair the recording, or "
            "leave the episode out with --episodes"
        )
    return values


def _encoded_frames(episode: Episode, camera: str, image_format: ImageFormat) -> Iterator[bytes]:
    """A camera's frames as image files: bytes as they are, pixels as `image_format`."""
    frames, count, first_size = len(episode.actions), 0, None
    for count, frame in enumerate(episode.images[camera], start=1):
        if count > frames:
            break
        where = f"{episode.name}, frame {count - 1}: camera {camera!r}"
        data, size = _checked_bytes(frame, where) if isinstance(frame, bytes) else _encoded(frame, where, image_format)
        first_size = first_size or size
        if size != first_size:
            raise EpisodeError(
                f"{where} has {size[0]}×{size[1]} pixels, the first frame {first_size[0]}×{first_size[1]}: all frames "
                "of a camera must have one size"
            )
        yield data
    if count != frames:
        found = "more" if count > frames else count
        raise EpisodeError(f"{episode.name}: camera {camera!r} has {found} frames, action has {frames}")


def _checked_bytes(data: bytes, where: str) -> tuple[bytes, tuple[int, int]]:
    """The bytes themselves and (width, height), after decoding them once.

    An image whose EXIF data say that it is rotated is rotated back first, because some readers ignore EXIF.
    """
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            if image.format not in IMAGE_ENDS:
                raise EpisodeError(f"{where} is {image.format}, expected PNG or JPEG: choose other cameras")
            check_frame_size(*image.size, where)
            image.load()
            if IMAGE_ENDS[image.format] not in data:
                raise OSError("it is cut off")
            turned = None
            if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                turned = np.asarray(ImageOps.exif_transpose(image))
    except EpisodeError:
        raise
    except (*DAMAGED_IMAGE, Image.DecompressionBombError) as error:
        raise EpisodeError(f"{where} does not decode as PNG or JPEG ({error}): the file is damaged") from error
    if image.mode != "RGB":
        raise EpisodeError(f"{where} is an image of mode {image.mode}, expected RGB")
    if turned is not None:
        return _encoded(turned, where, image.format.lower())
    return data, image.size


def size_mistake(width: int, height: int) -> str | None:
    """What is wrong with a picture's size: a few kB can unpack to gigabytes."""
    if width * height > MAX_PIXELS:
        return f"{width}×{height} pixels, at most {MAX_PIXELS} are read"
    if max(width, height) > MAX_ASPECT * min(width, height):
        return f"{width}×{height} pixels, one side at most {MAX_ASPECT} times as long as the other is read"
    return None


def check_frame_size(width: int, height: int, where: str) -> None:
    """`EpisodeError` for a frame of a size that no camera has."""
    if mistake := size_mistake(width, height):
        raise EpisodeError(
            f"{where} has {mistake}: make the frames smaller, or leave the episode out with --skip_bad_episodes"
        )


def _encoded(frame: np.ndarray, where: str, image_format: ImageFormat) -> tuple[bytes, tuple[int, int]]:
    """An image file's bytes and (width, height) of uint8 (H, W, 3)."""
    frame = np.asarray(frame)
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise EpisodeError(f"{where} is {frame.dtype} of shape {frame.shape}, expected uint8 (height, width, 3)")
    buffer = io.BytesIO()
    options = JPEG_OPTIONS if image_format == "jpeg" else {"compress_level": PNG_COMPRESS_LEVEL}
    Image.fromarray(frame).save(buffer, image_format, **options)
    return buffer.getvalue(), (frame.shape[1], frame.shape[0])
