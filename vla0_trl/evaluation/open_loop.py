"""Open-loop metrics on demonstrations: how near the policy's answers are to what was done, without a simulator."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from vla0_trl.actions import relative_reference
from vla0_trl.config import VLAConfig
from vla0_trl.data.chat_dataset import episode_indices
from vla0_trl.policy.policy import VLAPolicy
from vla0_trl.processing.chat_tokenizer import IGNORED
from vla0_trl.processing.collator import VLADataCollator, row_observation


def pick_frames(dataset: Dataset, first_episode: int, end_episode: int, num_frames: int) -> Dataset:
    """`num_frames` rows spread evenly over the episodes first…end−1, or all of these if they are fewer."""
    episodes = episode_indices(dataset)
    rows = np.flatnonzero((episodes >= first_episode) & (episodes < end_episode))
    if not len(rows):
        raise ValueError(
            f"no frames of episodes {first_episode}:{end_episode}: the dataset has episodes {episodes.min()} to "
            f"{episodes.max()}"
        )
    chosen = np.linspace(0, len(rows) - 1, min(num_frames, len(rows))).round().astype(int)
    return dataset.select(rows[chosen])


def action_errors(policy: VLAPolicy, rows: Dataset, cameras: list[str], batch_size: int) -> dict[str, Any]:
    """Errors of generated chunks, against those of not looking.

    Args:
        cameras (`list[str]`): the names of the rows' images, of which the policy takes its own, in its own order.

    Returns:
        `dict`: `rmse` over all steps and dimensions of the chunks and `first_rmse` of their first actions, root mean
        square, in environment units; the same under `baselines` for `mean` (the training set's mean action, relative
        to the state if the policy's actions are) and, for relative actions, `stay` (the current position).
    """
    predicted, true, states = [], [], []
    for batch in _batches(rows, batch_size, "predicting"):
        observations = [row_observation(row, cameras, policy.config) for row in batch]
        predicted.append(policy.predict_action_chunk(observations))
        # Rows may hold longer chunks than the policy predicts.
        windows = (np.array(row["raw_action"]).reshape(-1, policy.config.action_dim) for row in batch)
        true += [window[: policy.config.chunk_size] for window in windows]
        states += [observation["state"] for observation in observations]
    chunks = np.stack(true)
    baselines = {
        name: _rmse(np.broadcast_to(actions[:, None], chunks.shape), chunks)
        for name, actions in _baselines(policy.config, states).items()
    }
    return _rmse(np.concatenate(predicted), chunks) | {"baselines": baselines}


@torch.no_grad()
def token_accuracy(policy: VLAPolicy, rows: Dataset, cameras: list[str], batch_size: int) -> float:
    """Share of the answers' tokens, end of turn included, that the model finds given all tokens before them."""
    collator = VLADataCollator(policy.processor, policy.config, train=False, stored_cameras=cameras)
    device, dtype = policy.model.device, policy.model.dtype
    right = total = 0
    for batch in _batches(rows, batch_size, "scoring"):
        inputs = {key: value.to(device) for key, value in collator(batch).items()}
        labels = inputs.pop("labels")[:, 1:]
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        guesses = policy.model(**inputs).logits[:, :-1].argmax(-1)
        counted = labels != IGNORED
        right += int((guesses == labels)[counted].sum())
        total += int(counted.sum())
    return right / total


def _batches(rows: Dataset, batch_size: int, description: str) -> Iterator[list[dict[str, Any]]]:
    for start in tqdm(range(0, len(rows), batch_size), desc=description, unit="batch"):
        yield [rows[index] for index in range(start, min(start + batch_size, len(rows)))]


def _baselines(config: VLAConfig, states: list[np.ndarray]) -> dict[str, np.ndarray]:
    """One action per frame, (N, action_dim), for the whole chunk."""
    mean = np.array(config.action_stats.mean)
    if not config.relative_actions:
        return {"mean": np.tile(mean, (len(states), 1))}
    here = np.stack([relative_reference(state, config.action_dim) for state in states])
    return {"mean": here + mean, "stay": here}


def _rmse(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    squares = (predicted - true) ** 2
    return {"rmse": float(np.sqrt(squares.mean())), "first_rmse": float(np.sqrt(squares[:, 0].mean()))}
