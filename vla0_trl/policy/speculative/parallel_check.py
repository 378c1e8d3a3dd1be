"""A parallel reading beside the model's plain forward pass, over rows as the collator makes them for training."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from vla0_trl.policy.speculative.parallel import ParallelReader, Reading

# Two logits that differ by less than this share of the largest one are within rounding of each other. Measured: up to
# 0.9 % in bfloat16; up to 2 % between float32 and bfloat16 autocast, in which every product is rounded otherwise.
ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
AUTOCAST_ROUNDING = 0.1


def rounding_share(weights: torch.dtype, logits: set[torch.dtype]) -> float:
    """Share of the largest logit that rounding explains; under autocast, logits are not of the weights' dtype."""
    return ROUNDING.get(weights, AUTOCAST_ROUNDING) if logits == {weights} else AUTOCAST_ROUNDING


def parallel_difference(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], reader: ParallelReader, reading: Reading
) -> str | None:
    """Where a reading's first round leaves the plain forward pass, unless rounding decided there; None if nowhere.

    In the rows all numbers are hidden but the last: they show how each number begins, and all of the last one.

    Args:
        inputs: of `generate`: B prompts padded on the left, images.
    """
    texts = [
        trunk + (reader.branched.branch(reader.num_values - 1, numbers[-1]) if asked[-1] else [])
        for trunk, numbers, asked in zip(reading.trunks, reading.unrefined, reading.asked, strict=True)
    ]
    batch, lengths = _rows(inputs, texts)
    longest = batch["input_ids"].shape[1]
    with torch.inference_mode():
        logits = model(**(inputs | batch), logits_to_keep=longest - min(lengths) + 1).logits
    rounding = rounding_share(model.dtype, {logits.dtype})
    logits = logits[..., torch.as_tensor(reader.tree.token_ids, device=logits.device)].float().cpu().numpy()
    for row, (numbers, length) in enumerate(zip(reading.unrefined, lengths, strict=True)):
        for position, at, allowed, column in _choices(reader, reading.roots[row], numbers):
            if not reading.asked[row, position]:
                continue
            scores = logits[row, length + at - longest]  # counted from the end: the first ones were not kept
            best, largest = scores[allowed].max(), np.abs(scores[allowed]).max()
            if best - scores[column] > rounding * largest:
                return (
                    f"read {numbers[position]} as number {position} of row {row}, where a token of logit {best:.6g} "
                    f"beats its {scores[column]:.6g} in a plain forward pass, further apart than rounding explains"
                )
    return None


def _choices(reader: ParallelReader, roots: np.ndarray, numbers: np.ndarray):
    """What (N,) numbers say was chosen: which number, the index of the token before, bool (columns), the column."""
    for position, number in enumerate(numbers):
        columns = reader.tree.columns(reader.branched.branch(position, number))
        node, ends = reader.begin[position], reader.ends[position]
        yield position, roots[position], reader.allowed(node, ends), columns[0]
    for step, column in enumerate(columns, start=1):  # of the last number, which the rows show
        node = reader.tree.child[node, column]
        following = columns[step] if step < len(columns) else reader.tree.columns([reader.end_of_turn_id])[0]
        if not reader.tree.leaf[node]:
            yield position, roots[position] + step, reader.allowed(node, ends), following


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
