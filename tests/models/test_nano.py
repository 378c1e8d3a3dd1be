"""The nano backbone."""

import numpy as np
import pytest
import torch
from support.backbones import TINY
from support.episodes import DotSource

from vla0_trl.data.chat_dataset import load_chat_dataset
from vla0_trl.models.loading import load_processor, set_image_size
from vla0_trl.models.nano import NanoConfig, build_nano, nano_from_dict
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


SIZES = {
    "hidden_size": 128, "num_layers": 3, "num_heads": 8, "rope_theta": 100.0, "vision_hidden_size": 96,
    "vision_layers": 1, "vision_num_heads": 3, "vision_intermediate_size": 192, "scale_factor": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def policy():
    """The backbone of recipes/pusht/policy.yaml for integers up to 100."""
    return build_nano(NanoConfig(**SIZES, number_tokens=True), num_bins=100, texts=["Push it.\nState: "])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"numbers": True}, "nano: unknown keys"),
        ([1], r"nano: found \[1\], wanted an object"),
        ("{", "nano: found '{', wanted an object"),
        ({"hidden_size": -1}, "nano: hidden_size is -1, wanted a whole number from 1 to 8192"),
        ({"hidden_size": 1e30}, "nano: hidden_size is 1e\\+30, wanted"),
        ({"hidden_size": True}, "nano: hidden_size is True, wanted"),
        ({"hidden_size": 10, "num_heads": 4}, "nano: hidden_size=10 must be a multiple of 2 · num_heads"),
        ({"num_layers": 10**6}, "nano: num_layers is 1000000, wanted a whole number from 1 to 100"),
        ({"image_size": 12}, "nano: image_size=12 must be at least patch_size · scale_factor"),
        ({"image_std": [0, 1, 1]}, "each a number above 0"),
        ({"image_mean": "grey"}, "nano: image_mean is 'grey', wanted a list of 3 values"),
        ({"rope_theta": float("nan")}, "nano: rope_theta is nan"),
    ],
)
def test_values_that_can_not_be(data, message):
    with pytest.raises(ValueError, match=message) as error:
        nano_from_dict(data)
    assert "\n" not in str(error.value)


def test_sizes(policy):
    model, processor = policy
    of_vocabulary = 128 * len(processor.tokenizer)  # embeddings, which are the head, too
    assert sum(parameter.numel() for parameter in model.parameters()) - of_vocabulary == 1_548_992


def test_numbers_and_words_are_one_token_each_and_all_text_round_trips(policy):
    tokenizer = policy[1].tokenizer
    text = "Push it.\nState: 0 7 100 007 101 1e3  x \nPush ünder it."
    tokens = tokenizer.tokenize(text)
    assert tokens[:7] == ["Push", "Ġit.", "Ċ", "State:", "Ġ0", "Ġ7", "Ġ100"]
    assert tokens[7:11] == ["Ġ", "0", "0", "7"]  # no integer as `join_integers` writes it: bytes
    assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text
