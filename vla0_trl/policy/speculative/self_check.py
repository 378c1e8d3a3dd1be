"""The decoder's check: a model's first chunk is also decoded by stock `generate()`, which goes on if they differ.

Parallel decoding, which writes other answers, is compared with the stock model over rows as in training.

Our decoder uses private parts of transformers (see [`vla0_trl.internals`]). A release that changes them must not stop
a robot, or move it wrongly. The check costs one stock chunk per model and process. All policies of one model object
share its outcome, such as those that roll out during training.
"""

from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from vla0_trl.internals import FAST, PARALLEL, STOCK, disagreement, raised, warn_fallback
from vla0_trl.policy.grammar import ActionGrammar, ActionGrammarLogitsProcessor
from vla0_trl.policy.speculative import stock_logits
from vla0_trl.policy.speculative.decoder import ChunkDecoder
from vla0_trl.policy.speculative.options import PromptError, check_length

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
    begin = [] if noise is None else [stock_logits.AddedNoise(length, grammar.token_ids, noise)]
    begin += [stock_logits.ForcedBeginnings(length, beginnings)] if beginnings else []
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
            failure = _parallel_difference((model, inputs, config), decoder)
        else:
            expected = _stock(model, inputs, config, grammar, *begin)
            failure = _exact_difference((model, inputs, config), decoder, answers.tolist(), expected.tolist())
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


def _exact_difference(stock: tuple, decoder: ChunkDecoder, answers: list, expected: list) -> str | None:
    """Where answers of B rows leave the expected ones by more than rounding; None if nowhere.

    Where tokens differ, all logits that chose ours are compared with those of the stock model along our answer: a
    fault shows in many of them, also where two tokens happen to be nearly equal.
    """
    end = decoder.grammar.end_of_turn_id
    texts, theirs = ([row[: row.index(end)] for row in rows] for rows in (answers, expected))
    return None if texts == theirs else _difference(*stock, decoder, texts, decoder.scores)


def _parallel_difference(stock: tuple, decoder: ChunkDecoder) -> str | None:
    """Where a reading's first round leaves the stock model by more than rounding; None if nowhere.

    In the rows all numbers are hidden but the last: they show how each number begins, and all of the last one.
    """
    reader, reading = decoder.reader, decoder.reading
    shown = [reader.branched.branch(reader.num_values - 1, numbers[-1]) for numbers in reading.unrefined]
    texts = [
        trunk + (branch if asked[-1] else [])
        for trunk, branch, asked in zip(reading.trunks, shown, reading.asked, strict=True)
    ]
    scores = [
        (row, reading.roots[row, position] + 1 + step, reading.chose[step][row, position])
        for row, position in np.argwhere(reading.asked)
        for step in range(len(shown[row]) if position == reader.num_values - 1 else 1)
    ]
    return _difference(*stock, decoder, texts, scores) if scores else None


def _difference(model, inputs, config, decoder: ChunkDecoder, texts: list[list[int]], scores: list) -> str | None:
    ids = decoder.grammar.token_ids
    at_once = stock_logits.read_at_once(model, inputs, texts, ids)
    one_by_one = stock_logits.read_one_by_one(model, inputs, config, texts, ids)
    return stock_logits.beyond_rounding(scores, at_once, one_by_one)
