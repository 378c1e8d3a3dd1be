"""The nano backbone: SmolVLM's own classes, a few million parameters, random weights, built offline.

It is what tests train and what `make demo` shows: the whole recipe in minutes on two cores. It knows nothing: for a
policy that is worth something, fine-tune a pretrained backbone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
from transformers import (
    PreTrainedTokenizerBase,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMProcessor,
)

from vla0_trl.models.nano_processor import SPECIAL_TOKENS, nano_processor
from vla0_trl.schema import between, boolean, checked, items, mistakes, optional, positive, share


@dataclass
class NanoConfig:
    """Size of the nano backbone (2.4 M parameters by default).

    Args:
        hidden_size, num_layers, num_heads (`int`): of the language model.
        rope_theta (`float`): base of the rotary angles; 100 tells neighbours in short texts apart.
        number_tokens (`bool`): one token for each integer of the actions and each word of the prompts, and a brief
            chat template, instead of single bytes.
        vision_hidden_size, vision_layers (`int`): of the image encoder.
        vision_intermediate_size, vision_num_heads (`int`, *optional*): of it, too; default: three times its width, and
            one head per 64 dimensions.
        image_size (`int`): side of the input it is built for; other sizes interpolate its position embeddings.
        image_mean (`list[float]`): colour in [0, 1] that becomes zero. From scratch it should be the frames' own mean:
            what all frames share, as PushT's white ground, otherwise drowns what differs within some ten steps.
        image_std (`list[float]`): colours are divided by it.
        patch_size (`int`): side of a patch; (image_size / patch_size / scale_factor)² tokens per image.
        scale_factor (`int`): side of the square of patches that becomes one token.
    """

    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 4
    rope_theta: float = 10000.0
    number_tokens: bool = False
    vision_hidden_size: int = 128
    vision_layers: int = 2
    vision_intermediate_size: int | None = None
    vision_num_heads: int | None = None
    image_size: int = 96
    image_mean: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    image_std: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    patch_size: int = 12
    scale_factor: int = 2

    def __post_init__(self):
        if lines := mistakes(vars(self), _KINDS):
            raise ValueError(f"nano: {'; '.join(lines)}")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(f"nano: hidden_size={self.hidden_size} must be a multiple of 2 · num_heads")
        if self.image_size < self.patch_size * self.scale_factor:
            raise ValueError(f"nano: image_size={self.image_size} must be at least patch_size · scale_factor")


_SIZE = between(1, 8192)
_KINDS = {
    **dict.fromkeys(("hidden_size", "num_heads", "vision_hidden_size", "image_size", "patch_size"), _SIZE),
    **dict.fromkeys(("num_layers", "vision_layers", "scale_factor"), between(1, 100)),
    **dict.fromkeys(("vision_intermediate_size", "vision_num_heads"), optional(_SIZE)),
    "rope_theta": positive,
    "number_tokens": boolean,
    "image_mean": items(share, 3, 3),
    "image_std": items(positive, 3, 3),
}


def build_nano(
    config: NanoConfig | None = None, seed: int = 0, num_bins: int = 1000, texts: Sequence[str] = ()
) -> tuple[SmolVLMForConditionalGeneration, SmolVLMProcessor]:
    """A randomly initialised SmolVLM with its processor; the same weights for the same arguments.

    Args:
        num_bins (`int`): the largest integer that is one token, with `number_tokens`.
        texts: prompts, whose words are one token each, with `number_tokens`.
    """
    config = config or NanoConfig()
    image_tokens = (config.image_size // config.patch_size // config.scale_factor) ** 2
    largest = num_bins if config.number_tokens else None
    processor = nano_processor(config.image_size, image_tokens, config.image_mean, config.image_std, largest, texts)
    torch.manual_seed(seed)
    model = SmolVLMForConditionalGeneration(_smolvlm_config(config, processor.tokenizer)).to(torch.float32)
    return model, processor


def _smolvlm_config(config: NanoConfig, tokenizer: PreTrainedTokenizerBase) -> SmolVLMConfig:
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    return SmolVLMConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": config.hidden_size,
            "intermediate_size": config.hidden_size * 3,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_heads,
            "max_position_embeddings": 4096,
            "rope_theta": config.rope_theta,
            "bos_token_id": ids["<|im_start|>"],
            "eos_token_id": ids["<end_of_utterance>"],
            "pad_token_id": ids["<|pad|>"],
        },
        vision_config={
            "hidden_size": config.vision_hidden_size,
            "intermediate_size": config.vision_intermediate_size or config.vision_hidden_size * 3,
            "num_hidden_layers": config.vision_layers,
            "num_attention_heads": config.vision_num_heads or max(1, config.vision_hidden_size // 64),
            "image_size": config.image_size,
            "patch_size": config.patch_size,
        },
        scale_factor=config.scale_factor,
        image_token_id=ids["<image>"],
        pad_token_id=ids["<|pad|>"],
        eos_token_id=ids["<end_of_utterance>"],
        tie_word_embeddings=True,
    )


def nano_from_dict(data: dict | None) -> NanoConfig:
    """A `NanoConfig` from a recipe's `nano:` section; an unknown key raises `ValueError`."""
    unknown = checked("nano", data or {}, {}, "write {…}").keys() - asdict(NanoConfig()).keys()
    if unknown:
        raise ValueError(f"nano: unknown keys {sorted(unknown)}, known are {sorted(asdict(NanoConfig()))}")
    return NanoConfig(**(data or {}))
