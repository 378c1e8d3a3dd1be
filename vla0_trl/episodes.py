"""Episodes: what every converter gives, how it is checked, and the chat rows that it becomes."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from vla0_trl.actions import Quantizer, join_integers
from vla0_trl.chat import completion_messages, prompt_messages
from vla0_trl.config import VLAConfig

# On one core, frames a second and bytes each: PushT's 96 px: level 2: 5,540 and 1,313, level 3: 5,430 and 1,261, the
# usual 6: 3,620 and 1,183. A noisy 256 px frame: 200 and 98 kB, 135 and 97 kB, 40 and 91 kB.
PNG_COMPRESS_LEVEL = 2
# What a video's frames become: 0.3 ms and 20 to 45 kB at 256 px. Colours keep their full resolution: the video has
# halved it once already.
JPEG_OPTIONS = {"quality": 95, "subsampling": "4:4:4"}

ImageFormat = Literal["png", "jpeg"]


class EpisodeError(ValueError):
    """An episode that can't become training data; the message names the episode, the field, the frame and the fix."""


@dataclass
class Episode:
    """One demonstration of T frames.

    Args:
        task (`str`): the instruction.
        actions (`np.ndarray`): float32 (T, action_dim), absolute, in environment units; row t is what was done on
            seeing frame t.
        images (`dict[str, Collection]`): camera -> T frames, each uint8 (H, W, 3) or the bytes of a PNG or JPEG, which
            go into the dataset untouched. They are counted and read once, in order, all cameras in step: a source may
            decode them only then.
        states (`np.ndarray`, *optional*): float32 (T, state_dim), in environment units.
        name (`str`): where it is from, for messages: "pusht_cchi_v7_replay.zarr, episode 12".
    """

    task: str
    actions: np.ndarray
    images: dict[str, Collection[np.ndarray | bytes]]
    states: np.ndarray | None = None
    name: str = "episode"


@dataclass
class SourceInfo:
    """Where episodes are from, for the dataset card, and so that a conversion never continues another one's.

    Args:
        source, revision (`str`): name, and version or content hash, of what is read.
        license (`str`): the Hub's identifier: "mit", "cc-by-4.0", "unknown".
        robot (`str`), fps (`float`): what acted, and how often a second.
        how (`str`): a sentence or two: who demonstrated, with which tool.
        options (`dict`): the source's own settings that change its episodes; JSON values.
        in_order (`bool`): neighbouring episodes share files that are read from front to back, so that a process should
            read several in a row.
    """

    source: str
    revision: str
    license: str
    robot: str
    fps: float
    how: str
    options: dict[str, Any] = field(default_factory=dict)
    in_order: bool = False


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


def checked_episode(episode: Episode, config: VLAConfig, image_format: ImageFormat = "png") -> Episode:
    """The episode as it goes into a dataset, whole in memory: see [`checked_vectors`] and [`encoded_frames`]."""
    episode = checked_vectors(episode, config)
    images = {camera: list(encoded_frames(episode, camera, image_format)) for camera in config.cameras}
    return replace(episode, images=images)


def checked_vectors(episode: Episode, config: VLAConfig) -> Episode:
    """The episode with arrays in float32 and only the config's cameras, whose frames are not read yet.

    Args:
        config (`VLAConfig`): gives `cameras`, `action_dim` and `state_dim`.

    Raises:
        EpisodeError: no frames, no task, a vector of another width or not finite, a camera or state missing, another
            number of frames.
    """
    if not episode.task.strip():
        raise EpisodeError(f"{episode.name}: task is empty: a policy needs an instruction")
    if not len(episode.actions):
        raise EpisodeError(f"{episode.name}: has no frames: leave it out with --episodes")
    actions = _checked_vectors(episode, "action", episode.actions, config.action_dim)
    states = None
    if config.state_dim:
        if episode.states is None:
            raise EpisodeError(f"{episode.name}: state is missing, other episodes have {config.state_dim} dimensions")
        states = _checked_vectors(episode, "state", episode.states, config.state_dim)
        if len(states) != len(actions):
            raise EpisodeError(f"{episode.name}: state has {len(states)} frames, action has {len(actions)}")
    for camera in config.cameras:
        if camera not in episode.images:
            raise EpisodeError(
                f"{episode.name}: camera {camera!r} is missing, it has {sorted(episode.images)}: choose with --cameras"
            )
        count = len(episode.images[camera])
        if count != len(actions):
            raise EpisodeError(f"{episode.name}: camera {camera!r} has {count} frames, action has {len(actions)}")
    images = {camera: episode.images[camera] for camera in config.cameras}
    return replace(episode, actions=actions, states=states, images=images)


def encoded_frames(episode: Episode, camera: str, image_format: ImageFormat) -> Iterator[bytes]:
    """A camera's frames as image files: bytes as they are, pixels as `image_format`.

    Raises:
        EpisodeError: a frame that does not decode, is not RGB or has another size than the first.
    """
    first_size = None
    for index, frame in enumerate(episode.images[camera]):
        where = f"{episode.name}, frame {index}: camera {camera!r}"
        data, size = _checked_bytes(frame, where) if isinstance(frame, bytes) else _encoded(frame, where, image_format)
        first_size = first_size or size
        if size != first_size:
            raise EpisodeError(
                f"{where} has {size[0]}×{size[1]} pixels, the first frame {first_size[0]}×{first_size[1]}: all frames "
                "of a camera must have one size"
            )
        yield data


def action_windows(actions: np.ndarray, chunk_size: int) -> np.ndarray:
    """Every frame's next `chunk_size` actions: (T, D) -> (T, chunk_size, D).

    Past the end the last action repeats, as in LeRobot, so that episodes shorter than a chunk count too.
    """
    steps = np.arange(len(actions))[:, None] + np.arange(chunk_size)
    return actions[np.minimum(steps, len(actions) - 1)]


def relative_windows(windows: np.ndarray, states: np.ndarray) -> np.ndarray:
    """What relative actions write: (T, chunk_size, D) − the state (T, ≥ D) on seeing the frame, float64."""
    return windows - states[:, None, : windows.shape[-1]].astype(np.float64)


def frame_sizes(episode: Episode) -> dict[str, tuple[int, int]]:
    """Camera -> (width, height) of a checked episode's first frame, which the others share."""
    return {camera: Image.open(io.BytesIO(frames[0])).size for camera, frames in episode.images.items()}


def chat_columns(episode: Episode, config: VLAConfig, episode_index: int, first_frame: int = 0) -> dict[str, list]:
    """A checked episode, or some of its frames, as columns of the chat dataset, one entry a frame.

    Args:
        episode (`Episode`): as [`checked_episode`] gives it; `images` may hold only the frames that are wanted.
        config (`VLAConfig`): with statistics.
        first_frame (`int`): number of the first frame in `images`.

    Returns:
        `dict[str, list]`: images, task, state, action, prompt, completion, episode_index, frame_index, raw_state
        (float32, [] without a state) and raw_action (chunk_size · action_dim float32, time-major, absolute, also if
        `relative_actions`).
    """
    views = list(zip(*(episode.images[camera] for camera in config.cameras), strict=True))
    frames = len(views)
    chosen = slice(first_frame, first_frame + frames)
    windows = action_windows(episode.actions, config.chunk_size)[chosen]
    states = np.zeros((frames, 0), np.float32) if episode.states is None else episode.states[chosen]
    tokenizer = config.action_tokenizer()
    quantizer = _state_quantizer(config)

    action = [tokenizer.encode(window, state) for window, state in zip(windows, states, strict=True)]
    state = [""] * frames if quantizer is None else [join_integers(row) for row in quantizer.encode(states)]
    return {
        "images": [[{"bytes": encoded, "path": None} for encoded in cameras] for cameras in views],
        "task": [episode.task] * frames,
        "state": state,
        "action": action,
        "prompt": [prompt_messages(config, episode.task, text) for text in state],
        "completion": [completion_messages(text) for text in action],
        "episode_index": [episode_index] * frames,
        "frame_index": list(range(first_frame, first_frame + frames)),
        "raw_state": states.tolist(),
        "raw_action": windows.reshape(frames, -1).tolist(),
    }


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


def _checked_bytes(data: bytes, where: str) -> tuple[bytes, tuple[int, int]]:
    """The bytes themselves and (width, height), after decoding them once."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            image.load()
    except (OSError, SyntaxError, ValueError) as error:  # PIL raises all three for damaged files
        raise EpisodeError(f"{where} does not decode as PNG or JPEG ({error}): the file is damaged") from error
    if image.mode != "RGB":
        raise EpisodeError(f"{where} is an image of mode {image.mode}, expected RGB")
    return data, image.size


def _encoded(frame: np.ndarray, where: str, image_format: ImageFormat) -> tuple[bytes, tuple[int, int]]:
    """An image file's bytes and (width, height) of uint8 (H, W, 3)."""
    frame = np.asarray(frame)
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise EpisodeError(f"{where} is {frame.dtype} of shape {frame.shape}, expected uint8 (height, width, 3)")
    buffer = io.BytesIO()
    options = JPEG_OPTIONS if image_format == "jpeg" else {"compress_level": PNG_COMPRESS_LEVEL}
    Image.fromarray(frame).save(buffer, image_format, **options)
    return buffer.getvalue(), (frame.shape[1], frame.shape[0])


def _state_quantizer(config: VLAConfig) -> Quantizer | None:
    """The codec of the `state` column, which shows the state also when the prompt does not."""
    if config.use_state:
        return config.state_quantizer()
    if not config.state_dim:
        return None
    try:
        return Quantizer(config.state_stats, config.num_bins, config.normalization)
    except ValueError:  # a dimension that never moves has no scale, and no prompt needs it
        return None
