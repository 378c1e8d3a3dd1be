"""The nano backbone: SmolVLM's own classes, a few million parameters, random weights, built offline.

It is what tests train and what `make demo` shows: the whole recipe in minutes on two cores. It knows nothing: for a
policy that is worth something, fine-tune a pretrained backbone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

NANO = "nano"  # as a `model_name_or_path`: build the backbone instead of loading one

_SPECIAL = ("<|pad|>", "<|im_start|>", "<end_of_utterance>", "<image>", "<fake_token_around_image>", "<global-img>")
# SmolVLM's template without the newline behind a turn.
_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}<image>{% endif %}{% endfor %}<end_of_utterance>{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


@dataclass
class NanoConfig:
    """Size of the nano backbone (2.4 M parameters by default).

    Args:
        hidden_size, num_layers, num_heads (`int`): of the language model.
        vision_hidden_size, vision_layers (`int`): of the image encoder.
        image_size (`int`): side of the input it is built for; other sizes interpolate its position embeddings.
        patch_size (`int`): side of a patch; (image_size / patch_size / scale_factor)² tokens an image.
        scale_factor (`int`): side of the square of patches that becomes one token.
        image_mean (`list[float]`): colour in [0, 1] that becomes zero. From scratch it should be the frames' own mean:
            what all frames share, as PushT's white ground, otherwise drowns what differs within some ten steps.
    """

    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 4
    vision_hidden_size: int = 128
    vision_layers: int = 2
    image_size: int = 96
    patch_size: int = 12
    scale_factor: int = 2
    image_mean: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])


def build_nano(
    config: NanoConfig | None = None, seed: int = 0
) -> tuple[SmolVLMForConditionalGeneration, SmolVLMProcessor]:
    """A randomly initialised SmolVLM with its processor; the same weights for the same seed."""
    config = config or NanoConfig()
    processor = _processor(config)
    tokenizer = processor.tokenizer
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in _SPECIAL}
    torch.manual_seed(seed)
    model = SmolVLMForConditionalGeneration(
        SmolVLMConfig(
            text_config={
                "model_type": "llama",
                "vocab_size": len(tokenizer),
                "hidden_size": config.hidden_size,
                "intermediate_size": config.hidden_size * 3,
                "num_hidden_layers": config.num_layers,
                "num_attention_heads": config.num_heads,
                "num_key_value_heads": config.num_heads,
                "max_position_embeddings": 4096,
                "bos_token_id": ids["<|im_start|>"],
                "eos_token_id": ids["<end_of_utterance>"],
                "pad_token_id": ids["<|pad|>"],
            },
            vision_config={
                "hidden_size": config.vision_hidden_size,
                "intermediate_size": config.vision_hidden_size * 3,
                "num_hidden_layers": config.vision_layers,
                "num_attention_heads": max(1, config.vision_hidden_size // 64),
                "image_size": config.image_size,
                "patch_size": config.patch_size,
            },
            scale_factor=config.scale_factor,
            image_token_id=ids["<image>"],
            pad_token_id=ids["<|pad|>"],
            eos_token_id=ids["<end_of_utterance>"],
            tie_word_embeddings=True,
        )
    )
    return model.to(torch.float32), processor


def _processor(config: NanoConfig) -> SmolVLMProcessor:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*_SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        additional_special_tokens=list(_SPECIAL[3:]),
        clean_up_tokenization_spaces=False,
    )
    side = {"longest_edge": config.image_size}
    return SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(
            size=side, max_image_size=side, do_image_splitting=False, resample=3, image_mean=config.image_mean
        ),
        tokenizer=tokenizer,
        video_processor=SmolVLMVideoProcessor(),
        image_seq_len=(config.image_size // config.patch_size // config.scale_factor) ** 2,
        chat_template=_TEMPLATE,
    )


def nano_from_dict(data: dict | None) -> NanoConfig:
    """A `NanoConfig` from a recipe's `nano:` section; an unknown key raises `ValueError`."""
    unknown = (data or {}).keys() - asdict(NanoConfig()).keys()
    if unknown:
        raise ValueError(f"nano: unknown keys {sorted(unknown)}, known are {sorted(asdict(NanoConfig()))}")
    return NanoConfig(**(data or {}))
