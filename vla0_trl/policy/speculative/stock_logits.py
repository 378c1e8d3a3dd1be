"""A stock model's logits along given texts, in two equally right ways: how far these are apart is rounding.

Kernels, dtype, depth and weights all change it, so no constant tells it from a fault. Measured, SmolVLM2-500M in
bfloat16 on a CPU with random weights, largest logit 4, three seeds: both ways are up to 0.15 apart, passes of ours up
to 0.17 from the second; wrong positions, or a token that is missing in the cache, 0.9 to 2.4.
"""

from collections.abc import Iterable
from copy import deepcopy

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

_FLOAT32 = 1e-5  # share of the largest logit that is rounding in any case


def read_at_once(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], texts: list[list[int]], token_ids: np.ndarray
) -> list[np.ndarray]:
    """In one forward pass without a cache, over rows as in training.

    Args:
        inputs: of `generate`: B prompts padded on the left, images.
        texts: ids behind each prompt, without an end of the turn.
        token_ids: whose logits are wanted, (columns,).

    Returns B arrays float32 (len(text) + 1, columns): after the prompt, and after each token of the text.
    """
    batch, lengths = _rows(inputs, texts)
    longest = batch["input_ids"].shape[1]
    with torch.inference_mode():
        logits = model(**(inputs | batch), logits_to_keep=longest - min(lengths) + 1).logits
    logits = _columns(logits, token_ids)
    # Counted from the end: the first ones were not kept.
    ends = [length - longest - 1 for length in lengths]
    return [row[end:][: len(text) + 1] for row, end, text in zip(logits, ends, texts, strict=True)]


def read_one_by_one(
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    config: GenerationConfig,
    texts: list[list[int]],
    token_ids: np.ndarray,
) -> list[np.ndarray]:
    """As [`read_at_once`], but as `generate()` reads: token by token, with a cache."""
    config, steps = deepcopy(config), []
    config.max_new_tokens = max(map(len, texts)) + 1

    def watch(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        steps.append(_columns(scores, token_ids))
        return scores

    processors = LogitsProcessorList([watch, ForcedBeginnings(inputs["input_ids"].shape[1], texts)])
    model.generate(**inputs, generation_config=config, logits_processor=processors)
    return [logits[: len(text) + 1] for logits, text in zip(np.stack(steps, 1), texts, strict=True)]


def beyond_rounding(
    scores: Iterable[tuple[int, int, np.ndarray]], at_once: list[np.ndarray], one_by_one: list[np.ndarray]
) -> str | None:
    """Which logits are twice as far from the stock model's as its two ways are from each other; None if none are.

    Args:
        scores: row, tokens of the row's text before it, and logits float32 (columns) of another way to read.
    """
    apart = max(float(np.abs(one - other).max()) for one, other in zip(at_once, one_by_one, strict=True))
    smallest = _FLOAT32 * max(float(np.abs(logits).max()) for logits in one_by_one)
    off, row, place = max(
        (float(np.abs(logits - one_by_one[row][place]).max()), row, place) for row, place, logits in scores
    )
    if off <= max(2 * apart, smallest):
        return None
    return (
        f"computed logits for token {place} of row {row} that are {off:.2g} off those of stock decoding, where "
        f"rounding explains {2 * apart:.2g}"
    )


class ForcedBeginnings(LogitsProcessor):
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


class AddedNoise(LogitsProcessor):
    """Adds noise, float32 (B, most tokens of an answer, columns), to the logits of these ids, for stock decoding."""

    def __init__(self, prompt_length: int, token_ids: np.ndarray, noise: np.ndarray):
        self.prompt_length = prompt_length
        self.token_ids, self.noise = torch.as_tensor(token_ids), torch.as_tensor(noise)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        noise = self.noise[:, input_ids.shape[1] - self.prompt_length]
        scores[:, self.token_ids.to(scores.device)] += noise.to(scores)
        return scores


def _columns(logits: torch.Tensor, token_ids: np.ndarray) -> np.ndarray:
    return logits[..., torch.as_tensor(token_ids, device=logits.device)].float().cpu().numpy()


def _rows(inputs: dict[str, torch.Tensor], texts: list[list[int]]) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Prompts with texts behind them, padded on the right as in training; and the prompts' lengths."""
    attended = inputs["attention_mask"].bool()
    lengths = attended.sum(1).tolist()
    longest = max(length + len(text) for length, text in zip(lengths, texts, strict=True))
    per_token = {key: values for key, values in inputs.items() if values.shape == attended.shape}
    batch = {key: values.new_zeros(len(texts), longest) for key, values in per_token.items()}
    for row, (length, text) in enumerate(zip(lengths, texts, strict=True)):
        for key, values in per_token.items():
            batch[key][row, :length] = values[row][attended[row]]
        batch["input_ids"][row, length : length + len(text)] = batch["input_ids"].new_tensor(text)
        batch["attention_mask"][row, length : length + len(text)] = 1
    return batch, lengths
