"""Our decoding writes exactly the tokens of stock greedy decoding under the grammar, on random weights."""

import logging

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.backbones import DIGITS, MULTI, Chat, multi_digit_tokenizer, observations
from support.random_policies import BACKBONES, build_policy, generate, sharpened
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessorList

from vla0_trl import VLAPolicy
from vla0_trl.policy.grammar import ActionGrammar, ActionGrammarLogitsProcessor
from vla0_trl.policy.speculative import decoder as decoding
from vla0_trl.policy.speculative.decoder import ChunkDecoder
from vla0_trl.policy.speculative.options import DecodingOptions
from vla0_trl.policy.speculative.tree_forward import TreeForward
from vla0_trl.processing.branches import PassToken

OPTIONS = {
    "all": {},
    "no forced tokens": {"forced_tokens": False},
    "whole head": {"small_head": False},
    "no candidates": {"candidates": False},
    "no prefix": {"reuse_prefix": False},
    "nothing": {"forced_tokens": False, "small_head": False, "candidates": False, "reuse_prefix": False},
}


@pytest.fixture(scope="module", params=BACKBONES)
def policy(request):
    """A policy for 8 values of a random backbone: its own tokenizer, its own kind of positions."""
    return build_policy(request.param)


@pytest.fixture(autouse=True)
def budget_of_a_gpu(monkeypatch) -> None:
    """Candidates and drafts also where a batch is too large for them on a CPU."""
    monkeypatch.setattr(decoding, "MAX_CANDIDATES", {"cpu": 512})
    monkeypatch.setattr(decoding, "MAX_DRAFTED", {"cpu": 1024})


def answer(policy, tokens) -> list[int]:
    tokens = tokens.tolist()
    return tokens[: tokens.index(policy.chat_tokenizer.end_of_turn_id) + 1]


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_tokens_are_those_of_stock_greedy_decoding(policy, options, size):
    batch = observations(size, seed=size)
    expected = generate(policy, batch)
    assert len({row.tobytes() for row in expected.numpy()}) > size // 2  # else the test would say little
    decoder = ChunkDecoder(policy.grammar, DecodingOptions(**options), policy.decoder.prefix, period=2)
    for _ in range(2):
        assert torch.equal(generate(policy, batch, custom_generate=decoder), expected)
    written = 2 * sum(len(answer(policy, row)) for row in expected)
    assert decoder.stats.chunks == 2 * size
    if not any(options.values()) and "candidates" not in options and "forced_tokens" not in options:
        assert decoder.stats.passes < 0.6 * written / size


def test_rows_of_a_batch_are_what_they_are_alone(policy):
    """Rows finish at different times, and their prompts differ in length."""
    batch = observations(6, seed=9)
    together = generate(policy, batch, custom_generate=policy.decoder)
    lengths = [len(answer(policy, row)) for row in together]
    assert len(set(lengths)) > 1
    for observation, row in zip(batch, together, strict=True):
        alone = generate(policy, [observation], custom_generate=policy.decoder)[0]
        assert answer(policy, row) == answer(policy, alone)


def draft_like(policy, tokens: list[int], kind: str) -> list[int] | None:
    """The answer itself, one with a few other digits, an unrelated one, or something that is not an answer."""
    if kind in ("right", "none"):
        return tokens if kind == "right" else None
    text = policy.processor.tokenizer.decode(tokens, skip_special_tokens=True).split()
    numbers = np.array([int(number) for number in text])
    if kind == "near":
        numbers[1::3] = np.clip(numbers[1::3] + 3, 0, 511)
    elif kind == "far":
        numbers = 511 - numbers
    elif kind == "garbage":
        return [policy.chat_tokenizer.pad_id, *tokens[3:], *tokens]
    return policy.chat_tokenizer.encode_answer(numbers)[0]


@pytest.mark.parametrize(
    "kinds", [["right"], ["near"], ["far"], ["garbage"], ["right", "none", "far", "near", "garbage"]]
)
def test_drafts_never_change_an_answer(policy, kinds):
    batch = observations(len(kinds), seed=3)
    expected = generate(policy, batch)
    drafts = [draft_like(policy, answer(policy, row), kind) for row, kind in zip(expected, kinds, strict=True)]
    without = ChunkDecoder(policy.grammar, DecodingOptions(drafts=False))
    assert torch.equal(generate(policy, batch, custom_generate=without, drafts=drafts), expected)
    assert without.stats.drafted == 0
    for candidates in (True, False):
        decoder = ChunkDecoder(policy.grammar, DecodingOptions(candidates=candidates))
        assert torch.equal(generate(policy, batch, custom_generate=decoder, drafts=drafts), expected)
        if kinds == ["right"]:
            assert decoder.stats.passes == 1 and decoder.stats.acceptance == 1
    if kinds == ["near"]:
        assert decoder.stats.passes < 8 and decoder.stats.accepted > 12  # it rejoins the draft after each other number


def test_adapters_are_decoded_with(policy):
    """LoRA on all linear layers, and on the head as well, which then is no plain matrix any more."""
    for targets in ("all-linear", ["q_proj", "v_proj", "lm_head"]):
        config = LoraConfig(r=4, lora_alpha=64, target_modules=targets, init_lora_weights=False)
        torch.manual_seed(2)
        base = policy.model
        adapted = VLAPolicy.__new__(VLAPolicy)
        adapted.__dict__.update(policy.__dict__)
        adapted.model = get_peft_model(base, config).eval()
        batch = observations(3, seed=4)
        try:
            expected = generate(adapted, batch)
            assert torch.equal(generate(adapted, batch, custom_generate=policy.decoder), expected)
            drafts = [answer(policy, row) for row in expected]
            assert torch.equal(generate(adapted, batch, custom_generate=policy.decoder, drafts=drafts), expected)
        finally:
            adapted.model.unload()
        assert not torch.equal(generate(policy, batch), expected)


def text_model(vocabulary: int, **changes) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": vocabulary, "max_position_embeddings": 128} | changes
    torch.manual_seed(0)
    return sharpened(LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=None, eos_token_id=1, pad_token_id=0)))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tokens", [MULTI, [*DIGITS, "Ġ5", "Ġ51"]], ids=["multi-digit", "dead ends"])
@pytest.mark.parametrize("prefix", ["", " "])
def test_tokens_of_several_digits(tokens, prefix, attention):
    chat = Chat(multi_digit_tokenizer(tokens), prefix if tokens is MULTI else "")
    grammar = ActionGrammar(chat, 6, 511)
    model = text_model(len(chat.tokenizer) + 3)
    model.set_attn_implementation(attention)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=grammar.max_new_tokens, eos_token_id=1, pad_token_id=0, bos_token_id=None
    )
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(8, 7, dtype=torch.long)
    mask[::2, :3] = 0
    prompts = torch.randint(2, len(chat.tokenizer), (8, 7), generator=generator).masked_fill(mask == 0, 0)
    inputs = {"input_ids": prompts, "attention_mask": mask, "generation_config": config}
    processor = LogitsProcessorList([ActionGrammarLogitsProcessor(grammar=grammar)])
    expected = model.generate(**inputs, logits_processor=processor)
    for options in OPTIONS.values():
        decoder = ChunkDecoder(grammar, DecodingOptions(**options), period=2)
        assert torch.equal(model.generate(**inputs, custom_generate=decoder), expected)
    drafts = [row[7:].tolist() for row in expected.roll(1, 0)]
    assert torch.equal(model.generate(**inputs, custom_generate=decoder, drafts=drafts), expected)


def test_a_frozen_models_prefix_is_read_once_and_a_trained_ones_never(policy, monkeypatch):
    decoder = ChunkDecoder(policy.grammar, prefix=policy.decoder.prefix)
    monkeypatch.setattr("vla0_trl.policy.speculative.decoder.SHORTEST_PREFIX", 2)
    reads, read = [], TreeForward.read_separately
    monkeypatch.setattr(TreeForward, "read_separately", lambda self, ids, at: reads.append(ids) or read(self, ids, at))
    batch = observations(4, seed=6)
    expected = generate(policy, batch)
    for _ in range(2):
        assert torch.equal(generate(policy, batch, custom_generate=decoder), expected)
    assert [ids.tolist() for ids in reads] == [[decoder.prefix]] and len(decoder.prefix) >= 2
    parameter = next(policy.model.parameters()).requires_grad_(True)
    decoder._prefix = None
    assert torch.equal(generate(policy, batch, custom_generate=decoder), expected) and len(reads) == 1
    parameter.requires_grad_(False)
    elsewhere = ChunkDecoder(policy.grammar, prefix=[7, 7, 7])
    assert torch.equal(generate(policy, batch, custom_generate=elsewhere), expected) and len(reads) == 1


def test_caches_of_several_batch_sizes_are_kept(policy):
    decoder = ChunkDecoder(policy.grammar)
    batches = {size: observations(size, seed=size) for size in (1, 2, 3)}
    expected = {size: generate(policy, batch) for size, batch in batches.items()}
    for kept, same in ((1, {1: True, 2: False}), (2, {1: True, 2: True}), (2, {3: False, 1: True, 2: False})):
        decoder.kept_batch_sizes = kept
        for size in (2, 1):
            generate(policy, batches[size], custom_generate=decoder)
        before = dict(decoder._kept)
        for size, reused in same.items():
            assert torch.equal(generate(policy, batches[size], custom_generate=decoder), expected[size])
            assert (decoder._forward is before.get(size)) == reused and len(decoder._kept) <= kept
    decoder.release()
    assert not decoder._kept


def test_changed_weights_are_noticed(policy):
    batch = observations(2, seed=8)
    before = generate(policy, batch, custom_generate=policy.decoder)
    head = policy.model.get_output_embeddings().weight
    saved = head.clone()
    try:
        with torch.no_grad():
            head.copy_(saved.flip(0))
        expected = generate(policy, batch)
        assert torch.equal(generate(policy, batch, custom_generate=policy.decoder), expected)
        assert not torch.equal(before, expected)
    finally:
        with torch.no_grad():
            head.copy_(saved)


def test_too_long_a_prompt_and_drafts_of_another_batch_raise():
    chat = Chat(multi_digit_tokenizer(MULTI))
    grammar = ActionGrammar(chat, 6, 511)
    model = text_model(len(chat.tokenizer), max_position_embeddings=30)
    config = GenerationConfig(max_new_tokens=grammar.max_new_tokens, pad_token_id=0, eos_token_id=1)
    with pytest.raises(ValueError, match="prompt of 9 tokens and an answer of up to 25 don't fit"):
        model.generate(torch.full((1, 9), 3), generation_config=config, custom_generate=ChunkDecoder(grammar))
    with pytest.raises(ValueError, match="2 drafts for 1 prompts"):
        model.generate(
            torch.full((1, 4), 3), generation_config=config, custom_generate=ChunkDecoder(grammar), drafts=[None, None]
        )


def test_out_of_memory_during_capture_falls_back_and_says_so_once(policy, monkeypatch, caplog):
    """There is no GPU here: the capture itself is made to fail, the rest is real."""
    decoder = ChunkDecoder(policy.grammar)
    tried, init = [], TreeForward.__init__

    def with_graphs(self, *args, **options):
        init(self, *args, **options)
        self._use_graphs = True

    monkeypatch.setattr(TreeForward, "__init__", with_graphs)
    monkeypatch.setattr(
        torch.cuda,
        "Stream",
        lambda: tried.append(1) or (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")),
    )
    batch = observations(2, seed=1)
    expected = generate(policy, batch)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(generate(policy, batch, custom_generate=decoder), expected)
    assert len(tried) == 1
    assert [r.message for r in caplog.records if "CUDA graphs are off" in r.message] == [
        "CUDA graphs are off, passes are launched one by one: CUDA out of memory"
    ]


class Recorded:
    """A CUDA graph's stand-in: it replays a pass on the tensors that it was recorded with."""

    def __init__(self, passes, inputs, logits):
        self.passes, self.inputs, self.logits = passes, inputs, logits

    def replay(self):
        self.logits.copy_(self.passes._step(self.inputs, self.passes.capacity))


def test_captured_passes_are_padded_to_few_widths(policy, monkeypatch):
    def capture(self, width):
        inputs = torch.zeros(self.rows, width, len(PassToken._fields), dtype=torch.int64)
        self._graphs[width] = Recorded(self, inputs, torch.zeros(self.rows, width, len(self.token_ids))), inputs, None
        self._graphs[width] = (*self._graphs[width][:2], self._graphs[width][0].logits)
        captured.append(width)
        return True

    captured, init = [], TreeForward.__init__

    def with_graphs(self, *args, **options):
        init(self, *args, **options)
        self._use_graphs = True

    monkeypatch.setattr(TreeForward, "__init__", with_graphs)
    monkeypatch.setattr(TreeForward, "_capture", capture)
    batch = observations(3, seed=2)
    expected = generate(policy, batch)
    assert torch.equal(generate(policy, batch, custom_generate=ChunkDecoder(policy.grammar)), expected)
    assert 1 <= len(captured) <= 4 and len(set(captured)) == len(captured)
