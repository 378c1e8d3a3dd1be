"""Camera images -> what the model takes: one definition for training, evaluation and serving.

Images stay uint8 until they are on the device that trains: a 256 px camera is 0.2 MB there, and 3 MB as the floats of
a 512 px input.
"""

import io
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as tvF
from transformers.image_processing_utils import BaseImageProcessor

from vla0_trl.config import VLAConfig
from vla0_trl.files import DAMAGED_IMAGE

# NTSC's: the first row is luma, the other two span the plane of colours, in which hue is the angle.
_RGB_TO_YIQ = [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]]


class ImageError(ValueError):
    """An image of a dataset that does not decode; the message names the row."""

    def __str__(self) -> str:
        # From a DataLoader's process it comes as the whole text of a traceback.
        return super().__str__().rpartition("ImageError: ")[2].strip()


def upright(image: Image.Image) -> Image.Image:
    """RGB, turned as its EXIF data says: what `datasets` gives, whoever decodes."""
    return ImageOps.exif_transpose(image).convert("RGB")


def decoded_image(image: Image.Image | np.ndarray | dict) -> np.ndarray:
    """A decoded image, or one still encoded as `datasets` stores it -> uint8 (H, W, 3)."""
    if isinstance(image, dict):
        image = Image.open(io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"])
    return np.asarray(upright(image) if isinstance(image, Image.Image) else image)


def row_image(row: dict[str, Any], index: int) -> np.ndarray:
    """One of a row's images, see [`decoded_image`]; [`ImageError`] if its file is damaged."""
    try:
        return decoded_image(row["images"][index])
    except DAMAGED_IMAGE as error:
        place = row.get("place") or f"episode {row.get('episode_index')}, frame {row.get('frame_index')}"
        why = " ".join(str(error).split())
        raise ImageError(
            f"{place}, image {index}: does not decode ({why}): get or convert the dataset again"
        ) from error


def crop(image: np.ndarray, ratio: float, rng: np.random.Generator | None = None) -> np.ndarray:
    """Cut `ratio` of each side out of an image (H, W, 3): at random, or from the centre without `rng`."""
    height, width = image.shape[:2]
    new_height, new_width = max(1, round(height * ratio)), max(1, round(width * ratio))
    if rng is None:
        top, left = (height - new_height) // 2, (width - new_width) // 2
    else:
        top, left = rng.integers(height - new_height + 1), rng.integers(width - new_width + 1)
    return image[top : top + new_height, left : left + new_width]


def stack_cameras(samples: Sequence[Sequence[np.ndarray]], names: Sequence[str]) -> list[torch.Tensor]:
    """B samples of C images uint8 (H, W, 3) -> C tensors uint8 (B, 3, H, W); cameras may differ in size."""
    cameras = []
    for name, images in zip(names, zip(*samples, strict=True), strict=True):
        shapes = {image.shape for image in images}
        if len(shapes) > 1:
            raise ValueError(f"camera {name!r} has images of different sizes in one batch: {sorted(shapes)}")
        cameras.append(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    return cameras


def draw_jitter(strength: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """Random brightness, contrast and saturation factors and a hue shift in turns: float32 (4,).

    Args:
        strength: of each, as in torchvision's `ColorJitter`: factors from 1 ± strength, hue from 0 ± strength.
    """
    return (np.array([1, 1, 1, 0]) + rng.uniform(-1, 1, 4) * strength).astype(np.float32)


def jitter_colors(images: torch.Tensor, jitter: torch.Tensor) -> torch.Tensor:
    """Change the colours of a batch, uint8 (B, 3, H, W), each sample by its own draw, `jitter` (B, 4) from
    [`draw_jitter`], in a handful of batched operations.

    Brightness, saturation and hue (a rotation of the YIQ plane, where `ColorJitter` goes through HSV) are one matrix
    per sample; contrast is about the sample's mean luma.
    """
    to_yiq = images.new_tensor(_RGB_TO_YIQ, dtype=torch.float32)
    brightness, contrast, saturation, hue = (factor[:, None, None] for factor in jitter.to(images.device).unbind(1))
    cos, sin = torch.cos(2 * torch.pi * hue), torch.sin(2 * torch.pi * hue)
    one, zero = torch.ones_like(hue), torch.zeros_like(hue)
    rows = [[one, zero, zero], [zero, saturation * cos, -saturation * sin], [zero, saturation * sin, saturation * cos]]
    in_yiq = brightness * torch.cat([torch.cat(row, 2) for row in rows], 1)
    matrix = torch.linalg.inv(to_yiq) @ in_yiq @ to_yiq
    colors = torch.einsum("bij,bjhw->bihw", matrix, images.float())
    luma = torch.einsum("j,bjhw->bhw", to_yiq[0], colors).mean((1, 2))[:, None, None, None]
    colors = luma + contrast[..., None] * (colors - luma)
    return colors.round().clamp(0, 255).to(torch.uint8)


def fit_images(images: Sequence[np.ndarray], config: VLAConfig) -> torch.Tensor:
    """N images of any size, uint8 (H, W, 3), as large as what the policy sees: uint8 (N, 3, H', W'), N > 0."""
    side = config.image_size
    size = [side, side * len(config.cameras) if config.tile_images else side]
    tensors = (torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images)
    interpolation = tvF.InterpolationMode.BICUBIC
    return torch.stack([tvF.resize(tensor, size, interpolation=interpolation, antialias=True) for tensor in tensors])


def model_inputs(
    image_processor: BaseImageProcessor,
    cameras: Sequence[torch.Tensor],
    config: VLAConfig,
    jitter: torch.Tensor | None = None,
    others: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Resize, tile, rescale, normalise and pack, batched, on the device where the images are.

    Args:
        image_processor: the model's own, set up by [`models.loading.load_processor`]; it normalises and packs.
        cameras: C tensors uint8 (B, 3, H, W), already cropped.
        jitter (`torch.Tensor`, *optional*): float32 (B, C, 4), see [`jitter_colors`]; in training only.
        others (`torch.Tensor`, *optional*): uint8 (N, 3, H, W) from [`fit_images`], of the rows behind those B. All
            images are then in one list, because these rows may have any number of them.

    Returns `pixel_values` and what goes with them, as the model's own processor makes them of the same images.
    """
    side = [config.image_size, config.image_size]
    resized = [tvF.resize(c, side, interpolation=tvF.InterpolationMode.BICUBIC, antialias=True) for c in cameras]
    if jitter is not None:
        resized = [jitter_colors(camera, draw) for camera, draw in zip(resized, jitter.unbind(1), strict=True)]
    if config.tile_images:
        resized = [torch.cat(resized, dim=-1)]
    nested = [list(images) for images in zip(*resized, strict=True)]
    if others is not None:
        nested = [[*chain.from_iterable(nested), *others]]
    # All images have one size now: nothing to pad, and no per-image masks to build.
    device = nested[0][0].device
    inputs = image_processor(nested, do_pad=False, return_tensors="pt", device=device)
    # Qwen's processor makes its grids on the CPU.
    return {key: value.to(device) for key, value in inputs.items() if key in image_processor.model_input_names}
