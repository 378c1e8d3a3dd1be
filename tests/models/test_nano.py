"""The nano backbone."""

import numpy as np
import pytest
import torch
from support.backbones import TINY
from support.episodes import DotSource
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vla0_trl.data.chat_dataset import load_chat_dataset
from vla0_trl.models.loading import load_processor, set_image_size
from vla0_trl.models.nano import NanoConfig, build_nano, nano_from_dict
from vla0_trl.models.nano_init import number_code
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
def coded():
    """The backbone of recipes/pusht/policy.yaml for integers up to 100."""
    return build_nano(NanoConfig(**SIZES, number_tokens=True, init="code"), num_bins=100, texts=["Push it.\nState: "])


def test_the_number_code_is_smooth_and_survives_in_the_embeddings(coded):
    model, processor = coded
    code = number_code(101)
    assert code.shape == (101, 33)
    assert code[:, 0].tolist() == pytest.approx([1.7 * ((n + 0.5) / 101 * 2 - 1) for n in range(101)])
    assert code[50, 1] == 0.0 and code[50, 17].item() == pytest.approx(1.4)  # sin 0 and cos 0, half a turn over all
    ids = [processor.tokenizer.convert_tokens_to_ids(f"Ġ{number}") for number in range(101)]
    embeddings = model.get_input_embeddings().weight[ids]
    # The mix of dimensions is orthogonal, so angles between numbers are those of their codes; dimension 0 is no code.
    gram, expected = embeddings[:, 1:] @ embeddings[:, 1:].T, code @ code.T * 128 / 33
    assert torch.corrcoef(torch.stack([gram.flatten(), expected.flatten()]))[0, 1] > 0.99
    assert (model.get_input_embeddings().weight[:, 0] == 4).all()
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_positions_of_the_image_are_sines_of_row_and_column(coded):
    positions = coded[0].model.vision_model.embeddings.position_embedding.weight.view(8, 8, 96)
    assert torch.equal(positions[:, 0, :48], positions[:, 7, :48]) and torch.equal(
        positions[0, :, 48:], positions[7, :, 48:]
    )
    assert positions[2, 0, 0].item() == pytest.approx(np.sin(np.pi / 2 * (2.5 / 8 * 2 - 1)), abs=1e-6)
    assert torch.equal(positions[3, 3, :48], positions[3, 3, 48:])


@pytest.mark.parametrize("shift", [0, 3, 7])
def test_shift_heads_look_that_many_tokens_back(coded, shift):
    """Before training, from a constant input: the head's largest score is for that key."""
    model, _ = coded
    text_model = model.model.text_model
    hidden = torch.zeros(1, 20, 128)
    hidden[..., 0] = 4.0
    layer = text_model.layers[1]
    queries, keys = (
        linear(layer.input_layernorm(hidden)).view(1, 20, 8, 16).transpose(1, 2)
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    )
    queries, keys = apply_rotary_pos_emb(queries, keys, *text_model.rotary_emb(hidden, torch.arange(20)[None]))
    scores = (queries @ keys.mT)[0, shift, 19, :]
    assert scores.argmax().item() == 19 - shift
    assert (scores.softmax(-1)[19 - shift] > 0.9).item()


def test_the_image_reaches_every_token_behind_it_from_the_start(coded):
    model, _ = coded
    torch.manual_seed(0)
    ids = torch.tensor([[1, 3, 2, 300, 301, 302]])
    pixels = torch.randn(2, 1, 1, 3, 96, 96)
    with torch.no_grad():
        first, second = (model(input_ids=ids, pixel_values=image).logits for image in pixels)
    moved = (first - second).abs().amax((0, 2))
    assert moved[0] == 0 and (moved[1:] > 1e-4).all()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"init": "zeros"}, "nano: init='zeros' must be one of"),
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


def test_sizes(coded):
    model, processor = coded
    of_vocabulary = 2 * 128 * len(processor.tokenizer)  # embeddings, and a head of its own
    assert sum(parameter.numel() for parameter in model.parameters()) - of_vocabulary == 1_548_992


def test_numbers_and_words_are_one_token_each_and_all_text_round_trips(coded):
    tokenizer = coded[1].tokenizer
    text = "Push it.\nState: 0 7 100 007 101 1e3  x \nPush ünder it."
    tokens = tokenizer.tokenize(text)
    assert tokens[:7] == ["Push", "Ġit.", "Ċ", "State:", "Ġ0", "Ġ7", "Ġ100"]
    assert tokens[7:11] == ["Ġ", "0", "0", "7"]  # no integer as `join_integers` writes it: bytes
    assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text
