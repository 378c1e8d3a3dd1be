"""What is frozen, on each kind of backbone."""

import re

import pytest
from support.backbones import QWEN, SMOLVLM, shrunk
from transformers import AutoModelForImageTextToText

from vla0_trl.models.loading import IMAGE_ENCODER, freeze_vision


@pytest.mark.parametrize(
    ("name", "encoder", "connector"),
    [(SMOLVLM, ".vision_model.", ".connector."), (QWEN, ".visual.", ".visual.merger.")],
)
def test_freeze_vision_freezes_the_image_encoder_alone(name, encoder, connector):
    model = AutoModelForImageTextToText.from_config(shrunk(name))
    freeze_vision(model)
    for parameter, tensor in model.named_parameters():
        assert tensor.requires_grad == (encoder not in parameter or connector in parameter), parameter
    assert {connector in n for n, p in model.named_parameters() if p.requires_grad} == {True, False}


@pytest.mark.parametrize(
    ("name", "is_encoder"),
    [
        ("model.visual.blocks.3.attn.proj", True),
        ("model.visual.patch_embed.proj", True),
        ("base_model.model.model.visual.blocks.0.mlp.up_proj.lora_A.default.weight", True),
        ("model.vision_tower.vision_model.encoder.layers.0.mlp.fc1", True),
        ("model.visual.merger.mlp.0", False),
        ("model.visual.deepstack_merger_list.2.linear_fc1", False),
        ("base_model.model.model.visual.merger.mlp.2.lora_B.default.weight", False),
        ("model.visual.downsample", False),
        ("model.vision_model.vision_adapter.mlp.fc1", False),
        ("model.multi_modal_projector.linear_1", False),
        ("model.language_model.layers.0.mlp.up_proj", False),
    ],
)
def test_connectors_inside_an_image_encoder_are_told_apart(name, is_encoder):
    """Names as transformers' Qwen2.5-VL, Qwen3-VL, GLM-4V, Llama 4 and LLaVA have them; also PEFT's exclusion."""
    assert bool(re.fullmatch(IMAGE_ENCODER, name)) == is_encoder
