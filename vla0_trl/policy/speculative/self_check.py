"""The decoder's check: a model's first chunk is also decoded by stock `generate()`, which goes on if they differ.

Our decoder uses transformers' inside (see [`vla0_trl.internals`]); a release that changes it must not stop a robot, or
move it wrongly. The check costs one stock chunk per model and process; its outcome is shared by all policies of
that model object, such as those that roll out during training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from weakref import WeakKeyDictionary

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from vla0_trl.internals import FAST, STOCK, disagreement, raised, warn_fallback
from vla0_trl.policy.grammar import ActionGrammar, ActionGrammarLogitsProcessor
from vla0_trl.policy.speculative.decoder import ChunkDecoder, PromptError

# Two logits that differ by less than this share of the largest one are within rounding of each other. Measured: up to
# 0.9 % in bfloat16; up to 2 % between float32 and bfloat16 autocast, in which every product is rounded otherwise.
ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
AUTOCAST_ROUNDING = 0.1

# Models that were compared: None where ours agreed, else what it did instead.
_outcomes: WeakKeyDictionary[PreTrainedModel, str | None] = WeakKeyDictionary()


class SelfCheckError(RuntimeError):
    """Fast decoding does not write what stock `generate()` writes, and `DecodingOptions(check="raise")` insists."""


def way_of_decoding(model: PreTrainedModel, decoder: ChunkDecoder | None) -> str:
    """How the next chunk of this model is decoded: `"fast"`, or `"stock"` without a decoder or where ours failed."""
    failed = decoder is not None and decoder.options.check == "fall_back" and _outcomes.get(model) is not None
    return STOCK if decoder is None or failed else FAST


def decode(
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    config: GenerationConfig,
    grammar: ActionGrammar,
    decoder: ChunkDecoder | None,
    drafts: list[list[int] | None] | None = None,
    beginnings: list[list[int]] | None = None,
) -> torch.Tensor:
    """(B, A) answers, padded on the right: ours where it has proved itself, else those of stock `generate()`.

    Args:
        inputs: of `generate`: prompts padded on the left, images.
        decoder: None for stock decoding.
        drafts, beginnings: see [`ChunkDecoder`].

    Raises:
        PromptError: prompt and answer don't fit the model's positions.
        SelfCheckError: ours failed, and its options insist on it.
    """
    begin = [_Beginnings(inputs["input_ids"].shape[1], beginnings)] if beginnings else []
    if way_of_decoding(model, decoder) == STOCK:
        return _stock(model, inputs, config, grammar, *begin)
    more = {"drafts": drafts} | ({"beginnings": beginnings} if beginnings else {})
    if decoder.options.check == "skip":
        return _fast(model, inputs, config, decoder, more)
    failure, cause = None, None
    try:
        answers = _fast(model, inputs, config, decoder, more)
    except PromptError:
        raise
    # Broad on purpose: what a changed library does to our code can't be told in advance, and stock decoding is right
    # without it. Mistakes of users don't get here: observations are checked before, prompts just above.
    except Exception as error:
        failure, cause = raised(error), error
    else:
        if model in _outcomes and _outcomes[model] is None:
            return answers
    scores = _Scores(model, grammar)
    with scores.watching():
        expected = _stock(model, inputs, config, grammar, *begin, scores)
    failure = failure or scores.difference(answers, expected)
    if failure is None:
        _outcomes[model] = None
        return answers
    message = disagreement("fast decoding", model, failure, ("transformers", "torch"))
    if decoder.options.check == "raise":
        raise SelfCheckError(message) from cause
    _outcomes[model] = failure
    decoder.release()
    warn_fallback(message, "transformers' generate()")
    return expected


def _fast(model, inputs, config, decoder: ChunkDecoder, more: dict) -> torch.Tensor:
    output = model.generate(**inputs, generation_config=config, custom_generate=decoder, **more)
    return output[:, inputs["input_ids"].shape[1] :]


def _stock(model, inputs, config, grammar: ActionGrammar, *more: LogitsProcessor) -> torch.Tensor:
    processors = LogitsProcessorList([ActionGrammarLogitsProcessor(grammar=grammar), *more])
    output = model.generate(**inputs, generation_config=config, logits_processor=processors)
    return output[:, inputs["input_ids"].shape[1] :]


class _Beginnings(LogitsProcessor):
    """Forces the first tokens of each row's answer, for stock decoding."""

    def __init__(self, prompt_length: int, beginnings: list[list[int]]):
        self.prompt_length, self.beginnings = prompt_length, beginnings

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        place = input_ids.shape[1] - self.prompt_length
        for row, tokens in enumerate(self.beginnings):
            if place < len(tokens):
                scores[row] = -torch.inf
                scores[row, tokens[place]] = 0.0
        return scores


class _Scores(LogitsProcessor):
    """What stock decoding thought of each token that the grammar allowed; changes nothing."""

    def __init__(self, model: PreTrainedModel, grammar: ActionGrammar):
        self.head, self.end = model.get_output_embeddings(), grammar.end_of_turn_id
        self.token_ids = torch.as_tensor(grammar.token_ids)
        self.steps: list[torch.Tensor] = []  # float32 (B, columns) each
        self.weights_dtype, self.dtypes = model.dtype, set()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.steps.append(scores[:, self.token_ids.to(scores.device)].float().cpu())
        return scores

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note in which dtype logits are computed: under autocast in training it is not that of the weights."""
        hook = self.head.register_forward_hook(lambda module, args, logits: self.dtypes.add(logits.dtype))
        try:
            yield
        finally:
            hook.remove()

    def difference(self, answers: torch.Tensor, expected: torch.Tensor) -> str | None:
        """Where (B, A) answers first leave the expected ones, unless rounding decided there; None if nowhere."""
        column = {token: column for column, token in enumerate(self.token_ids.tolist())}
        same = self.dtypes == {self.weights_dtype}
        rounding = ROUNDING.get(self.weights_dtype, AUTOCAST_ROUNDING) if same else AUTOCAST_ROUNDING
        for row, (ours, theirs) in enumerate(zip(answers.tolist(), expected.tolist(), strict=True)):
            theirs = theirs[: theirs.index(self.end) + 1]
            pairs = enumerate(zip_longest(ours[: len(theirs)], theirs))
            place = next((place for place, (our, their) in pairs if our != their), None)
            if place is None:
                continue
            our = ours[place] if place < len(ours) else None
            scores = self.steps[place][row]
            best, largest = scores.max().item(), scores[scores.isfinite()].abs().max().item()
            other = scores[column[our]].item() if our in column else -torch.inf
            if best - other > rounding * largest:
                return (
                    f"wrote token {our} where stock decoding wrote {theirs[place]} (row {row}, place {place}; logits "
                    f"{other:.6g} and {best:.6g}, further apart than rounding explains)"
                )
        return None
