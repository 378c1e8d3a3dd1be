"""Numbers out of episodes: rates with their uncertainty, for all of them, a task or a suite.

A row is a line of `episodes.jsonl`; see `vla0_trl.evaluation.episode_log`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def wilson_interval(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a success rate (Wilson 1927); 95 % for z = 1.96. (0, 1) if nothing was tried."""
    if n == 0:
        return 0.0, 1.0
    rate, spread = successes / n, z * z / n
    center = (rate + spread / 2) / (1 + spread)
    half = z * float(np.sqrt(rate * (1 - rate) / n + spread / n / 4)) / (1 + spread)
    return max(0.0, center - half), min(1.0, center + half)


def bootstrap_interval(values: np.ndarray, resamples: int = 10_000) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of the mean of `values` (n,); the same numbers at every call."""
    values = np.asarray(values, np.float64)
    draws = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
    return float(low), float(high)


def identity(row: dict[str, Any]) -> tuple:
    """Which episode a line is of: what `rollout` was given as its seed, as a tuple."""
    return tuple(row[name] for name in ("suite", "task_id", "seed") if name in row)


def task_label(row: dict[str, Any]) -> str:
    """A task as tables name it; in LIBERO with suite and id, because two scenes may share an instruction."""
    return f"{row['suite']} {row['task_id']}: {row['task']}" if "suite" in row else row["task"]


def aggregate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates with 95 % intervals and times of at least one episode, in whatever order they finished.

    `ms_per_chunk` is the wall-clock time of the model over the chunks that it gave: batching makes it smaller.
    Coverage is there if the episodes have one.
    """
    rows = sorted(rows, key=identity)  # so that float sums are the same after a resume
    successes, n = sum(row["success"] for row in rows), len(rows)
    model_seconds = sum(row["model_seconds"] for row in rows)
    coverages = np.array([row["max_coverage"] for row in rows if "max_coverage" in row])
    coverage = {}
    if len(coverages):
        coverage["mean_max_coverage"] = float(coverages.mean())
        coverage["mean_max_coverage_interval"] = bootstrap_interval(coverages)
    return {
        "num_episodes": n,
        "successes": successes,
        "success_rate": successes / n,
        "success_rate_interval": wilson_interval(successes, n),
        **coverage,
        "mean_steps": float(np.mean([row["steps"] for row in rows])),
        "seconds_per_episode": sum(row["seconds"] for row in rows) / n,
        "ms_per_chunk": 1000 * model_seconds / max(1, sum(row["model_calls"] for row in rows)),
        "model_seconds": model_seconds,
        "environment_seconds": sum(row["seconds"] for row in rows) - model_seconds,
        "model_calls": sum(row["model_calls"] for row in rows),
    }


def aggregate_by(label: Callable[[dict[str, Any]], str], rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """`aggregate` for each group of rows with one label, such as `task_label`, in the tasks' order."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (*identity(row)[:-1], row["task"])):
        groups.setdefault(label(row), []).append(row)
    return {name: aggregate(group) for name, group in groups.items()}


def mean_rate(parts: Sequence[dict[str, Any]]) -> tuple[float, tuple[float, float]]:
    """The mean of several aggregates' success rates, each counting the same, and its 95 % interval.

    The interval is put together from theirs by the method of variance estimates recovery (Zou and Donner 2008).
    """
    rates = np.array([part["success_rate"] for part in parts])
    low, high = np.array([part["success_rate_interval"] for part in parts]).T
    mean, n = float(rates.mean()), len(rates)
    half_low, half_high = (float(np.sqrt(((rates - end) ** 2).sum())) / n for end in (low, high))
    return mean, (max(0.0, mean - half_low), min(1.0, mean + half_high))
