"""Temporal ensembling: ask at every step, execute the average of what was predicted for it.

From ACT (Zhao et al. 2023, "Learning Fine-Grained Bimanual Manipulation with Low-Cost Hardware", section IV.B). VLA-0
and VLA-0-Smol use the uniform mean.
"""

from collections import deque

import numpy as np


class TemporalEnsembler:
    """One robot's overlapping predictions, averaged for the current step.

    Args:
        chunk_size (`int`):
            Steps in a chunk.
        ensemble_size (`int`):
            Predictions to average, at most; 1 executes the newest alone.
        decay (`float`, *optional*):
            m in ACT's weights exp(−m·i), where i = 0 is the *oldest* prediction: a positive m trusts old predictions
            more. Without it, all count the same.

    Raises:
        `ValueError`: for an `ensemble_size` that can't happen, and for a `decay` that would do nothing.
    """

    def __init__(self, chunk_size: int, ensemble_size: int, decay: float | None = None):
        if not 1 <= ensemble_size <= chunk_size:
            raise ValueError(
                f"ensemble_size={ensemble_size} must be between 1 and chunk_size={chunk_size}: no more predictions "
                "than that overlap"
            )
        check_decay(ensemble_size, decay)
        self.chunk_size = chunk_size
        self.decay = decay or 0.0
        self._chunks: deque[np.ndarray] = deque(maxlen=ensemble_size)

    def reset(self) -> None:
        """Forget all predictions: call it when an episode begins."""
        self._chunks.clear()

    def update(self, chunk: np.ndarray) -> np.ndarray:
        """Take the chunk predicted from the current observation, give the action to execute now.

        Args:
            chunk (`np.ndarray`): float[chunk_size, D]; its first row is for the current step.

        Returns:
            `np.ndarray`: float32[D].
        """
        if chunk.ndim != 2 or len(chunk) != self.chunk_size:
            raise ValueError(f"expected a chunk of shape ({self.chunk_size}, D), got {chunk.shape}")
        self._chunks.append(chunk)
        age = np.arange(len(self._chunks))[::-1]  # the deque runs from the oldest to the newest
        predictions = np.stack([chunk[steps_ago] for chunk, steps_ago in zip(self._chunks, age, strict=True)])
        weights = np.exp(-self.decay * np.arange(len(predictions)))
        return np.average(predictions, axis=0, weights=weights).astype(np.float32)


def check_decay(ensemble_size: int, decay: float | None) -> None:
    """Raise `ValueError` if `decay` is not a finite number, or if there is nothing to weigh with it."""
    if decay is None:
        return
    if ensemble_size == 1:
        raise ValueError(
            f"ensemble_decay={decay:g} weighs overlapping predictions, but ensemble_size=1 keeps only the newest: "
            "set ensemble_size > 1, or leave the decay out"
        )
    if not np.isfinite(decay):
        raise ValueError(f"ensemble_decay={decay} must be a finite number")
