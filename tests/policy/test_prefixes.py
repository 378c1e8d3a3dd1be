"""Chunks that begin with given actions: the tokens of stock `generate()` with those of the prefix forced."""

import numpy as np
import pytest
import torch
from support.backbones import observations
from support.random_policies import BACKBONES, build_policy
from transformers import LogitsProcessor, LogitsProcessorList

from vla0_trl import VLAPolicy
from vla0_trl.actions import parse_integers
from vla0_trl.policy.grammar import ActionGrammarLogitsProcessor
from vla0_trl.policy.speculative import decoder as decoding
from vla0_trl.policy.speculative.draft_state import DraftState


@pytest.fixture(scope="module", params=BACKBONES)
def policy(request):
    return build_policy(request.param)


class Forced(LogitsProcessor):
    """The first tokens of each row."""

    def __init__(self, prompt_length: int, beginnings: list[list[int]]):
        self.prompt_length, self.beginnings = prompt_length, beginnings

    def __call__(self, input_ids, scores):
        place = input_ids.shape[1] - self.prompt_length
        for row, ids in enumerate(self.beginnings):
            if place < len(ids):
                only = torch.full_like(scores[row], -torch.inf)
                only[ids[place]] = 1.0
                scores[row] = only
        return scores


def forced_chunks(policy, batch: list[dict], texts: list[str]) -> np.ndarray:
    """Chunks of stock `generate()`, whose answers begin with these texts."""
    inputs = policy._inputs(batch)
    length = inputs["input_ids"].shape[1]
    lead = policy.chat_tokenizer.prefix
    ids = [policy.processor.tokenizer(lead + t, add_special_tokens=False)["input_ids"] if t else [] for t in texts]
    processors = [ActionGrammarLogitsProcessor(grammar=policy.grammar), Forced(length, ids)]
    output = policy.model.generate(
        **inputs, generation_config=policy.generation_config, logits_processor=LogitsProcessorList(processors)
    )
    written = policy.processor.tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
    return np.stack([parse_integers(text, 8, 511).reshape(4, 2) for text in written]).astype(np.float32)


@pytest.mark.parametrize("stock", [False, True], ids=["fast", "stock"])
def test_answers_are_those_of_stock_generate_with_the_prefix_forced(policy, stock, monkeypatch):
    monkeypatch.setattr(decoding, "MAX_CANDIDATES", {"cpu": 512})
    monkeypatch.setattr(decoding, "MAX_DRAFTED", {"cpu": 1024})
    batch = observations(4, seed=5)
    prefixes = [np.random.default_rng(d).integers(0, 512, (d, 2)).astype(np.float32) for d in range(4)]
    texts = [" ".join(str(int(value)) for value in prefix.ravel()) for prefix in prefixes]
    expected = forced_chunks(policy, batch, texts)
    if stock:
        monkeypatch.setattr(policy, "decoder", None)
    chunks = policy.predict_action_chunk(batch, prefixes)
    assert np.array_equal(chunks, expected)
    for observation, prefix, chunk in zip(batch, prefixes, expected, strict=True):
        assert np.array_equal(policy.predict_action_chunk([observation], [prefix])[0], chunk)
    # The prefix reaches the model: without it, it writes something else.
    free = policy.predict_action_chunk(batch)
    assert any(not np.array_equal(a[3:], b[3:]) for a, b in zip(free[1:], chunks[1:], strict=True))


def test_no_prefix_changes_nothing_and_a_long_one_saves_passes():
    policy = build_policy("nano")
    batch = observations(2, seed=7)
    free = policy.predict_action_chunk(batch)
    for nothing in ([None, None], [np.zeros((0, 2)), None]):
        policy.reset()
        assert np.array_equal(policy.predict_action_chunk(batch, nothing), free)
    passes = []
    for d in range(4):
        policy.reset()
        before = policy.decoder.stats.passes
        # What the model would have written anyhow: the rest is the same, too.
        assert np.array_equal(policy.predict_action_chunk(batch[:1], [free[0, :d]]), free[:1])
        passes.append(policy.decoder.stats.passes - before)
    assert passes == sorted(passes, reverse=True) and passes[3] < passes[0] / 2


def test_relative_prefixes_are_counted_from_the_new_state(example_config):
    policy = build_policy("nano")
    relative = VLAPolicy(policy.model, policy.processor, policy.config.replace(relative_actions=True))
    (observation,) = observations(1, seed=3)
    state = observation["state"]
    prefix = np.float32([[7.0, 300.0]]) + state
    chunk = relative.predict_action_chunk([observation], [prefix])[0]
    assert np.array_equal(chunk[:1], prefix)
    np.testing.assert_allclose(chunk[1:], forced_chunks(policy, [observation], ["7 300"])[0, 1:] + state, rtol=1e-6)


def test_of_waypoints_those_before_the_prefix_ends_are_set():
    every = build_policy("nano")
    # The same eight integers: steps 0, 2, 4 and 7 of eight.
    config = every.config.replace(chunk_size=8, waypoints=[0, 2, 4, 7], n_action_steps=8)
    policy = VLAPolicy(every.model, every.processor, config)
    (observation,) = observations(1, seed=4)
    prefix = np.float32([[10, 20], [30, 40], [50, 60], [70, 80]])
    chunk = policy.predict_action_chunk([observation], [prefix])[0]
    written = forced_chunks(every, [observation], ["10 20 50 60"])[0]
    assert np.array_equal(chunk[:4], prefix)
    assert np.array_equal(chunk[[4, 7]], written[2:])


def test_a_draft_continues_where_the_prefix_is_in_the_last_chunk():
    policy = build_policy("nano")
    (observation,) = observations(1)
    last = np.float32([[1, 2], [3, 4], [5, 6], [7, 8]])
    policy._sessions.remember(["robot"], [last])
    shifted = np.concatenate([last[2:], last[[3, 3]]])
    expected = policy.chat_tokenizer.encode_answer(shifted.astype(int).ravel())[0]
    assert policy._draft("robot", observation, last[2:3]) == expected


@pytest.mark.parametrize(
    "prefixes, message",
    [
        ([], "0 prefixes for 1 observations"),
        ([np.zeros(2)], r"a prefix must be \(d, 2\) finite numbers, got shape \(2,\)"),
        ([np.full((1, 2), np.nan)], "finite numbers"),
        ([np.zeros((4, 2))], "a prefix of 4 actions leaves nothing to predict of chunk_size=4: give at most 3"),
    ],
)
def test_a_prefix_that_does_not_fit_is_one_line(prefixes, message):
    policy = build_policy("nano")
    with pytest.raises(ValueError, match=message):
        policy.predict_action_chunk(observations(1), prefixes)


def test_tokens_outside_the_grammar_begin_no_answer():
    policy = build_policy("nano")
    row = DraftState(policy.decoder._speller)
    space, five = policy.chat_tokenizer.encode_beginning([5])
    with pytest.raises(ValueError, match=f"{five}, at 3, must not follow"):
        row.begin_with([space, five, five, five])  # the largest number is 511
