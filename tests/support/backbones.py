"""Backbones and tokenizers that are small, or real ones made small, and observations for them."""

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

from support.general import shared_path

TINY = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "vision_hidden_size": 64, "vision_layers": 1}

TINY |= {"image_size": 48, "patch_size": 12}

SMOLVLM, QWEN = "SmolVLM2-500M-Video-Instruct", "Qwen2.5-VL-3B-Instruct"


def observations(count: int, seed: int = 0, cameras=("image",)) -> list[dict]:
    rng = np.random.default_rng(seed)
    tasks = ["Push it.", "Push that thing over there, as far as you can."]
    return [
        {
            "images": {name: rng.integers(0, 256, (48, 48, 3), np.uint8) for name in cameras},
            "state": rng.uniform(0, 511, 2).astype(np.float32),
            "task": tasks[i % 2],
        }
        for i in range(count)
    ]


def shrunk(name: str) -> AutoConfig:
    """A real backbone's architecture and vocabulary, with few and narrow layers."""
    config = AutoConfig.from_pretrained(shared_path(f"data/models/{name}"))
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 32, 64, 2
    text.num_attention_heads = text.num_key_value_heads = 2
    text.head_dim = 16
    if name == QWEN:
        text.layer_types = text.layer_types[:2]
        text.rope_parameters["mrope_section"] = [2, 3, 3]
        vision.depth, vision.hidden_size, vision.intermediate_size, vision.num_heads = 2, 32, 64, 2
        vision.out_hidden_size, vision.fullatt_block_indexes = 32, [1]
    else:
        vision.num_hidden_layers, vision.hidden_size, vision.intermediate_size, vision.num_attention_heads = (
            1,
            32,
            64,
            2,
        )
    return config


class Chat:
    """What the grammar needs of a `ChatTokenizer`, for tokenizers that have no processor around them."""

    def __init__(self, tokenizer, prefix=""):
        self.tokenizer, self.prefix = tokenizer, prefix
        self.end_of_turn_id = tokenizer.eos_token_id


def multi_digit_tokenizer(tokens: list[str]) -> PreTrainedTokenizerFast:
    """A vocabulary of the given texts; Ġ is a space."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *tokens])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


DIGITS = [*"0123456789"]


# Several digits, leading and trailing spaces, two numbers, two spaces (never valid), letters among it.
MULTI = [*DIGITS, "Ġ", "12", "123", "99", "007", "Ġ5", "Ġ51", "5Ġ", "1Ġ2", "Ġ1Ġ2Ġ", "ĠĠ", "a", "1a", "00", "10"]
