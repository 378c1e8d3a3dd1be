"""One self-contained HTML page about evaluations: pictures, tables, videos, commands, versions."""

import base64
from html import escape
from pathlib import Path
from typing import Any

from vla0_trl.evaluation.metrics import task_label
from vla0_trl.evaluation.report import charts
from vla0_trl.evaluation.report.summary import (
    Run,
    Table,
    energy_table,
    offline_table,
    suite_table,
    suites,
    summary_table,
    task_table,
    tasks,
)
from vla0_trl.files import write_whole

REPORT = "report.html"

_STYLE = """
:root { --ink: #1f2937; --muted: #6b7280; --line: #e5e7eb; --paper: #ffffff; --wash: #f8fafc; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 3rem 2rem 5rem; max-width: 68rem; color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0; font-size: 2rem; font-weight: 650; letter-spacing: -0.02em; line-height: 1.2; }
header p { margin: 0.4rem 0 0; color: var(--muted); }
section { margin-top: 3rem; }
h2 { margin: 0 0 1rem; font-size: 1.15rem; font-weight: 650; letter-spacing: -0.01em; }
section > h2 { padding-bottom: 0.4rem; border-bottom: 1px solid var(--line); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 1rem; margin-top: 2rem; }
.card { padding: 1.1rem 1.3rem; border: 1px solid var(--line); border-top: 4px solid var(--run); border-radius: 8px; }
.card h2 { margin: 0; font-size: 0.95rem; color: var(--run); }
.card b { font-size: 1.9rem; font-weight: 650; letter-spacing: -0.02em; }
.card p { margin: 0; }
.card p + p { color: var(--muted); font-size: 0.9rem; }
.pictures, .videos { display: grid; gap: 1.5rem 2rem; align-items: start; }
.pictures { grid-template-columns: repeat(auto-fill, minmax(24rem, 1fr)); }
.videos { grid-template-columns: repeat(auto-fill, minmax(13.5rem, 1fr)); }
figure { margin: 0; }
figure svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif !important; }
video { display: block; width: 100%; border: 1px solid var(--line); border-top: 4px solid var(--run);
  border-radius: 8px; }
figcaption { margin-top: 0.5rem; color: var(--muted); font-size: 0.9rem; }
figcaption b { color: var(--ink); font-weight: 600; }
.scroll { margin-top: 1.25rem; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.45rem 0 0.45rem 1.2rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th { color: var(--muted); font-weight: 500; }
th:first-child, td:first-child, .plain th, .plain td { padding-left: 0; text-align: left; }
.plain td { padding-right: 1.5rem; vertical-align: top; white-space: normal; overflow-wrap: anywhere; }
.plain td:first-child { color: var(--muted); white-space: nowrap; }
.note { color: var(--muted); font-size: 0.9rem; }
pre { margin: 0; padding: 1rem 1.2rem; background: var(--wash); border: 1px solid var(--line); border-radius: 8px;
  white-space: pre-wrap; overflow-wrap: anywhere;
  font: 0.85rem/1.7 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
code { display: block; padding-left: 4ch; text-indent: -4ch; font: inherit; }
"""


def success_figure(runs: list[Run]) -> charts.Figure:
    """Bars of all runs; where there are several suites or else tasks, of each of them, too."""
    parts = suites(runs)
    if len(parts) == 1:  # "libero_object 3: pick up the …" leaves no room for a bar
        parts = {task.partition(":")[0]: numbers for task, numbers in tasks(runs).items()}
    elif not parts:
        parts = tasks(runs)
    groups = {"": [run.results for run in runs]} | (parts if len(parts) > 1 else {})
    return charts.success_bars(groups, [run.name for run in runs])


def write_report(path: Path, runs: list[Run], title: str, commands: list[str] | None = None) -> None:
    """Write one HTML page that needs no other file and no network: pictures, tables and videos are inside.

    Args:
        runs (`list[Run]`): in the order of showing.
        commands (`list[str]`, *optional*): what was run to get here; by default what the results recorded.
    """
    sections = [_cards(runs), _simulator(runs), _open_loop(runs), _training(runs), _videos(runs)]
    sections += [_commands(runs, commands), _provenance(runs)]
    body = "\n".join(section for section in sections if section)
    names = list(dict.fromkeys(episode["task"] for episode in runs[0].episodes))
    task = names[0] if len(names) == 1 else f"{len(names)} tasks"
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><p>{escape(task)}</p></header>
{body}
</body>
</html>
"""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page)


def _cards(runs: list[Run]) -> str:
    cards = []
    for index, run in enumerate(runs):
        low, high = run.results["success_rate_interval"]
        last = f"{run.results['mean_steps']:.0f} steps an episode"
        if "mean_max_coverage" in run.results:
            last = f"mean highest coverage {run.results['mean_max_coverage']:.3f}"
        cards.append(
            f'<div class="card" style="--run: {charts.color(index)}"><h2>{escape(run.name)}</h2>'
            f"<p><b>{100 * run.results['success_rate']:.1f} %</b> success</p>"
            f"<p>{run.results['successes']} of {run.results['num_episodes']} episodes, "
            f"95 % interval {100 * low:.0f} – {100 * high:.0f} %</p>"
            f"<p>{last}</p></div>"
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _simulator(runs: list[Run]) -> str:
    figures = [success_figure(runs)]
    note = "Success rates have Wilson's interval. ms/chunk is the model's time divided by the chunks that it gave."
    if all("mean_max_coverage" in run.results for run in runs):
        coverages = [[episode["max_coverage"] for episode in run.episodes] for run in runs]
        threshold = runs[0].results["protocol"]["success_coverage"]
        figures.append(charts.coverage_strip(coverages, [run.name for run in runs], threshold))
        note += (
            " Coverages have a bootstrapped one. An episode's highest coverage counts its start, so doing nothing "
            "does not give zero."
        )
    tables = [suite_table(runs), summary_table([(run.name, run.results) for run in runs]), task_table(runs)]
    return (
        f"<section><h2>In the simulator</h2>{_pictures(*figures)}"
        f"{''.join(_html_table(table) for table in tables if table)}<p class='note'>{note}</p></section>"
    )


def _open_loop(runs: list[Run]) -> str:
    table = offline_table(runs)
    if table is None:
        return ""
    sources = dict.fromkeys(f"episodes {o['episodes']} of {o['dataset']}" for o in (run.offline for run in runs) if o)
    note = (
        f"Frames of {' and '.join(sources)}. Token accuracy is teacher-forced; the RMSE is of actions that the policy "
        "generates from the stored frames, in the environment's units (pixels in PushT)."
    )
    return f"<section><h2>On demonstrations</h2>{_html_table(table)}<p class='note'>{escape(note)}</p></section>"


def _training(runs: list[Run]) -> str:
    logs, energy = {run.name: run.log_history for run in runs}, energy_table(runs)
    parts = [_html_table(energy)] if energy else []
    if any(logs.values()):
        loss = charts.training_curve(logs, "loss", "loss")
        parts.insert(0, _pictures(loss, charts.training_curve(logs, "mean_token_accuracy", "action-token accuracy")))
    return f"<section><h2>Training</h2>{''.join(parts)}</section>" if parts else ""


def _videos(runs: list[Run]) -> str:
    figures = []
    for index, run in enumerate(runs):
        filmed = sorted(filter(run.video, run.episodes), key=_merit)
        shown = {"best": filmed[-1:], "worst": filmed[:-1][:1]}  # one film is not shown twice
        for label, episode in ((label, shown[label][0]) for label in shown if shown[label]):
            data = base64.b64encode(run.video(episode).read_bytes()).decode()
            figures.append(
                f'<figure style="--run: {charts.color(index)}">'
                f'<video controls autoplay loop muted playsinline src="data:video/mp4;base64,{data}"></video>'
                f"<figcaption><b>{escape(run.name)}: {label}</b> of {len(filmed)} filmed<br>{_caption(episode)}, "
                f"{episode['steps']} steps</figcaption></figure>"
            )
    return f'<section><h2>Episodes</h2><div class="videos">{"".join(figures)}</div></section>' if figures else ""


def _merit(episode: dict[str, Any]) -> tuple[float, int]:
    """The better the larger: coverage where there is one, else success, and that soon."""
    return episode.get("max_coverage", float(episode["success"])), -episode["steps"]


def _caption(episode: dict[str, Any]) -> str:
    if "max_coverage" in episode:
        return f"seed {episode['seed']}, coverage {episode['max_coverage']:.3f}"
    outcome = "success" if episode["success"] else "failure"
    return f"{escape(task_label(episode))}<br>initial state {episode['seed']}, {outcome}"


def _commands(runs: list[Run], commands: list[str] | None) -> str:
    if commands is None:
        recorded = [part["command"] for run in runs for part in (run.results, run.offline) if part is not None]
        commands = list(dict.fromkeys(recorded))
    lines = "".join(f"<code>{escape(command)}</code>" for command in commands)
    return f"<section><h2>Commands</h2><pre>{lines}</pre></section>"


def _provenance(runs: list[Run]) -> str:
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
    table = _html_table((["", *(run.name for run in runs)], rows), plain=True)
    return f"<section><h2>Where the numbers are from</h2>{table}</section>"


def _pictures(*figures: charts.Figure) -> str:
    return f'<div class="pictures">{"".join(f"<figure>{charts.to_svg(figure)}</figure>" for figure in figures)}</div>'


def _html_table(table: Table, plain: bool = False) -> str:
    header, rows = table
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in header)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table{" class=plain" if plain else ""}>{body}</table></div>'
