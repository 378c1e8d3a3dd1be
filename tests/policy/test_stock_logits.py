"""A stock model reads a text in two ways, on random weights of each backbone: alike but for rounding."""

import numpy as np
import pytest
from support.backbones import observations
from support.random_policies import BACKBONES, build_policy

from vla0_trl.policy.speculative.stock_logits import read_at_once, read_one_by_one, rounding


@pytest.mark.parametrize("name", BACKBONES)
def test_prompts_and_texts_of_any_length_are_read_alike(name):
    policy = build_policy(name)
    inputs = policy._inputs(observations(3, seed=4))  # prompts of two lengths
    numbers = [[7, 0, 511, 23, 4], [], [401, 3]]
    texts = [policy.chat_tokenizer.encode_beginning(some) for some in numbers]
    texts[1] = [policy.grammar.end_of_turn_id]
    ids = policy.grammar.token_ids
    at_once = read_at_once(policy.model, inputs, texts, ids)
    one_by_one = read_one_by_one(policy.model, inputs, policy.generation_config, texts, ids)
    shapes = [(len(text) + 1, len(ids)) for text in texts]
    assert [logits.shape for logits in at_once] == [logits.shape for logits in one_by_one] == shapes
    largest = max(np.abs(logits).max() for logits in at_once)
    assert 0 < rounding(at_once, one_by_one) < 1e-4 * largest
    rolled = [np.roll(logits, 1, 0) for logits in at_once]
    assert rounding(rolled, one_by_one) > 0.1 * largest  # else equal logits would say nothing
