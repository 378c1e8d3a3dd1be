"""Camera images -> what the model takes: one definition for training, evaluation and serving.

Images stay uint8 until they are on the device that trains: a 256 px camera is 0.2 MB there, and 3 MB as the floats of
a 512 px input.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torchvision.transforms.v2 import functional as tvF
from transformers.image_processing_utils import BaseImageProcessor

from vla0_trl.config import VLAConfig


def crop(image: np.ndarray, ratio: float, rng: np.random.Generator | None = None) -> np.ndarray:
    """Cut `ratio` of each side out of an image (H, W, 3): at random, or from the centre without `rng`."""
    height, width = image.shape[:2]
    new_height, new_width = round(height * ratio), round(width * ratio)
    if rng is None:
        top, left = (height - new_height) // 2, (width - new_width) // 2
    else:
        top, left = rng.integers(height - new_height + 1), rng.integers(width - new_width + 1)
    return image[top : top + new_height, left : left + new_width]


def stack_cameras(samples: Sequence[Sequence[np.ndarray]], names: Sequence[str]) -> list[torch.Tensor]:
    """B samples of C images uint8 (H, W, 3) -> C tensors uint8 (B, 3, H, W); cameras may differ in size.

    Raises:
        ValueError: a camera changes its resolution within the batch; names it.
    """
    cameras = []
    for name, images in zip(names, zip(*samples, strict=True), strict=True):
        shapes = {image.shape for image in images}
        if len(shapes) > 1:
            raise ValueError(f"camera {name!r} has images of different sizes in one batch: {sorted(shapes)}")
        cameras.append(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    return cameras


def model_inputs(
    image_processor: BaseImageProcessor, cameras: Sequence[torch.Tensor], config: VLAConfig
) -> dict[str, torch.Tensor]:
    """Resize, tile, rescale, normalise and pack, batched, on the device where the images are.

    Args:
        image_processor: the model's own, set up by [`modeling.load_processor`]; it normalises and packs.
        cameras: C tensors uint8 (B, 3, H, W), already cropped.

    Returns:
        `pixel_values` and what goes with them, as the model's own processor makes them of the same images.
    """
    side = [config.image_size, config.image_size]
    resized = [tvF.resize(c, side, interpolation=tvF.InterpolationMode.BICUBIC, antialias=True) for c in cameras]
    if config.tile_images:
        resized = [torch.cat(resized, dim=-1)]
    nested = [list(images) for images in zip(*resized, strict=True)]
    # All images have one size now: nothing to pad, and no per-image masks to build.
    inputs = image_processor(nested, do_pad=False, return_tensors="pt", device=resized[0].device)
    return {key: value for key, value in inputs.items() if key in image_processor.model_input_names}
