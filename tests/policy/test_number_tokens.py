"""Answers with one token per number: fast decoding writes stock's tokens, and every answer parses."""

import numpy as np
import pytest
import torch
from support.backbones import TINY, observations
from transformers import LogitsProcessorList

from vla0_trl import VLAPolicy
from vla0_trl.models.loading import set_image_size
from vla0_trl.models.nano import NanoConfig, build_nano
from vla0_trl.policy.grammar import ActionGrammarLogitsProcessor
from vla0_trl.policy.speculative import decoder as decoding
from vla0_trl.policy.speculative.decoder import ChunkDecoder
from vla0_trl.policy.speculative.options import DecodingOptions

STEPS = {"all steps": None, "waypoints": [0, 2]}


@pytest.fixture(params=STEPS.values(), ids=STEPS)
def policy(request, example_config) -> VLAPolicy:
    """Random weights, sharpened so that answers depend on the input, and digits may be written as well as numbers."""
    config = example_config.replace(waypoints=request.param)
    model, processor = build_nano(
        NanoConfig(**TINY, number_tokens=True), num_bins=config.num_bins, texts=["Push it.\nState: "]
    )
    set_image_size(processor, model.config, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 1.0))
    return VLAPolicy(model.eval().requires_grad_(False), processor, config)


def generate(policy: VLAPolicy, batch: list[dict], **options) -> torch.Tensor:
    inputs = policy._inputs(batch)
    output = policy.model.generate(**inputs, generation_config=policy.generation_config, **options)
    return output[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("options", [{}, {"forced_tokens": False, "small_head": False, "candidates": False}])
@pytest.mark.parametrize("budget", [12, 1024])
def test_tokens_are_those_of_stock_greedy_decoding(policy, options, budget, monkeypatch):
    """Also with a budget in which all thousand candidates are read at once."""
    monkeypatch.setattr(decoding, "MAX_CANDIDATES", {"cpu": budget})
    monkeypatch.setattr(decoding, "CANDIDATE_SLOTS", budget)
    batch = observations(5, seed=5)
    stock = LogitsProcessorList([ActionGrammarLogitsProcessor(grammar=policy.grammar)])
    expected = generate(policy, batch, logits_processor=stock)
    assert len({row.tobytes() for row in expected.numpy()}) > 2  # else the test would say little
    decoder = ChunkDecoder(policy.grammar, DecodingOptions(**options), period=2)
    assert torch.equal(generate(policy, batch, custom_generate=decoder), expected)
    right = ChunkDecoder(policy.grammar, DecodingOptions(**options))
    drafts = [row.tolist() for row in expected]
    assert torch.equal(generate(policy, batch, custom_generate=right, drafts=drafts), expected)
    assert right.stats.acceptance == 1 and right.stats.passes == 1
    wrong = ChunkDecoder(policy.grammar, DecodingOptions(**options))
    assert torch.equal(generate(policy, batch, custom_generate=wrong, drafts=drafts[::-1]), expected)


def test_answers_become_chunks_with_all_steps(policy):
    batch = observations(3, seed=2)
    chunks = policy.predict_action_chunk(batch)
    assert chunks.shape == (3, 3, 2) and np.isfinite(chunks).all()
    if policy.config.waypoints:
        np.testing.assert_allclose(chunks[:, 1], (chunks[:, 0] + chunks[:, 2]) / 2, rtol=1e-5)
    # The same again, with what was said as a draft.
    np.testing.assert_array_equal(policy.predict_action_chunk(batch), chunks)


def test_other_waypoints_than_a_checkpoints_own_raise(policy):
    other = [0, 2] if policy.config.waypoints is None else None
    with pytest.raises(ValueError, match="this policy was made for waypoints="):
        policy.config = policy.config.replace(waypoints=other)
