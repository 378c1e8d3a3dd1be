"""Backbones: loading, image size, what is trained and what is frozen."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from vla0_trl.config import NANO, VLAConfig
from vla0_trl.models.fingerprint import ADAPTER_CONFIG, base_model_of, base_revision_of, check_base, is_adapter
from vla0_trl.models.weights import check_config, check_finite, load_whole, sound

if TYPE_CHECKING:
    from peft import PeftModel

SMOLVLM = ("smolvlm", "idefics3")  # one architecture under two names
# The image encoder, as transformers' models name it; and what some of them keep inside although it is the connector:
# the mergers of Qwen and Kimi, GLM's downsample, Llama 4's adapter, Ovis' head.
_ENCODERS = "vision_model|visual|vision_tower|vision_encoder|image_tower"
_CONNECTORS = (
    "merger|merger_list|deepstack_merger_list|downsample|vision_adapter|multi_modal_projector|projector|connector|"
    "aligner|head_linear|head_norm"
)
# A full match with the name of a module or parameter of the image encoder; also as PEFT's `exclude_modules`.
IMAGE_ENCODER = rf"(.*\.)?({_ENCODERS})\.(?!(.*\.)?({_CONNECTORS})(\.|$)).*"


def checkpoint_folder(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The local folder of a checkpoint, downloaded if it is a Hub id. `FileNotFoundError` if it is not one of ours."""
    VLAConfig.from_pretrained(name_or_path, revision=revision)  # says what is wrong before gigabytes are fetched
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    return Path(snapshot_download(str(name_or_path), revision=revision))


def local_adapter(name_or_path: str, revision: str | None = None) -> str:
    """The folder of an adapter on the Hub, which is downloaded; any other name as it is."""
    if name_or_path == NANO or Path(name_or_path).is_dir():
        return name_or_path
    try:
        hf_hub_download(name_or_path, ADAPTER_CONFIG, revision=revision)
    except (EntryNotFoundError, HFValidationError):
        return name_or_path
    return snapshot_download(name_or_path, revision=revision)


def load_processor(name_or_path: str | Path, config: VLAConfig, revision: str | None = None) -> ProcessorMixin:
    """The processor of a backbone or checkpoint, set to `config.image_size` and to one view per image."""
    if not is_adapter(name_or_path):
        check_config(name_or_path, revision)
    with sound(name_or_path):
        processor = AutoProcessor.from_pretrained(name_or_path, revision=revision)
        # transformers prefers PIL's for SmolVLM where torchvision lacks Lanczos: that knows neither batches nor GPUs.
        image_processor = AutoImageProcessor.from_pretrained(name_or_path, revision=revision, backend="torchvision")
        processor.tokenizer("0 1")
    processor.image_processor = image_processor
    if is_adapter(name_or_path):
        name_or_path, revision = base_model_of(name_or_path), base_revision_of(name_or_path)
    set_image_size(processor, AutoConfig.from_pretrained(name_or_path, revision=revision), config)
    with sound(name_or_path):  # numbers that can't be computed with show when they are used
        white = torch.full((3, config.image_size, config.image_size), 255, dtype=torch.uint8)
        pixels = image_processor(white, return_tensors="pt")["pixel_values"]
        if not pixels.isfinite().all():
            raise ArithmeticError("its image processor makes pixels that are not finite")
    return processor


def set_image_size(processor: ProcessorMixin, backbone: PreTrainedConfig, config: VLAConfig) -> None:
    """Let the processor make `config.image_size`² inputs, so that its own call and `images.model_inputs` agree.

    Resizing is bicubic: SmolVLM's Lanczos does not exist on GPUs (transformers falls back to bicubic there), and a
    policy trained on one device must see the same pixels on another. `ValueError` if the backbone's patches don't fit
    the size, or can't show tiled cameras.
    """
    side, vision = config.image_size, backbone.vision_config
    processor.image_processor.resample = Image.Resampling.BICUBIC
    if backbone.model_type in SMOLVLM:
        if config.tile_images:
            raise ValueError(
                f"tile_images=True: {backbone.model_type} squares every image, which would squash the cameras: "
                "give it one image per camera (tile_images=False)"
            )
        unit = vision.patch_size * backbone.scale_factor
        _check_divides(side, unit, backbone.model_type)
        processor.image_processor.do_image_splitting = False  # 64 tokens per image at 512 px instead of 1088
        processor.image_processor.size = {"longest_edge": side}
        processor.image_processor.max_image_size = {"longest_edge": side}
        processor.image_seq_len = (side // unit) ** 2
    elif backbone.model_type in ("qwen2_vl", "qwen2_5_vl"):
        unit = vision.patch_size * vision.spatial_merge_size
        _check_divides(side, unit, backbone.model_type)
        pixels = side * side * (len(config.cameras) if config.tile_images else 1)
        processor.image_processor.size = {"shortest_edge": pixels, "longest_edge": pixels}


def _check_divides(side: int, unit: int, model_type: str) -> None:
    if side % unit:
        below, above = side // unit * unit, (side // unit + 1) * unit
        raise ValueError(
            f"image_size={side} is not a multiple of {unit}, the pixels behind one image token of {model_type}: "
            f"use {' or '.join(str(size) for size in (below, above) if size)}"
        )


def load_model(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    quantization_config=None,
    trainable: bool = False,
) -> PreTrainedModel | PeftModel:
    """A backbone, a fully trained checkpoint, or an adapter on the base model that it names.

    `trainable` lets an adapter be trained further, as whole models always can. `ValueError` if weights are missing,
    unexpected, of another shape or not finite, or if the base model is another one.
    """
    options = {"dtype": dtype, "attn_implementation": attn_implementation, "quantization_config": quantization_config}
    options = {key: value for key, value in options.items() if value is not None}
    if not is_adapter(name_or_path):
        return load_whole(name_or_path, revision, **options)
    from vla0_trl.models.adapters import load_adapter  # PEFT takes seconds to import, and most don't need it

    base_name, base_revision = base_model_of(name_or_path), base_revision_of(name_or_path)
    base = load_whole(base_name, base_revision, **options)
    check_base(name_or_path, base_name, base_revision)
    check_finite(name_or_path)
    return load_adapter(base, Path(name_or_path), trainable)


def freeze_vision(model: PreTrainedModel | PeftModel) -> None:
    """Stop training the image encoder (not the connector). On PushT this costs VLA-0-Smol 57.8 → 25 % success."""
    frozen = [p for name, p in model.named_parameters() if re.fullmatch(IMAGE_ENCODER, name)]
    if not frozen:
        raise ValueError(f"{type(model).__name__} has no image encoder named one of {_ENCODERS.replace('|', ', ')}")
    for parameter in frozen:
        parameter.requires_grad_(False)
