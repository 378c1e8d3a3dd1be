"""From predicted chunks to executed actions: the first n steps of each, or an average of those that overlap.

Robots (`VLAPolicy.select_action`) and evaluation (`evaluation/rollout.py`) both execute chunks through
[`ChunkExecutor`], so that a robot does what was evaluated.
"""

from collections import deque

import numpy as np

from vla0_trl.config import VLAConfig, check_ensemble

VLA0_OLDER_WEIGHT = 0.5  # in VLA-0's released evaluation, of version 1, and per step of age in version 2


class ChunkExecutor:
    """What one robot, or one episode, executes of its chunks.

    By the config's `n_action_steps`, or its `ensemble_size` with `ensemble_decay` or `ensemble_weights`; `gripper`
    says how actions are postprocessed.
    """

    def __init__(self, config: VLAConfig):
        self.config = config
        self._ensembler = TemporalEnsembler(
            config.chunk_size, config.ensemble_size, config.ensemble_decay, config.ensemble_weights
        )

    def reset(self) -> None:
        """Forget earlier chunks: call it when an episode begins."""
        self._ensembler.reset()

    def actions(self, chunk: np.ndarray) -> np.ndarray:
        """The chunk predicted from the current observation -> what to execute before the policy is asked again.

        float32 (chunk_size, action_dim), whose first row is for the current step, -> float32 (n_action_steps,
        action_dim), or (1, action_dim) of an ensemble.
        """
        if self.config.ensemble_size > 1:
            chosen = self._ensembler.update(chunk)[None]
        else:
            chosen = chunk[: self.config.n_action_steps]
        return self.config.postprocess_actions(chosen)


class TemporalEnsembler:
    """One robot's overlapping predictions, averaged for the current step.

    From ACT (Zhao et al. 2023, "Learning Fine-Grained Bimanual Manipulation with Low-Cost Hardware", section IV.B).
    VLA-0-Smol uses the uniform mean. VLA-0's paper says a mean, too, but its released code, whose setting is called
    `ensemble_version`, has two other ways: 1 (here `"vla0_v1"`) and 2 (`"vla0_v2"`). Both trust the newest prediction
    most.

    Args:
        chunk_size (`int`): steps in a chunk.
        ensemble_size (`int`): predictions to average, at most; 1 executes the newest alone.
        decay (`float`, *optional*): m in ACT's weights exp(−m·i), where i = 0 is the *oldest* prediction: a positive m
            trusts old predictions more. Without it, all count the same. `decay=log(w)` is `"vla0_v2"` with another
            base: w^age, where age = 0 is the newest.
        weights (`str`, *optional*): named weights instead of a decay: `"uniform"`; `"vla0_v1"`: 1 for the newest, 0.5
            for each older one; `"vla0_v2"`: 0.5^age.

    `ValueError` for an impossible `ensemble_size`, and for weights that would do nothing.
    """

    def __init__(self, chunk_size: int, ensemble_size: int, decay: float | None = None, weights: str | None = None):
        check_ensemble(chunk_size, ensemble_size, decay, weights)
        self.chunk_size, self.decay, self.weights = chunk_size, decay or 0.0, weights
        self._chunks: deque[np.ndarray] = deque(maxlen=ensemble_size)

    def reset(self) -> None:
        """Forget all predictions: call it when an episode begins."""
        self._chunks.clear()

    def update(self, chunk: np.ndarray) -> np.ndarray:
        """The chunk predicted from the current observation, float[chunk_size, D], -> what to do now, float32[D]."""
        if chunk.ndim != 2 or len(chunk) != self.chunk_size:
            raise ValueError(f"expected a chunk of shape ({self.chunk_size}, D), got {chunk.shape}")
        self._chunks.append(chunk)
        age = np.arange(len(self._chunks))[::-1]  # the deque runs from the oldest to the newest
        predictions = np.stack([chunk[steps_ago] for chunk, steps_ago in zip(self._chunks, age, strict=True)])
        return np.average(predictions, axis=0, weights=self._weigh(age)).astype(np.float32)

    def _weigh(self, age: np.ndarray) -> np.ndarray:
        """The weight of each prediction, by its age in steps (n,), oldest first; the largest is 1."""
        if self.weights == "vla0_v1":
            return np.where(age == 0, 1.0, VLA0_OLDER_WEIGHT)
        if self.weights == "vla0_v2":
            return VLA0_OLDER_WEIGHT**age
        # Counted from the prediction that counts most: large exponents would overflow.
        return np.exp(-abs(self.decay) * (age if self.decay < 0 else age[::-1]))
