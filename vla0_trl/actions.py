"""Continuous vectors <-> text integers; the scale is set by the statistics in `stats.py`.

An action chunk of `chunk_size` steps and `action_dim` dimensions becomes `chunk_size × action_dim` integers in
0…`num_bins`, time-major, separated by single spaces: "524 341 892 …" (VLA-0, arXiv:2510.13054, section 3). There
are fewer if only some of the steps are written; those between them are interpolated.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from vla0_trl.stats import NormStats


class ActionParseError(ValueError):
    """The text is not exactly as many integers in 0…`num_bins` as are meant, separated by single spaces."""


class Quantizer:
    """Real vectors <-> integers in 0…`num_bins` (inclusive), linear between `low` and `high`.

    Args:
        stats (`NormStats`): of the vectors.
        num_bins (`int`): the largest integer: 1000 in VLA-0, 511 for VLA-0-Smol's 512 levels.
        normalization: see [`NormStats.bounds`].
    """

    def __init__(self, stats: NormStats, num_bins: int, normalization: str | list[float] = "min_max"):
        self.low, self.high = stats.bounds(normalization)
        self.num_bins = num_bins
        self.dim = stats.dim

    def encode(self, values: np.ndarray) -> np.ndarray:
        """float (…, D) -> int64 (…, D). Values outside the range are clipped; NaN and infinity raise `ValueError`."""
        values = np.asarray(values, np.float64)
        if values.shape[-1:] != (self.dim,):
            raise ValueError(f"expected vectors of {self.dim} dimensions, got shape {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError(f"not a finite number at index {tuple(np.argwhere(~np.isfinite(values))[0].tolist())}")
        width = self.high - self.low
        scaled = np.where(width > 0, (values - self.low) / np.where(width > 0, width, 1) * self.num_bins, 0)
        return np.rint(scaled.clip(0, self.num_bins)).astype(np.int64)

    def clipped(self, values: np.ndarray) -> np.ndarray:
        """float (N, D) -> int64 (D,): how many values of each dimension lie outside of the range."""
        slack = 1e-6 * (self.high - self.low) + 1e-6 * np.abs(self.high)  # float32's rounding is not clipping
        return ((values < self.low - slack) | (values > self.high + slack)).sum(0)

    def decode(self, integers: np.ndarray) -> np.ndarray:
        """int (…, D) -> float32 (…, D), at most half a bin from what was encoded, if that was inside the range."""
        return (self.low + np.asarray(integers) / self.num_bins * (self.high - self.low)).astype(np.float32)


class ActionTokenizer:
    """Action chunks <-> text: the one definition of what the model is trained to write and the robot executes.

    It makes text, not token ids; [`ChatTokenizer`] makes those of the text.

    Args:
        stats (`NormStats`): of the actions, or of action − state if `relative`.
        num_bins (`int`, *optional*, defaults to `1000`): the largest integer.
        chunk_size (`int`, *optional*, defaults to `1`): steps in a chunk.
        normalization (`str` or `[low, high]`, *optional*, defaults to `"min_max"`): see [`NormStats.bounds`].
        relative (`bool`, *optional*, defaults to `False`): text holds action − state, whose first `action_dim` entries
            are the action's coordinates now. Deltas need statistics of their own.
        written_steps (`list[int]`, *optional*): the steps that the text holds, the first and the last among them;
            those between are interpolated linearly. Default: all.
        holds_last_dimension (`bool`, *optional*, defaults to `False`): the last dimension keeps its last written value
            instead, as an open or closed gripper must.
    """

    def __init__(
        self,
        stats: NormStats,
        num_bins: int = 1000,
        chunk_size: int = 1,
        normalization: str | list[float] = "min_max",
        relative: bool = False,
        written_steps: Sequence[int] | None = None,
        holds_last_dimension: bool = False,
    ):
        self.quantizer = Quantizer(stats, num_bins, normalization)
        self.num_bins = num_bins
        self.chunk_size = chunk_size
        self.action_dim = stats.dim
        self.relative = relative
        self.written_steps = list(range(chunk_size) if written_steps is None else written_steps)
        self.num_values = len(self.written_steps) * self.action_dim
        self._between = None
        if len(self.written_steps) < chunk_size:
            self._between = interpolation(self.written_steps, chunk_size)
        self._held = np.searchsorted(self.written_steps, np.arange(chunk_size), side="right") - 1
        self._holds_last_dimension = holds_last_dimension

    def encode(self, actions: np.ndarray, state: np.ndarray | None = None) -> str:
        """Actions (chunk_size, action_dim) in environment units -> text. `state` (≥ action_dim,) if `relative`."""
        return join_integers(self.to_integers(actions, state))

    def decode(self, text: str, state: np.ndarray | None = None) -> np.ndarray:
        """Text -> float32 (chunk_size, action_dim) in environment units.

        `ActionParseError` for anything but exactly num_values canonical integers in 0…num_bins.
        """
        return self.from_integers(parse_integers(text, self.num_values, self.num_bins), state)

    def to_integers(self, actions: np.ndarray, state: np.ndarray | None = None) -> np.ndarray:
        """Like `encode`, but int64 (num_values,)."""
        actions = np.asarray(actions, np.float64)
        if actions.shape != (self.chunk_size, self.action_dim):
            raise ValueError(f"expected actions of shape {(self.chunk_size, self.action_dim)}, got {actions.shape}")
        return self.quantizer.encode(actions[self.written_steps] - self._reference(state)).ravel()

    def from_integers(self, integers: np.ndarray, state: np.ndarray | None = None) -> np.ndarray:
        """The inverse of `to_integers`: integers (…, num_values) and, if `relative`, one finite state."""
        integers = np.asarray(integers)
        steps = (len(self.written_steps), self.action_dim)
        written = self.quantizer.decode(integers.reshape(*integers.shape[:-1], *steps))
        chunk = written
        if self._between is not None:
            chunk = self._between @ written
            if self._holds_last_dimension:
                chunk[..., -1] = written[..., self._held, -1]
        actions = (chunk + self._reference(state)).astype(np.float32)
        if not np.isfinite(actions).all():
            raise ValueError(f"actions relative to the state {np.asarray(state).tolist()} are not finite")
        return actions

    def _reference(self, state: np.ndarray | None) -> np.ndarray | float:
        if not self.relative:
            return 0.0
        if state is None:
            raise ValueError("relative actions need the state that they are relative to")
        return relative_reference(state, self.action_dim)


def interpolation(written_steps: Sequence[int], chunk_size: int) -> np.ndarray:
    """Float (chunk_size, written): each step's weights of the written steps before and after it."""
    return np.stack([np.interp(np.arange(chunk_size), written_steps, row) for row in np.eye(len(written_steps))], 1)


def relative_reference(state: np.ndarray, action_dim: int) -> np.ndarray:
    """What relative actions count from: the first `action_dim` entries of the state, in the action's own units."""
    state = np.asarray(state, np.float64)
    if state.ndim != 1 or len(state) < action_dim:
        raise ValueError(f"relative actions need a state of at least {action_dim} entries, got shape {state.shape}")
    return state[:action_dim]


def join_integers(integers: Iterable[int]) -> str:
    """`[524, 341]` -> `"524 341"`."""
    return " ".join(map(str, integers))


def parse_integers(text: str, count: int, num_bins: int) -> np.ndarray:
    """The strict inverse of `join_integers`: int64 (count,). White space around the text is ignored.

    [`ActionParseError`] says what is wrong, and quotes it.
    """
    words = text.strip().split(" ")
    if len(words) != count or not text.strip():
        raise ActionParseError(f"expected {count} integers, got {len(words) if text.strip() else 0} in {text[:80]!r}")
    for position, word in enumerate(words):
        # int() alone would let "+5", "1_0", "٣" and "007" through.
        if not (word.isascii() and word.isdigit()) or word != str(int(word)) or int(word) > num_bins:
            raise ActionParseError(f"word {position} is {word[:20]!r}, not an integer in 0…{num_bins}: {text[:80]!r}")
    return np.array([int(word) for word in words], np.int64)
