"""The nano backbone."""

import numpy as np
import pytest
import torch
from support.backbones import TINY
from support.episodes import DotSource

from vla0_trl.data.chat_dataset import load_chat_dataset
from vla0_trl.models.loading import load_processor, set_image_size
from vla0_trl.models.nano import build_nano, nano_from_dict
from vla0_trl.processing.collator import VLADataCollator


def test_the_mean_colour_becomes_zero_also_after_saving(dot_dataset, tmp_path):
    """In training and, from a checkpoint's processor, in inference."""
    rows, config = load_chat_dataset(dot_dataset)
    frames = np.concatenate([DotSource().episode(index).images["image"] for index in range(6)])
    model, processor = build_nano(nano_from_dict(TINY | {"image_mean": (frames.mean((0, 1, 2)) / 255).tolist()}))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    set_image_size(processor, model.config, config)
    for used in (processor, load_processor(tmp_path, config)):
        pixels = VLADataCollator(used, config, train=False)(list(rows))["pixel_values"]
        assert pixels.mean((0, 1, 3, 4)).tolist() == pytest.approx([0.0] * 3, abs=1e-3)
    plain, _ = build_nano(nano_from_dict(TINY))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
