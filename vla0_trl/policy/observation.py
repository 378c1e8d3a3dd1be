"""What a robot or simulator shows a policy, checked: uint8 pictures in RGB, a finite state, a task.

The contract is `{"images": {camera: uint8[H, W, 3]}, "state": float32[state_dim] | None, "task": str}`. Pictures in
another form are converted where they can mean one thing only. What could mean two things raises an error, because
a policy acts on a wrong picture, too.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from vla0_trl.config import Observation, VLAConfig

_PLAIN_MODES = ("RGB", "L")  # of PIL images, whose arrays are what they show


def check_observation(observation: Observation, config: VLAConfig) -> Observation:
    """The observation as the contract has it: the config's cameras as uint8 (H, W, 3), the state as an array or None.

    `ValueError`, with camera or field and the fix, if something is missing or could mean two things.
    """
    images, task, state = observation.get("images"), observation.get("task"), observation.get("state")
    if not isinstance(images, dict):
        raise ValueError(f"the observation's 'images' must be a dict, camera to picture, not {type(images).__name__}")
    missing = set(config.cameras) - images.keys()
    if missing:
        raise ValueError(f"the observation lacks cameras {sorted(missing)}: it has {list(images)}")
    if not isinstance(task, str):
        raise ValueError(f"the observation's 'task' must be the instruction as a str, got {type(task).__name__}")
    for wanted, why in ((config.use_state, "reads the state"), (config.relative_actions, "counts from the state")):
        if wanted:
            state = _state(state, why)
    pictures = {camera: camera_image(images[camera], camera) for camera in config.cameras}
    return {**observation, "images": pictures, "state": state, "task": task}


def check_prefixes(prefixes: Sequence[np.ndarray | None] | None, count: int, config: VLAConfig) -> list[np.ndarray]:
    """Actions that chunks shall begin with, float32 (d, action_dim) per observation; (0, action_dim) for None.

    `ValueError` if they are not as many as observations, of another shape, not finite, or leave nothing to predict.
    """
    none = np.zeros((0, config.action_dim), np.float32)
    if prefixes is None:
        return [none] * count
    if len(prefixes) != count:
        raise ValueError(f"{len(prefixes)} prefixes for {count} observations: give one per observation, or None")
    checked = [none if prefix is None else np.asarray(prefix, np.float32) for prefix in prefixes]
    for prefix in checked:
        if prefix.ndim != 2 or prefix.shape[1] != config.action_dim or not np.isfinite(prefix).all():
            raise ValueError(f"a prefix must be (d, {config.action_dim}) finite numbers, got shape {prefix.shape}")
        if len(prefix) >= config.chunk_size:
            raise ValueError(
                f"a prefix of {len(prefix)} actions leaves nothing to predict of chunk_size={config.chunk_size}: give "
                f"at most {config.chunk_size - 1}"
            )
    return checked


def _state(state: Any, why: str) -> np.ndarray:
    if state is None:
        raise ValueError(f"this policy {why}, but the observation has none: give it as 'state'")
    state = np.asarray(state.detach().cpu() if isinstance(state, torch.Tensor) else state)
    if not np.issubdtype(state.dtype, np.number) or state.ndim != 1 or not np.isfinite(state).all():
        raise ValueError(
            f"the observation's 'state' must be a vector of finite numbers, got {state.dtype} of shape {state.shape}: "
            f"{state.ravel()[:8].tolist()}"
        )
    return state


def camera_image(image: Any, camera: str) -> np.ndarray:
    """One picture -> uint8 (H, W, 3), RGB.

    As it is: uint8 (H, W, 3). Converted: PIL images (turned as their EXIF data say), tensors, lists; channels first;
    one channel (grey); four channels, if all is opaque; floats in [0, 1]; other integers in 0…255.

    `ValueError`: it could be two things (uint16, floats above 1, …) or none; names camera, dtype, shape and the fix.
    """
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        pixels = image
    else:
        pixels = _three_channels(_eight_bits(_pixels(image), camera), camera)
    if 0 in pixels.shape:
        raise _refused(camera, pixels, "has no pixels")
    return pixels


def _pixels(image: Any) -> np.ndarray:
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        return (image.float() if image.is_floating_point() else image).numpy()
    if isinstance(image, Image.Image):
        image = ImageOps.exif_transpose(image)
        if image.mode in ("P", "PA", "LA", "RGBa", "La"):
            image = image.convert("RGBA")
        elif image.mode not in (*_PLAIN_MODES, "RGBA", "I", "F") and not image.mode.startswith("I;"):
            image = image.convert("RGB")
    return np.asarray(image)


def _eight_bits(pixels: np.ndarray, camera: str) -> np.ndarray:
    """The same picture in uint8."""
    if pixels.dtype == np.uint8 or not pixels.size:
        return pixels.astype(np.uint8)
    if pixels.dtype == np.uint16:
        raise _refused(
            camera, pixels, "may hold 10, 12 or 16 bits, or depth: scale it yourself, 16 bits by `(image // 257)`"
        )
    if np.issubdtype(pixels.dtype, np.integer):
        if pixels.min() < 0 or pixels.max() > 255:
            raise _refused(camera, pixels, f"has values from {pixels.min()} to {pixels.max()}: scale them to 0…255")
        return pixels.astype(np.uint8)
    if np.issubdtype(pixels.dtype, np.floating):
        if not (pixels.min() >= 0 and pixels.max() <= 1):  # so written that NaN is refused, too
            raise _refused(
                camera, pixels, f"has values from {pixels.min():g} to {pixels.max():g}, and floats are in [0, 1]"
            )
        return np.rint(pixels * 255.0).astype(np.uint8)
    raise _refused(camera, pixels, "is not of numbers")


def _three_channels(pixels: np.ndarray, camera: str) -> np.ndarray:
    """uint8 in any usual layout -> (H, W, 3)."""
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3:
        raise _refused(camera, pixels, "is not one picture: give each camera one of (H, W, 3)")
    counts = (1, 3, 4)
    if pixels.shape[2] not in counts and pixels.shape[0] in counts:
        pixels = pixels.transpose(1, 2, 0)
    elif pixels.shape[2] != 3 and pixels.shape[0] == 3:
        raise _refused(camera, pixels, "may have its channels first or last: give it as (H, W, 3)")
    if pixels.shape[2] not in counts:
        raise _refused(camera, pixels, "has no axis of 1, 3 or 4 channels: give it as (H, W, 3)")
    if pixels.shape[2] == 4:
        if (pixels[..., 3] != 255).any():
            raise _refused(camera, pixels, "is not opaque everywhere: drop the fourth channel, image[..., :3]")
        pixels = pixels[..., :3]
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def _refused(camera: str, pixels: np.ndarray, why: str) -> ValueError:
    return ValueError(
        f"camera {camera!r}: {pixels.dtype} of shape {pixels.shape} {why} (the contract is uint8 (H, W, 3), RGB)"
    )
