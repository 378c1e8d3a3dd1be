"""The decoder's check: a model's first chunk is also decoded by stock `generate()`, which goes on if they differ.

Parallel decoding, which writes other answers, is compared with a plain forward pass over rows as in training.

Our decoder uses private parts of transformers (see [`vla0_trl.internals`]). A release that changes them must not stop
a robot, or move it wrongly. The check costs one stock chunk per model and process. All policies of one model object
share its outcome, such as those that roll out during training.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from vla0_trl.internals import FAST, PARALLEL, STOCK, disagreement, raised, warn_fallback
from vla0_trl.policy.grammar import ActionGrammar, ActionGrammarLogitsProcessor
from vla0_trl.policy.speculative.decoder import ChunkDecoder
from vla0_trl.policy.speculative.options import PromptError, check_length
from vla0_trl.policy.speculative.parallel_check import parallel_difference
from vla0_trl.policy.speculative.stock_logits import (
    AddedNoise,
    ForcedBeginnings,
    read_at_once,
    read_one_by_one,
    rounding,
)

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
    noise: np.ndarray | None = None,
) -> torch.Tensor:
    """(B, A) answers, padded on the right: ours after its check was passed, else those of stock `generate()`.

    Args:
        inputs: of `generate`: prompts padded on the left, images.
        decoder: None for stock decoding.
        drafts, beginnings, noise: see [`ChunkDecoder`].

    Raises:
        PromptError: prompt and answer don't fit the model's positions.
        LogitsError: the model's logits are NaN.
        SelfCheckError: ours failed, and its options ask for this error.
    """
    length, limit = inputs["input_ids"].shape[1], model.config.get_text_config().max_position_embeddings
    check_length(length, grammar.max_new_tokens, limit)
    begin = [] if noise is None else [AddedNoise(length, grammar.token_ids, noise)]
    begin += [ForcedBeginnings(length, beginnings)] if beginnings else []
    if way_of_decoding(model, decoder) == STOCK:
        return _stock(model, inputs, config, grammar, *begin)
    more = {"drafts": drafts, "beginnings": beginnings, "noise": noise}
    if decoder.options.check == "skip":
        return _fast(model, inputs, config, decoder, more)
    outcomes, mode = _outcomes.setdefault(model, {}), decoder.options.mode
    failure, cause, expected = None, None, None
    try:
        answers = _fast(model, inputs, config, decoder, more)
        if mode in outcomes and outcomes[mode] is None:
            return answers
        if mode == PARALLEL:
            failure = parallel_difference(model, inputs, config, decoder.reader, decoder.reading)
        else:
            expected = _stock(model, inputs, config, grammar, *begin)
            failure = _difference(model, inputs, config, decoder, answers, expected)
    except PromptError:
        raise
    # Broad on purpose: what a changed library does to our code can't be told in advance, and stock decoding is right
    # without it. Mistakes of users don't get here: observations are checked before, prompts just above.
    except Exception as error:
        failure, cause = raised(error), error
    if failure is None:
        outcomes[mode] = None
        return answers
    if expected is None:
        expected = _stock(model, inputs, config, grammar, *begin)  # raises where the model is at fault, not ours
    message = disagreement(f"{way_of_decoding(model, decoder)} decoding", model, failure, ("transformers", "torch"))
    if decoder.options.check == "raise":
        raise SelfCheckError(message) from cause
    outcomes[mode] = failure
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


def _difference(
    model, inputs, config, decoder: ChunkDecoder, answers: torch.Tensor, expected: torch.Tensor
) -> str | None:
    """Where (B, A) answers leave the expected ones for more than rounding; None if nowhere.

    Where tokens differ, all logits that chose ours are compared with those of the stock model along our answer: a
    fault shows in many of them, also where two tokens happen to be nearly equal.
    """
    grammar, end = decoder.grammar, decoder.grammar.end_of_turn_id
    texts, theirs = ([row[: row.index(end)] for row in rows.tolist()] for rows in (answers, expected))
    if texts == theirs:
        return None
    logits = read_one_by_one(model, inputs, config, texts, grammar.token_ids)
    apart = rounding(logits, read_at_once(model, inputs, texts, grammar.token_ids))
    off, row, place = max(
        (float(np.abs(chose - logits[row][place]).max()), row, place)
        for row, scores in enumerate(decoder.scores)
        for place, chose in scores
    )
    if off <= apart:
        return None
    return (
        f"computed logits for token {place} of row {row} that are {off:.2g} off those of stock decoding, and rounding "
        f"explains {apart:.2g}"
    )
