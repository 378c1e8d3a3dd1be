"""Messages become requests: what a robot sends is checked against its layout and the checkpoint, key by key."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vla0_trl.config import VLAConfig
from vla0_trl.joint_units import DEGREES, JOINT_UNITS, NORMALIZED, beyond_units
from vla0_trl.policy.observation import Observation, check_observation
from vla0_trl.processing.chat import MAX_TASK
from vla0_trl.schema import one_line
from vla0_trl.serving.layouts import CAMERA, Layout

MAX_PIXELS = 16 << 20  # of a compressed picture, before it is decoded
MAX_DEPTH = 4  # of maps in maps
# What any request may carry beside its layout's keys.
OPTIONS = ("episode", "noise", "prefix", "units", "deadline_s")


@dataclass(frozen=True)
class Request:
    """One message, read: an observation of the policy's contract, and what was asked for beside it.

    Attributes:
        episode: the client's name of its episode, if it gave one.
        noise: the name that answers are drawn by where there is a temperature: the episode's, unless it gave another.
        prefix: float32 (d, action_dim), actions that the robot executes meanwhile; None without.
        deadline_s: seconds after which the answer is useless; None: never.
    """

    observation: Observation
    episode: str | int | None = None
    noise: str | int | None = None
    prefix: np.ndarray | None = None
    deadline_s: float | None = None


class RequestReader:
    """Messages of one layout -> requests to one checkpoint.

    Args:
        layout ([`Layout`]), config ([`VLAConfig`]): the two sides.
        units (`str`, *optional*): of the checkpoint's joints, where the layout needs it: one of `JOINT_UNITS`.
            Default: as it was converted.

    Attributes:
        cameras (`dict[str, str]`): the checkpoint's camera -> its key in a message.

    `ValueError`: the two don't fit; names both.
    """

    def __init__(self, layout: Layout, config: VLAConfig, units: str | None = None):
        self.layout, self.config, self.units = layout, config, units
        if isinstance(layout.images, str):
            self.cameras = {camera: layout.images.replace(CAMERA, camera) for camera in config.cameras}
            known = self.cameras.values()
        else:
            names = {name: key for key, cameras in layout.images.items() for name in cameras}
            absent = [camera for camera in config.cameras if camera not in names]
            if absent:
                raise ValueError(
                    f"the checkpoint sees cameras {config.cameras}, the layout has {layout.images}: name the key of "
                    f"{', '.join(absent)} in a layout file"
                )
            self.cameras = {camera: names[camera] for camera in config.cameras}
            known = layout.images
        self.known = {*known, *layout.state, layout.task}
        if layout.chunk_size is not None and layout.chunk_size > config.chunk_size:
            raise ValueError(
                f"the layout's robot executes {layout.chunk_size} actions of each reply, the checkpoint predicts "
                f"chunk_size={config.chunk_size}: serve another checkpoint, or a layout file with another chunk_size"
            )
        self._check_dimensions()
        self._check_units()

    def read(self, message: Any) -> Request:
        """The request in a message.

        `ValueError`: keys are absent or unknown, or a value is not what it must be; one line.
        """
        if not isinstance(message, dict):
            raise ValueError(f"a request is a map of {sorted(self.known)}, not {type(message).__name__}")
        found = dict(_leaves(message))
        options = {key: found.pop(key) for key in OPTIONS if key in found and key not in self.known}
        needed = {*self.cameras.values(), *(self.layout.state if self._reads_state else ())}
        if self.layout.default_task is None:
            needed.add(self.layout.task)
        absent, unknown = sorted(needed - found.keys()), sorted(found.keys() - self.known)
        if absent or unknown:
            parts = [f"lacks {absent}"] * bool(absent) + [f"has unknown keys {unknown}"] * bool(unknown)
            raise ValueError(one_line(f"the request {' and '.join(parts)}; this server takes {sorted(self.known)}"))
        task = found.get(self.layout.task, self.layout.default_task)
        if isinstance(task, str) and len(task) > MAX_TASK:  # reading it would keep the other robots waiting
            raise ValueError(f"{self.layout.task} has {len(task)} characters, at most {MAX_TASK} are read")
        observation = {
            "images": {camera: _picture(found[key], key) for camera, key in self.cameras.items()},
            "state": self._state(found) if self._reads_state else None,
            "task": task,
        }
        self._check_request_units(options.get("units"), observation["state"])
        return Request(check_observation(observation, self.config), **self._options(options))

    def example(self) -> dict[str, Any]:
        """A message that this reads, of noise."""
        rng, side = np.random.default_rng(0), max(64, self.config.image_size)
        keys = self.cameras.values()
        message: dict[str, Any] = {key: rng.integers(0, 256, (side, side, 3), np.uint8) for key in keys}
        if self._reads_state:
            stats = self.config.state_stats or self.config.action_stats
            state = np.resize(np.asarray(stats.mean, np.float64), self.config.state_dim)
            first, rest = self.layout.state[:-1], self.layout.state[-1]
            message |= {key: state[place : place + 1] for place, key in enumerate(first)}
            message[rest] = state[len(first) :]
        if self.layout.needs_units:
            message["units"] = self.units
        return message | {self.layout.task: self.layout.default_task or "Do the task."}

    def describe(self) -> dict[str, Any]:
        """What a client should know, for the server's first message; None is what nobody has told."""
        layout = self.layout
        return {
            "cameras": self.cameras,
            "units": self.units or self.config.units,
            "options": [key for key in OPTIONS if key != "units" or layout.needs_units],
            "state": layout.state,
            "task": layout.task,
            "default_task": layout.default_task,
            # a robot's own names, by which actions are given to it, before those of the data
            "state_names": layout.state_names or self.config.state_names,
            "action_names": layout.action_names or self.config.action_names,
        }

    @property
    def _reads_state(self) -> bool:
        return self.config.use_state or self.config.relative_actions

    def _state(self, found: dict[str, Any]) -> np.ndarray:
        parts = [np.asarray(found[key]) for key in self.layout.state]
        for key, part in zip(self.layout.state, parts, strict=True):
            if part.dtype.kind not in "iuf" or part.ndim > 1:
                raise ValueError(f"{key} must be a number or a vector of numbers, got {part.dtype} of {part.shape}")
        state = np.concatenate([part.reshape(-1) for part in parts])
        if len(state) != self.config.state_dim:
            sizes = " + ".join(f"{key} {part.size}" for key, part in zip(self.layout.state, parts, strict=True))
            raise ValueError(
                f"the state has {len(state)} numbers ({sizes}), the checkpoint reads {self.config.state_dim}"
            )
        return state

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        """What a [`Request`] has beside its observation."""
        names = {key: _name(options.get(key), key) for key in ("episode", "noise")}
        prefix, deadline = options.get("prefix"), options.get("deadline_s")
        if prefix is not None and (not isinstance(prefix, np.ndarray) or prefix.dtype.kind not in "iuf"):
            raise ValueError(f"'prefix' must be an array of (d, {self.config.action_dim}) actions")
        if deadline is not None and not (isinstance(deadline, int | float | np.number) and 0 < deadline < 86_400):
            raise ValueError("'deadline_s' must be a number of seconds above 0")
        if names["noise"] is None:
            names["noise"] = names["episode"]
        return names | {"prefix": prefix, "deadline_s": None if deadline is None else float(deadline)}

    def _check_dimensions(self) -> None:
        if self._reads_state and not self.layout.state:
            raise ValueError("the checkpoint reads the state, and the layout names no key of it: set state")
        for names, own, size, what in (
            (self.layout.state_names, self.config.state_names, self.config.state_dim, "state"),
            (self.layout.action_names, self.config.action_names, self.config.action_dim, "action"),
        ):
            if names is None or (what == "state" and not self._reads_state):
                continue
            if len(names) != size:
                raise ValueError(
                    f"the layout's {what} is {names}, the checkpoint's {what}_dim is {size}: not this robot"
                )
            if own is not None and own != names and sorted(own) == sorted(names):
                raise ValueError(f"the checkpoint's {what} is in another order, {own}, than the layout's, {names}")

    def _check_units(self) -> None:
        if not self.layout.needs_units:
            if self.units is not None:
                raise ValueError(f"--units {self.units} would do nothing: this layout's units are fixed")
            return
        recorded = self.config.units if self.config.units in JOINT_UNITS else None
        if recorded and self.units not in (None, recorded):
            raise ValueError(f"--units {self.units}, but the checkpoint's joints were recorded in {recorded}")
        self.units = self.units or recorded
        if self.units not in JOINT_UNITS:
            raise ValueError(
                f"--units must say what the checkpoint's joints were recorded in: {DEGREES} (LeRobot's default since "
                f"0.4.4) or {NORMALIZED} (−100…100); one taken for the other moves an arm wrongly"
            )
        for what, stats in (("state", self.config.state_stats), ("action", self.config.action_stats)):
            if stats is None or (what == "action" and self.config.relative_actions):
                continue
            if (largest := beyond_units(np.array([stats.min, stats.max]), self.units)) is not None:
                raise ValueError(f"--units {self.units}, but the checkpoint's {what} reaches {largest:g}")

    def _check_request_units(self, units: Any, state: np.ndarray | None) -> None:
        if not self.layout.needs_units:
            if units is not None:
                raise ValueError("'units' would do nothing: this layout's units are fixed")
            return
        if units != self.units:
            said = "does not say 'units'" if units is None else f"has units {one_line(repr(units), 40)}"
            raise ValueError(f"the request {said}, the checkpoint's are {self.units!r}: convert, or say so")
        if state is not None and (largest := beyond_units(state, units)) is not None:
            raise ValueError(f"the state reaches {largest:g}: is it {units}?")


def _leaves(message: dict, before: str = "", depth: int = 1) -> Iterator[tuple[str, Any]]:
    """`a/b` and value of everything that is no map."""
    for key, value in message.items():
        if not isinstance(key, str):
            raise ValueError(f"the request has a key that is {type(key).__name__}, not text")
        if isinstance(value, dict):
            if depth == MAX_DEPTH:
                raise ValueError(f"the request has more than {MAX_DEPTH} maps in each other")
            yield from _leaves(value, f"{before}{key}/", depth + 1)
        else:
            yield before + key, value


def _name(value: Any, key: str) -> str | int | None:
    if isinstance(value, np.integer):
        value = int(value)
    if not isinstance(value, str | int | None) or len(str(value)) > 200:
        raise ValueError(f"{key!r} must be a short text or a whole number")
    return value


def _picture(value: Any, key: str) -> Any:
    """An array as it is; bytes are a JPEG or PNG."""
    if not isinstance(value, bytes):
        if not isinstance(value, np.ndarray):
            raise ValueError(
                f"{key} must be an array (H, W, 3), or a JPEG or PNG as bytes, not {type(value).__name__}"
            )
        return value
    try:
        return decoded_picture(value)
    except ValueError as error:
        raise ValueError(f"{key} is no JPEG or PNG that can be read: {error}") from error


def decoded_picture(data: bytes) -> Image.Image:
    """A JPEG or PNG, decoded; `ValueError` if it is neither, damaged or too large."""
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"it has {image.width} × {image.height} pixels, at most {MAX_PIXELS} are read")
        image.load()
    # Image.DecompressionBombError is no ValueError, SyntaxError is what Pillow says of a broken PNG.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(one_line(str(error), 200)) from error
    return image
