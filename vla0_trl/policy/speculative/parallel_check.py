"""A parallel reading beside the stock model's, over rows as the collator makes them for training."""

from __future__ import annotations

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from vla0_trl.policy.speculative.parallel import ParallelReader, Reading
from vla0_trl.policy.speculative.stock_logits import read_at_once, read_one_by_one, rounding


def parallel_difference(
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    config: GenerationConfig,
    reader: ParallelReader,
    reading: Reading,
) -> str | None:
    """Where a reading's first round leaves the plain forward pass, unless rounding decided there; None if nowhere.

    In the rows all numbers are hidden but the last: they show how each number begins, and all of the last one.

    Args:
        inputs, config: of `generate`: B prompts padded on the left, images.
    """
    texts = [
        trunk + (reader.branched.branch(reader.num_values - 1, numbers[-1]) if asked[-1] else [])
        for trunk, numbers, asked in zip(reading.trunks, reading.unrefined, reading.asked, strict=True)
    ]
    logits, apart = read_at_once(model, inputs, texts, reader.tree.token_ids), None
    for row, numbers in enumerate(reading.unrefined):
        for position, at, allowed, column in _choices(reader, reading.roots[row], numbers):
            scores = logits[row][at + 1]
            best = scores[allowed].max()
            if not reading.asked[row, position] or best <= scores[column]:
                continue
            if apart is None:
                apart = rounding(logits, read_one_by_one(model, inputs, config, texts, reader.tree.token_ids))
            if best - scores[column] > apart:
                return (
                    f"read {numbers[position]} as number {position} of row {row}, where a token of logit {best:.6g} "
                    f"beats its {scores[column]:.6g} in a plain forward pass, further apart than rounding explains "
                    f"(up to {apart:.2g} here)"
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
