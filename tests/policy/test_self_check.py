"""The decoder's check, with the decoder broken on purpose: stock decoding takes over, says so once, and is right."""

import warnings
from importlib.metadata import version

import numpy as np
import pytest
import torch
from support.backbones import TINY, observations
from transformers import Cache, LlamaModel

from vla0_trl import VLAPolicy
from vla0_trl.internals import FallbackWarning
from vla0_trl.models.nano import NanoConfig, build_nano
from vla0_trl.policy.grammar import LogitsError
from vla0_trl.policy.speculative.options import DecodingOptions, PromptError
from vla0_trl.policy.speculative.self_check import SelfCheckError
from vla0_trl.policy.speculative.tree_forward import TreeForward, cache_parameter
from vla0_trl.processing.branches import PassToken


class RenamedCache(LlamaModel):
    """Takes its cache under another name, as all decoders of transformers 5.24 did."""

    def forward(self, *, key_value_store: Cache | None = None, **kwargs):
        if key_value_store is not None:
            kwargs[cache_parameter(LlamaModel)] = key_value_store
        return super().forward(**kwargs)


class UnnamedCache(LlamaModel):
    """Does not say under which name it takes its cache."""

    def forward(self, **kwargs):
        return super().forward(**kwargs)


def build(config, decoder_class: type[LlamaModel] = LlamaModel, **options) -> VLAPolicy:
    model, processor = build_nano(NanoConfig(**TINY), seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # else all answers are alike
    model.get_decoder().__class__ = decoder_class
    return VLAPolicy(model.eval().requires_grad_(False), processor, config, DecodingOptions(**options))


def stock(config, batch: list[dict]) -> np.ndarray:
    policy = build(config)
    policy.decoder = None
    assert policy.decoding == "stock"
    return policy.predict_action_chunk(batch)


@pytest.fixture
def wrong_logits(monkeypatch) -> None:
    """Passes over the model that give each token another's logits."""
    right = TreeForward._logits
    monkeypatch.setattr(TreeForward, "_logits", lambda self, hidden: right(self, hidden).roll(1, -1))


def test_a_renamed_argument_is_found_in_the_signature(example_config):
    batch = observations(3)
    policy = build(example_config, RenamedCache)
    assert np.array_equal(policy.predict_action_chunk(batch), stock(example_config, batch))
    stats = policy.decoder.stats
    assert policy.decoding == "fast" and stats.passes < stats.chunks * policy.grammar.max_new_tokens / 3


def test_a_decoder_that_raises_gives_way_to_stock_decoding(example_config):
    policy = build(example_config, UnnamedCache)
    with pytest.warns(FallbackWarning) as said:
        chunks = policy.predict_action_chunk(observations(3))
    assert np.array_equal(chunks, stock(example_config, observations(3)))
    versions = f"transformers {version('transformers')}, torch {version('torch')}"
    assert [str(warning.message) for warning in said] == [
        f"fast decoding of SmolVLMForConditionalGeneration does not work with {versions}: it raised TypeError: "
        "UnnamedCache.forward takes no Cache. transformers' generate() is used from now on: slower, and right."
    ]
    assert policy.decoding == "stock"


def test_wrong_tokens_are_never_returned_and_said_once_per_model(example_config, wrong_logits):
    policy, batch = build(example_config), observations(2)
    with pytest.warns(
        FallbackWarning, match=r"computed logits for token \d+ of row \d that are [\d.]+ off those of stock decoding"
    ) as said:
        first = policy.predict_action_chunk(batch)
    assert len(said) == 1 and np.array_equal(first, stock(example_config, batch))
    later = VLAPolicy(policy.model, policy.processor, policy.config)  # as each rollout during training makes one
    with warnings.catch_warnings(action="error"):
        for one in (policy, later):
            assert one.decoding == "stock"
            assert np.array_equal(one.predict_action_chunk(observations(4)), stock(example_config, observations(4)))
    assert later.decoder.stats.chunks == 0


def test_a_decoder_that_breaks_later_gives_way_too(example_config, monkeypatch):
    policy = build(example_config)
    policy.predict_action_chunk(observations(1))
    assert policy.decoding == "fast"

    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore about it")

    monkeypatch.setattr(TreeForward, "prompt", out_of_memory)
    with pytest.warns(FallbackWarning, match=r"it raised OutOfMemoryError: CUDA out of memory\. transformers' gen"):
        chunks = policy.predict_action_chunk(observations(3))
    assert np.array_equal(chunks, stock(example_config, observations(3)))
    assert policy.decoding == "stock" and policy.decoder._forward is None


def test_a_model_is_compared_once(example_config, monkeypatch):
    policy, calls = build(example_config), []
    generate = policy.model.generate
    policy.model.generate = lambda **options: calls.append("custom_generate" in options) or generate(**options)
    for _ in range(2):
        policy.predict_action_chunk(observations(1))
    VLAPolicy(policy.model, policy.processor, policy.config).predict_action_chunk(observations(2))
    assert calls == [True, False, True, True]


def test_one_may_insist_on_the_decoder_or_skip_the_check(example_config, wrong_logits):
    batch = observations(2)
    insisting = build(example_config, check="raise")
    for _ in range(2):
        with pytest.raises(
            SelfCheckError, match="fast decoding of SmolVLMForConditionalGeneration does not work with"
        ):
            insisting.predict_action_chunk(batch)
    skipping = build(example_config, check="skip")
    assert not np.array_equal(skipping.predict_action_chunk(batch), stock(example_config, batch))
    assert insisting.decoding == skipping.decoding == "fast"
    with pytest.raises(TypeError, match="takes no Cache"):
        build(example_config, UnnamedCache, check="skip").predict_action_chunk(batch)
    with pytest.raises(ValueError, match="check='no' is none of fall_back, raise, skip"):
        DecodingOptions(check="no")


def deep_in_bfloat16(config, **options) -> VLAPolicy:
    """12 layers in which rounding decides between tokens whose logits are 6 % apart, as on a GPU with 32 layers."""
    model, processor = build_nano(NanoConfig(**(TINY | {"num_layers": 12})), seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return VLAPolicy(model.bfloat16().eval().requires_grad_(False), processor, config, DecodingOptions(**options))


def test_tokens_between_which_rounding_decides_are_no_difference(example_config):
    config = example_config.replace(chunk_size=8)
    policy = deep_in_bfloat16(config)
    with warnings.catch_warnings(action="error"):
        chunks = policy.predict_action_chunk(observations(3))
    assert policy.decoding == "fast"
    stock = deep_in_bfloat16(config, mode="stock").predict_action_chunk(observations(3))
    assert not np.array_equal(chunks, stock)  # else nothing was tested


@pytest.mark.parametrize(
    ("field", "fault"),
    [
        ("position", lambda tokens, last_slot: tokens[..., 1] + 1),
        ("cache_slot", lambda tokens, last_slot: np.where(np.arange(tokens.shape[1]) == 0, last_slot, tokens[..., 2])),
        ("visible_until", lambda tokens, last_slot: tokens[..., 3] - 2),
    ],
    ids=["positions are off by one", "a token is not in the cache", "the token before is hidden"],
)
def test_a_fault_shows_through_rounding(example_config, monkeypatch, field, fault):
    """The same model: what is wrong in these passes is further off than rounding."""
    step = TreeForward.step

    def faulty(self, tokens: np.ndarray) -> np.ndarray:
        tokens = tokens.copy()
        tokens[..., PassToken._fields.index(field)] = fault(tokens, self.capacity - 1)
        return step(self, tokens)

    monkeypatch.setattr(TreeForward, "step", faulty)
    with pytest.warns(FallbackWarning, match="off those of stock decoding, where rounding explains"):
        deep_in_bfloat16(example_config.replace(chunk_size=8)).predict_action_chunk(observations(3))


@pytest.mark.parametrize("mode", ["exact", "parallel", "stock"])
def test_logits_that_are_not_numbers_are_an_error_and_no_answer(example_config, mode):
    policy = build(example_config, mode=mode)
    digit = policy.processor.tokenizer.convert_tokens_to_ids("7")
    with torch.no_grad():
        policy.model.get_output_embeddings().weight[digit] = torch.nan
    with warnings.catch_warnings(action="error"), pytest.raises(LogitsError, match=r"logits are not numbers \(NaN\)"):
        policy.predict_action_chunk(observations(2))


def test_a_users_mistake_stays_one(example_config):
    for mode in ("stock", "parallel", "exact"):
        policy = build(example_config, mode=mode)
        policy.model.config.get_text_config().max_position_embeddings = 40
        with pytest.raises(PromptError, match=r"answer of up to 25 don't fit into the model's 40 positions"):
            policy.predict_action_chunk(observations(1))
    with pytest.raises(ValueError, match="2 dimensions"):
        policy.predict_action_chunk([{**observations(1)[0], "state": np.zeros(3)}])
    assert policy.decoding == "fast"


def test_parallel_decoding_is_compared_with_the_stock_model(example_config, monkeypatch):
    policy, batch = build(example_config, mode="parallel"), observations(3)
    right = policy.predict_action_chunk(batch)
    assert policy.decoding == "parallel" and policy.decoder.stats.passes <= 4
    exact = VLAPolicy(policy.model, policy.processor, policy.config, DecodingOptions(check="raise"))
    assert np.array_equal(exact.predict_action_chunk(batch), stock(example_config, batch))
    step = TreeForward.step
    monkeypatch.setattr(TreeForward, "step", lambda self, tokens: step(self, tokens)[:, ::-1])
    assert not np.array_equal(policy.predict_action_chunk(batch), right)  # it is compared once
    broken = build(example_config, mode="parallel")
    with pytest.warns(
        FallbackWarning, match=r"parallel decoding of Smol.*: it computed logits for token \d+ of row \d"
    ):
        chunks = broken.predict_action_chunk(batch)
    assert broken.decoding == "stock" and np.array_equal(chunks, stock(example_config, batch))


def test_stock_decoding_can_be_asked_for_and_rounds_need_parallel_decoding(example_config):
    policy = build(example_config, mode="stock")
    assert policy.decoding == "stock"
    assert np.array_equal(policy.predict_action_chunk(observations(2)), stock(example_config, observations(2)))
    assert policy.decoder.stats.chunks == 0
    with pytest.raises(ValueError, match=r"refine=1 with exact decoding: .* only parallel decoding has any"):
        DecodingOptions(refine=1)
    with pytest.raises(ValueError, match="mode='fast' is none of exact, parallel, stock"):
        DecodingOptions(mode="fast")
