"""One self-contained HTML page about evaluations: pictures, tables, videos, commands, versions."""

import base64
from pathlib import Path
from typing import Any

from markupsafe import Markup

from vla0_trl.evaluation.metrics import task_label
from vla0_trl.evaluation.report import charts, summary
from vla0_trl.evaluation.report.summary import Run, Table
from vla0_trl.files import write_whole
from vla0_trl.templating import render

REPORT = "report.html"


def success_figure(runs: list[Run]) -> charts.Figure:
    """Bars of all runs; where there are several suites or else tasks, of each of them, too."""
    parts = summary.suites(runs)
    if len(parts) == 1:  # "libero_object 3: pick up the …" leaves no room for a bar
        parts = {task.partition(":")[0]: numbers for task, numbers in summary.tasks(runs).items()}
    elif not parts:
        parts = summary.tasks(runs)
    groups = {"": [run.results for run in runs]} | (parts if len(parts) > 1 else {})
    return charts.success_bars(groups, [run.name for run in runs])


def write_report(path: Path, runs: list[Run], title: str, commands: list[str] | None = None) -> None:
    """Write one HTML page that needs no other file and no network: pictures, tables and videos are inside.

    Args:
        runs (`list[Run]`): in the order of showing.
        commands (`list[str]`, *optional*): what was run to get here; by default what the results recorded.
    """
    sources = dict.fromkeys(f"episodes {o['episodes']} of {o['dataset']}" for o in (run.offline for run in runs) if o)
    names = list(dict.fromkeys(episode["task"] for episode in runs[0].episodes))
    if commands is None:
        parts = [part for run in runs for part in (run.results, run.offline) if part is not None]
        commands = list(dict.fromkeys(part["command"] for part in parts))
    page = render(
        "report.html",
        title=title,
        task=names[0] if len(names) == 1 else f"{len(names)} tasks",
        runs=[(run, charts.color(index)) for index, run in enumerate(runs)],
        simulator=_simulator(runs),
        open_loop={"table": summary.offline_table(runs), "sources": sources},
        training=_training(runs),
        videos=[video for index, run in enumerate(runs) for video in _videos(run, charts.color(index))],
        commands=commands,
        provenance=_provenance(runs),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page)


def _simulator(runs: list[Run]) -> dict[str, Any]:
    figures = [success_figure(runs)]
    coverage = all("mean_max_coverage" in run.results for run in runs)
    if coverage:
        coverages = [[e["max_coverage"] for e in run.episodes if "max_coverage" in e] for run in runs]
        threshold = runs[0].results["protocol"]["success_coverage"]
        figures.append(charts.coverage_strip(coverages, [run.name for run in runs], threshold))
    total = summary.summary_table([(run.name, run.results) for run in runs])
    tables = [summary.suite_table(runs), total, summary.task_table(runs)]
    return {"figures": _drawn(*figures), "coverage": coverage, "tables": [table for table in tables if table]}


def _training(runs: list[Run]) -> dict[str, Any]:
    logs = {run.name: run.log_history for run in runs}
    curves = {"loss": "loss", "mean_token_accuracy": "action-token accuracy"} if any(logs.values()) else {}
    figures = [charts.training_curve(logs, key, label) for key, label in curves.items()]
    return {"figures": _drawn(*figures), "energy": summary.energy_table(runs)}


def _videos(run: Run, color: str) -> list[dict[str, Any]]:
    """The best and the worst film of a run; one film is not shown twice."""
    filmed = sorted(filter(run.video, run.episodes), key=_merit)
    shown = [("best", filmed[-1])] if filmed else []
    shown += [("worst", filmed[0])] if len(filmed) > 1 else []
    return [
        {
            "run": run.name,
            "color": color,
            "label": label,
            "filmed": len(filmed),
            "episode": episode,
            "task": task_label(episode),
            "data": base64.b64encode(run.video(episode).read_bytes()).decode(),
        }
        for label, episode in shown
    ]


def _merit(episode: dict[str, Any]) -> tuple[float, int]:
    """The better the larger: coverage where there is one, else success, and that soon."""
    return episode.get("max_coverage", float(episode["success"])), -episode["steps"]


def _provenance(runs: list[Run]) -> Table:
    def words(values: dict[str, Any]) -> str:
        return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)

    rows = [
        ["checkpoint", *(run.results["checkpoint"] for run in runs)],
        ["its hash", *(run.results["checkpoint_hash"][:16] for run in runs)],
        ["protocol", *(words(run.results["protocol"]) for run in runs)],
        ["commit", *(run.results["git_commit"] or "not in a checkout" for run in runs)],
        ["versions", *(words(run.results["versions"]) for run in runs)],
        ["machine", *(words(run.results["machine"]) for run in runs)],
    ]
    return ["", *(run.name for run in runs)], rows


def _drawn(*figures: charts.Figure) -> list[Markup]:
    return [Markup(charts.to_svg(figure)) for figure in figures]
