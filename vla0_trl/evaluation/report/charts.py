"""The pictures of a report, as matplotlib figures: success, coverage, training curves."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.rcParams["text.parse_math"] = False  # a folder may be called $x_$
COLORS = ("#2563eb", "#ea580c", "#0d9488", "#9333ea", "#ca8a04", "#475569")
_INK, _MUTED, _GRID = "#1f2937", "#6b7280", "#e5e7eb"


def color(index: int) -> str:
    """The color of the run at this position, in all pictures and on the page."""
    return COLORS[index % len(COLORS)]


def success_bars(groups: dict[str, Sequence[dict[str, Any]]], names: Sequence[str]) -> Figure:
    """Success rates with Wilson intervals: one bar per run.

    Args:
        groups (`dict[str, list[dict]]`): label (a task, or `""`) -> `metrics.aggregate`'s numbers, one per run.
        names (`list[str]`): of the runs, in the same order.
    """
    bars = [(label, name, index) for label in groups for index, name in enumerate(names)]
    figure, axes = _figure(height=0.9 + 0.42 * max(2, len(bars)) + 0.25 * (len(groups) - 1))
    positions = []
    for row, (label, _, index) in enumerate(bars):
        y = row + 0.6 * (row // len(names))
        positions.append(y)
        run = groups[label][index]
        rate, (low, high) = 100 * run["success_rate"], (100 * end for end in run["success_rate_interval"])
        axes.barh(y, rate, height=0.62, color=color(index))
        axes.hlines(y, low, high, color=_INK, linewidth=1.2)
        axes.vlines([low, high], y - 0.12, y + 0.12, color=_INK, linewidth=1.2)
        axes.annotate(f"{rate:.1f} %", (high, y), (6, 0), textcoords="offset points", va="center", color=_INK)
    axes.set_yticks(positions, [f"{label}  {name}".strip() for label, name, _ in bars])
    axes.set_ylim(positions[-1] + 0.6, -0.6)
    axes.set_xlim(0, 112)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("success rate, % (line: 95 % interval)")
    return figure


def beside_published(
    names: Sequence[str], ours: Sequence[dict[str, Any] | None], published: Sequence[dict[str, Any] | None]
) -> Figure:
    """Success rates as bars, others' as rings below them, with their intervals: one per name; None: there is none."""
    figure, axes = _figure(height=1.2 + 0.42 * max(2, len(names)))
    for label, runs, shift, shade in (("here", ours, -0.12, color(0)), ("published", published, 0.24, color(1))):
        shown = [(y + shift, run) for y, run in enumerate(runs) if run is not None]
        for y, run in shown:
            low, high = (100 * end for end in run["success_rate_interval"])
            axes.hlines(y, low, high, color=_INK if label == "here" else shade, linewidth=1.2)
        places, rates = [y for y, _ in shown], [100 * run["success_rate"] for _, run in shown]
        if label == "here":
            axes.barh(places, rates, height=0.42, color=shade, label=label)
        else:
            axes.plot(rates, places, "o", color=shade, markerfacecolor="white", markersize=5, label=label)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.set_xlabel("success rate, % (line: 95 % interval)")
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    return figure


def coverage_strip(coverages: Sequence[Sequence[float]], names: Sequence[str], threshold: float) -> Figure:
    """Every episode's highest coverage as a dot, the mean as a bar; dashed: what counts as success."""
    figure, axes = _figure(height=0.9 + 0.42 * max(2, len(names)))
    for y, values in enumerate(coverages):
        jitter = np.random.default_rng(0).uniform(-0.2, 0.2, len(values))
        axes.scatter(values, y + jitter, s=22, color=color(y), alpha=0.6, linewidths=0)
        axes.vlines(np.mean(values), y - 0.34, y + 0.34, color=_INK, linewidth=2)
    axes.axvline(threshold, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("highest coverage of the target in an episode (bar: mean)")
    return figure


def training_curve(logs: dict[str, list[dict[str, Any]]], key: str, label: str) -> Figure:
    """A metric over optimizer steps: a line for training, dots for evaluation (`eval_` + key) where there is one.

    `logs` has the trainer's `log_history` of every run, so that colors stay the same.
    """
    figure, axes = _figure(height=2.7, grid="y")
    for index, (name, history) in enumerate(logs.items()):
        for metric, style, suffix in ((key, "-", ""), (f"eval_{key}", "o--", ", held out")):
            points = [(entry["step"], entry[metric]) for entry in history if metric in entry]
            if points:
                style = style if len(points) > 1 else "o"  # one point is no line
                axes.plot(*zip(*points, strict=True), style, color=color(index), alpha=0.55 if suffix else 1)
                axes.lines[-1].set(label=name + suffix, markersize=4, linewidth=1.6)
    axes.set_xlabel("optimizer step")
    axes.set_title(label, loc="left", fontsize=10, color=_INK)
    axes.set_xlim(left=0)
    if len(axes.lines) > 1:
        axes.legend(frameon=False, fontsize=9)
    return figure


def to_svg(figure: Figure) -> str:
    """An `<svg>` element for a page, which chooses the font; the same bytes for the same figure."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vla0_trl"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _figure(height: float, grid: str = "x") -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.4, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.tick_params(length=0, labelsize=9.5, labelcolor=_INK)
    axes.tick_params(axis="x", labelcolor=_MUTED, labelsize=9)
    axes.xaxis.label.set(color=_MUTED, fontsize=9)
    axes.grid(axis=grid, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes
