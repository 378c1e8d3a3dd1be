"""Policies of random weights whose greedy answers are clear: no two best logits are equal but for rounding."""

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, LogitsProcessorList

from support.backbones import QWEN, SMOLVLM, TINY, shrunk
from support.general import shared_path
from vla0_trl import VLAPolicy
from vla0_trl.actions import NormStats
from vla0_trl.config import VLAConfig
from vla0_trl.models.loading import load_processor
from vla0_trl.models.nano import NanoConfig, build_nano
from vla0_trl.policy.grammar import ActionGrammarLogitsProcessor
from vla0_trl.policy.speculative.decoder import ChunkDecoder
from vla0_trl.policy.speculative.options import DecodingOptions
from vla0_trl.policy.speculative.parallel import ParallelReader

BACKBONES = ["nano", SMOLVLM, QWEN]


def sharpened(model):
    """Random weights whose answers depend on the input, without toss-ups that rounding would decide."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 1.0))
    return model.eval().requires_grad_(False)


def build_policy(name: str) -> VLAPolicy:
    """One of `BACKBONES` for answers of 8 integers in 0…511."""
    stats = NormStats([0.0, 0.0], [511.0, 511.0], [0.0, 0.0], [511.0, 511.0], [0.0, 0.0], [1.0, 1.0], 9)
    config = VLAConfig(
        action_dim=2, state_dim=2, chunk_size=4, use_state=True, image_size=48, action_stats=stats, state_stats=stats
    )
    if name == "nano":
        return VLAPolicy(sharpened(build_nano(NanoConfig(**TINY))[0]), build_nano(NanoConfig(**TINY))[1], config)
    config = config.replace(image_size=224 if name == QWEN else 128)
    processor = load_processor(shared_path(f"data/models/{name}"), config)
    # Qwen's own dtype is bfloat16, in which two of the best logits are equal all too often.
    model = AutoModelForImageTextToText.from_config(shrunk(name), dtype=torch.float32)
    return VLAPolicy(sharpened(model), processor, config)


def generate(policy, batch, **options) -> torch.Tensor:
    """The answers' tokens; without options those of stock decoding under the grammar."""
    inputs = policy._inputs(batch)
    if not options:
        processor = ActionGrammarLogitsProcessor(grammar=policy.grammar)
        options = {"logits_processor": LogitsProcessorList([processor])}
    output = policy.model.generate(**inputs, generation_config=policy.generation_config, **options)
    return output[:, inputs["input_ids"].shape[1] :]


def decoder_of(policy, **options) -> ChunkDecoder:
    return ChunkDecoder(policy.grammar, DecodingOptions(**options), policy.decoder.prefix, 2, policy.decoder.reader)


class Watched(ParallelReader):
    """A reader that keeps the logits from which it chooses."""

    def step(self, node, logits):
        self.seen.append(logits)
        return super().step(node, logits)


def watched_reading(policy, batch, **options):
    """A parallel reading and the logits of each of its steps, float32 (B, N, columns) by token id."""
    reader = Watched(policy.chat_tokenizer, policy.grammar)
    reader.seen = []
    decoder = ChunkDecoder(
        policy.grammar, DecodingOptions(mode="parallel", **options), policy.decoder.prefix, 2, reader
    )
    generate(policy, batch, custom_generate=decoder)
    return reader, decoder, [logits[..., reader.tree.order] for logits in reader.seen]


def row_logits(policy, observation, numbers, hidden, token_ids) -> tuple[int, np.ndarray]:
    """A plain forward pass over a training row: where its answer begins, and logits (L, columns)."""
    inputs = policy._inputs([observation])
    answer, _ = policy.chat_tokenizer.encode_answer(numbers, hidden)
    begin = inputs["input_ids"].shape[1]
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], 1)
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | policy.chat_tokenizer.token_types(ids)
    with torch.no_grad():
        return begin, policy.model(**inputs).logits[0][:, token_ids].numpy()


def assert_equal_logits(ours, theirs) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())
