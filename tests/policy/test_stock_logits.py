"""A stock model reads a text in two ways, on random weights of each backbone: alike but for rounding."""

import re

import pytest
from support.backbones import observations
from support.random_policies import BACKBONES, build_policy

from vla0_trl.policy.speculative.stock_logits import beyond_rounding, read_at_once, read_one_by_one


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
    scores = [(row, place, after) for row, logits in enumerate(at_once) for place, after in enumerate(logits)]
    assert beyond_rounding(scores, at_once, one_by_one) is None
    scores[1] = (0, 1, at_once[0][2])
    message = r"^computed logits for token 1 of row 0 that are [\d.]+ off .* rounding explains \d\.?\d*e-0\d$"
    assert re.match(message, beyond_rounding(scores, at_once, one_by_one))
