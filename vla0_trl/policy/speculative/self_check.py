"""The decoder's check: a model's first chunk is also decoded by stock `generate()`, which goes on if they differ.

Parallel decoding, which writes other answers, is compared with a plain forward pass over rows as in training.

Our decoder uses private parts of transformers (see [`vla0_trl.internals`]). A release that changes them must not stop
a robot, or move it wrongly. The check costs one stock chunk per model and process. All policies of one model object
share its outcome, such as those that roll out during training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from weakref import WeakKeyDictionary

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from vla0_trl.internals import FAST, PARALLEL, STOCK, disagreement, raised, warn_fallback
from vla0_trl.policy.grammar import ActionGrammar, ActionGrammarLogitsProcessor
from vla0_trl.policy.speculative.decoder import ChunkDecoder
from vla0_trl.policy.speculative.options import PromptError
from vla0_trl.policy.speculative.parallel_check import parallel_difference, rounding_share

# Models that were compared, in which mode: None where ours agreed, else what it did instead.
_outcomes: WeakKeyDictionary[PreTrainedModel, dict[str, str | None]] = WeakKeyDictionary()


class SelfCheckError(RuntimeError):
    """Fast decoding does not write what stock `generate()` writes, and `DecodingOptions(check="raise")` insists."""


def way_of_decoding(model: PreTrainedModel, decoder: ChunkDecoder | None) -> str:
    """How the next chunk of this model is decoded: `"stock"` if that is asked for, or if ours failed; or `"parallel"`,
    or `"fast"`."""
    if decoder is None or decoder.options.mode == STOCK:
        return STOCK
    failed = _outcomes.get(model, {}).get(decoder.options.mode) is not None
    if failed and decoder.options.check == "fall_back":
        return STOCK
    return PARALLEL if decoder.options.mode == PARALLEL else FAST


def decode(
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    config: GenerationConfig,
    grammar: ActionGrammar,
    decoder: ChunkDecoder | None,
    drafts: list[list[int] | None] | None = None,
    beginnings: list[list[int]] | None = None,
) -> torch.Tensor:
    """(B, A) answers, padded on the right: ours after its check was passed, else those of stock `generate()`.

    Args:
        inputs: of `generate`: prompts padded on the left, images.
        decoder: None for stock decoding.
        drafts, beginnings: see [`ChunkDecoder`].

    Raises:
        PromptError: prompt and answer don't fit the model's positions.
        SelfCheckError: ours failed, and its options ask for this error.
    """
    begin = [_Beginnings(inputs["input_ids"].shape[1], beginnings)] if beginnings else []
    if way_of_decoding(model, decoder) == STOCK:
        return _stock(model, inputs, config, grammar, *begin)
    more = {"drafts": drafts} | ({"beginnings": beginnings} if beginnings else {})
    if decoder.options.check == "skip":
        return _fast(model, inputs, config, decoder, more)
    outcomes, mode = _outcomes.setdefault(model, {}), decoder.options.mode
    failure, cause, expected = None, None, None
    try:
        answers = _fast(model, inputs, config, decoder, more)
        if mode in outcomes and outcomes[mode] is None:
            return answers
        if mode == PARALLEL:
            failure = parallel_difference(model, inputs, decoder.reader, decoder.reading)
    except PromptError:
        raise
    # Broad on purpose: what a changed library does to our code can't be told in advance, and stock decoding is right
    # without it. Mistakes of users don't get here: observations are checked before, prompts just above.
    except Exception as error:
        failure, cause = raised(error), error
    if mode != PARALLEL:
        scores = _Scores(model, grammar)
        with scores.watching():
            expected = _stock(model, inputs, config, grammar, *begin, scores)
        failure = failure or scores.difference(answers, expected)
    if failure is None:
        outcomes[mode] = None
        return answers
    message = disagreement(f"{way_of_decoding(model, decoder)} decoding", model, failure, ("transformers", "torch"))
    if decoder.options.check == "raise":
        raise SelfCheckError(message) from cause
    outcomes[mode] = failure
    decoder.release()
    warn_fallback(message, "transformers' generate()")
    return _stock(model, inputs, config, grammar, *begin) if expected is None else expected


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
    """The scores that stock decoding gave to each token that the grammar allows; changes nothing."""

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
        rounding = rounding_share(self.weights_dtype, self.dtypes)
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
