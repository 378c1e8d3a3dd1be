"""Statistics of a dataset's vectors, and the range between which integers are spread."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from vla0_trl.schema import checked, instance, is_number, whole

# Quantiles come from a histogram of this many cells between minimum and maximum, so a pass over any number of frames
# needs constant memory; the error is at most one cell, far below any sensible bin width.
_HISTOGRAM_CELLS = 1 << 16


@dataclass(frozen=True)
class NormStats:
    """Statistics of a vector over a dataset, one number per dimension, in environment units.

    Attributes:
        min, max, q01, q99, mean, std (`list[float]`): per dimension.
        count (`int`): vectors seen.
    """

    min: list[float]
    max: list[float]
    q01: list[float]
    q99: list[float]
    mean: list[float]
    std: list[float]
    count: int

    def __post_init__(self):
        for name in (field.name for field in fields(self) if field.name != "count"):
            values = getattr(self, name)
            if len(values) != len(self.min):
                raise ValueError(f"statistics: {name} has {len(values)} dimensions, min has {len(self.min)}")
            for dim, value in enumerate(values):
                if not is_number(value):
                    raise ValueError(f"statistics: {name} of dimension {dim} is {value}, not a finite number")
        for lowest, highest in (("min", "max"), ("q01", "q99")):
            for dim, (low, high) in enumerate(zip(getattr(self, lowest), getattr(self, highest), strict=True)):
                where = f"statistics: dimension {dim} runs from {low:g}"
                if low > high:
                    raise ValueError(f"{where} down to {high:g}: {lowest} is above {highest}")
                if not _fits_float32(low, high):
                    raise ValueError(f"{where} to {high:g}, too wide for a float32")

    @classmethod
    def from_array(cls, values: np.ndarray) -> NormStats:
        """Statistics of `values` (N, D)."""
        return cls.from_batches(lambda: [np.asarray(values)])

    @classmethod
    def from_batches(cls, batches) -> NormStats:
        """Statistics in constant memory, of the arrays (n, D) that `batches()` yields.

        It is called twice: for range and moments, then for a histogram, which gives the quantiles.
        """
        low = high = total = squares = None
        count = 0
        for batch in batches():
            batch = np.asarray(batch, np.float64)
            if batch.ndim != 2:
                raise ValueError(f"statistics need arrays (n, D), got shape {batch.shape}")
            if not np.isfinite(batch).all():
                row, dim = np.argwhere(~np.isfinite(batch))[0]
                raise ValueError(f"dimension {dim} of vector {count + row} is {batch[row, dim]}, not a finite number")
            if not len(batch):
                continue
            if low is None:
                low, high = batch.min(0), batch.max(0)
                shift = low  # moments are taken around a data point, or large offsets would eat their digits
                total = squares = np.zeros_like(low)
            low, high = np.minimum(low, batch.min(0)), np.maximum(high, batch.max(0))
            total, squares = total + (batch - shift).sum(0), squares + ((batch - shift) ** 2).sum(0)
            count += len(batch)
        if low is None:
            raise ValueError("no values to take statistics of")
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 0))

        width = np.where(high > low, high - low, 1.0)
        cells = np.zeros((len(low), _HISTOGRAM_CELLS), np.int64)
        for batch in batches():
            index = ((np.asarray(batch, np.float64) - low) / width * _HISTOGRAM_CELLS).astype(np.int64)
            for dim, column in enumerate(index.clip(0, _HISTOGRAM_CELLS - 1).T):
                cells[dim] += np.bincount(column, minlength=_HISTOGRAM_CELLS)
        ranks = cells.cumsum(1)

        def quantile(q: float) -> list[float]:
            cell = np.array([np.searchsorted(rank, q * count) for rank in ranks])
            return np.clip(low + (cell + 0.5) / _HISTOGRAM_CELLS * width, low, high).tolist()

        return cls(
            min=low.tolist(),
            max=high.tolist(),
            q01=quantile(0.01),
            q99=quantile(0.99),
            mean=(mean + shift).tolist(),
            std=std.tolist(),
            count=count,
        )

    @classmethod
    def from_dict(cls, data: dict) -> NormStats:
        """The inverse of `dataclasses.asdict`; `ValueError` names each wrong field."""
        a_list = instance(list, "a list with a number for each dimension")
        names = [field.name for field in fields(cls)]
        checked("statistics", data, {name: whole if name == "count" else a_list for name in names})
        return cls(**{name: data[name] for name in names})

    @property
    def dim(self) -> int:
        return len(self.min)

    def bounds(self, normalization: str | list[float]) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest representable value, each (D,).

        Args:
            normalization: `"min_max"`, `"quantile"` (1 to 99 %; values outside are clipped) or a fixed `[low, high]`.

        A dimension that never changes, such as a robot's idle arm, has a range of width 0: it is written as 0, and any
        integer is read as its one value. Where both quantiles are equal, minimum and maximum take their place.
        """
        low, high = np.array(self.min), np.array(self.max)
        if normalization == "quantile":
            q01, q99 = np.array(self.q01), np.array(self.q99)
            low, high = np.where(q99 > q01, q01, low), np.where(q99 > q01, q99, high)
        elif normalization != "min_max":
            check_range(normalization)
            low, high = (np.full(self.dim, float(bound)) for bound in normalization)
        return low, high


def check_range(normalization: str | list[float]) -> None:
    """`ValueError` if a fixed `[low, high]` is not a range: of two numbers, rising, finite as is their difference."""
    if normalization in ("min_max", "quantile"):
        return
    numbers = isinstance(normalization, list | tuple) and all(map(is_number, normalization))
    if not numbers or len(normalization) != 2:
        raise ValueError(f"normalization={normalization!r} must be min_max, quantile or [low, high], finite numbers")
    low, high = map(float, normalization)
    if not low < high or not _fits_float32(low, high):
        raise ValueError(f"normalization={normalization!r} must be low < high, and their difference a finite float32")


def _fits_float32(low: float, high: float) -> bool:
    """Whether both ends and their difference are finite in the type that actions are handed out in."""
    return max(abs(low), abs(high), high - low) <= np.finfo(np.float32).max


# For schemas: statistics, or the object that a file holds of them.
stats_or_record = instance(NormStats | dict, "an object with min, max, q01, q99, mean, std and count")
