"""Evaluations read back, and the tables that compare them."""

from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from vla0_trl.envs.libero.protocol import COLUMNS
from vla0_trl.evaluation.episode_log import EPISODES, RESULTS, VIDEOS, read_episodes, video_name
from vla0_trl.evaluation.metrics import aggregate_by, identity, mean_rate, task_label
from vla0_trl.run_files import read_energy, read_state
from vla0_trl.schema import checked, each, items, mapping, number, optional, read_record, share, text, warn_once, whole

OFFLINE = "offline.json"
_ABOUT = {
    "command": optional(text, "not recorded"),
    "git_commit": optional(text),
    **dict.fromkeys(("versions", "machine"), optional(mapping, {})),
}
_RESULTS = {
    **dict.fromkeys(("checkpoint", "checkpoint_hash"), text),
    **dict.fromkeys(("num_episodes", "successes"), whole),
    "success_rate": share,
    "success_rate_interval": items(share, 2, 2),
    **dict.fromkeys(("mean_steps", "seconds_per_episode", "ms_per_chunk"), number),
    "mean_max_coverage": optional(number),
    "mean_max_coverage_interval": optional(items(number, 2, 2)),
    **dict.fromkeys(("environment_seconds", "model_seconds"), optional(number, 0.0)),
    "protocol": mapping,
    "seeds": optional(each(items(whole, 2, 2))),
    **_ABOUT,
}
_ERRORS = {"rmse": number, "first_rmse": number}
_OFFLINE = {
    **dict.fromkeys(("checkpoint", "checkpoint_hash", "dataset", "episodes"), text),
    "num_frames": whole,
    "token_accuracy": share,
    "baselines": each(mapping, 10),
    **_ERRORS,
    **_ABOUT,
}

Table = tuple[list[str], list[list[str]]]


@dataclass
class Run:
    """One evaluation's output folder, read; log and energy are those of the training that made the checkpoint."""

    name: str  # in tables and pictures
    folder: Path
    results: dict[str, Any]
    episodes: list[dict[str, Any]]
    offline: dict[str, Any] | None
    log_history: list[dict[str, Any]]
    energy: dict[str, Any] | None

    def video(self, episode: dict[str, Any]) -> Path | None:
        """The film of one of its episodes, if it was filmed."""
        path = self.folder / VIDEOS / video_name(episode)
        return path if path.is_file() else None


def load_runs(folders: list[Path]) -> list[Run]:
    """Read evaluations, in this order; named by their folders, or by whole paths where two folders share a name."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return [_load_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def _load_run(folder: Path, name: str) -> Run:
    if not (folder / RESULTS).is_file():
        raise FileNotFoundError(f"{folder} has no {RESULTS}: no evaluation, or one to finish by running it again")
    results = read_results(folder / RESULTS)
    offline = read_record(folder / OFFLINE, _OFFLINE) if (folder / OFFLINE).is_file() else None
    for baseline, errors in offline["baselines"].items() if offline else ():
        checked(f"{folder / OFFLINE}: baseline {baseline}", errors, _ERRORS)
    if offline is not None and offline["checkpoint_hash"] != results["checkpoint_hash"]:
        raise ValueError(
            f"{folder}/{OFFLINE} is of checkpoint {offline['checkpoint']} ({offline['checkpoint_hash'][:8]}), "
            f"{RESULTS} of {results['checkpoint']} ({results['checkpoint_hash'][:8]}): run eval_offline.py again"
        )
    checkpoint = Path(results["checkpoint"])
    state = read_state(checkpoint)
    # A run's final model lies in its folder, the earlier ones in folders inside it.
    energy = read_energy(checkpoint.parent if checkpoint.name.startswith("checkpoint-") else checkpoint)
    episodes = read_episodes(folder, results["seeds"])
    if len(episodes) != results["num_episodes"]:
        there = f"{folder}: {RESULTS} counts {results['num_episodes']} episodes, {EPISODES} has {len(episodes)}"
        fix = "run the evaluation again, which runs those that are missing"
        if not episodes:
            raise ValueError(f"{there}: {fix}")
        warn_once(f"{there}: {fix}")
    return Run(name, folder, results, episodes, offline, state["log_history"] if state else [], energy)


def read_results(path: Path) -> dict[str, Any]:
    """A results.json. `ValueError`: one line for each field that is wrong."""
    results = read_record(path, _RESULTS)
    if results["mean_max_coverage"] is None or results["mean_max_coverage_interval"] is None:
        del results["mean_max_coverage"], results["mean_max_coverage_interval"]  # tables ask whether it is there
    else:
        checked(f"{path}: protocol", results["protocol"], {"success_coverage": share})
    return results


def summary_table(runs: list[tuple[str, dict[str, Any]]]) -> Table:
    """One row per run, from (name, `metrics.aggregate`'s numbers); with the revision where they are a whole run's."""
    with_coverage = all("mean_max_coverage" in run for _, run in runs)
    middle = ["max coverage", "95 %"] if with_coverage else ["steps"]
    whole = all("checkpoint_hash" in run for _, run in runs)
    names = ["run", "revision"] if whole else ["run"]
    header = [*names, "episodes", "success %", "95 %", *middle, "s/episode", "ms/chunk"]
    rows = []
    for name, run in runs:
        row = [name, run["checkpoint_hash"][:8]] if whole else [name]
        row += [str(run["num_episodes"]), *success_cells(run)]
        if with_coverage:
            coverage = run["mean_max_coverage_interval"]
            row += [f"{run['mean_max_coverage']:.3f}", f"{coverage[0]:.3f} – {coverage[1]:.3f}"]
        else:
            row += [f"{run['mean_steps']:.0f}"]
        rows.append([*row, f"{run['seconds_per_episode']:.2f}", f"{run['ms_per_chunk']:.1f}"])
    return header, rows


def success_cells(run: dict[str, Any]) -> list[str]:
    """Success rate and interval, in percent."""
    return [f"{100 * run['success_rate']:.1f}", percent_interval(run["success_rate_interval"])]


def suite_table(runs: list[Run]) -> Table | None:
    """Success rates of LIBERO's suites with their intervals, as papers have them; None for other simulators.

    "Avg" is the mean of the papers' four suites, or of those of them that were run; "90" does not enter it.
    """
    by_run = [aggregate_by(itemgetter("suite"), run.episodes) for run in runs if "suite" in run.episodes[0]]
    if len(by_run) < len(runs):
        return None
    suites = [suite for suite in COLUMNS if any(suite in numbers for numbers in by_run)]
    rows = []
    for run, numbers in zip(runs, by_run, strict=True):
        parts = [numbers.get(suite) for suite in suites]
        cells = [_cell(part["success_rate"], part["success_rate_interval"]) if part else "–" for part in parts]
        averaged = [part for suite, part in numbers.items() if suite != "libero_90"]
        cells.append(_cell(*mean_rate(averaged)) if averaged else "–")
        rows.append([run.name, str(len(run.episodes)), *cells])
    return ["run", "episodes", *(COLUMNS[suite] for suite in suites), "Avg"], rows


def _cell(rate: float, interval: tuple[float, float]) -> str:
    return f"{100 * rate:.1f} ({percent_interval(interval)})"


def percent_interval(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:.1f} – {100 * interval[1]:.1f}"


def tasks(runs: list[Run]) -> dict[str, list[dict[str, Any]]]:
    """`aggregate`'s numbers of each run, for each task that all of them have; named as the first run was told it."""

    def key(row: dict[str, Any]) -> Any:
        return identity(row)[:-1] or row["task"]

    told = {key(row): row["task"] for row in runs[0].episodes}
    named = [[row | {"task": told.get(key(row), row["task"])} for row in run.episodes] for run in runs]
    return _shared([aggregate_by(task_label, rows) for rows in named])


def suites(runs: list[Run]) -> dict[str, list[dict[str, Any]]]:
    """The same for LIBERO's suites; none for other simulators."""
    libero = all("suite" in run.episodes[0] for run in runs)
    return _shared([aggregate_by(itemgetter("suite"), run.episodes) for run in runs]) if libero else {}


def _shared(by_run: list[dict[str, dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    return {name: [numbers[name] for numbers in by_run] for name in by_run[0] if all(name in n for n in by_run)}


def task_table(runs: list[Run]) -> Table | None:
    """One row per task and run; None if there are not several tasks."""
    by_task = tasks(runs)
    rows = [(f"{task} · {run.name}", row) for task in by_task for run, row in zip(runs, by_task[task], strict=True)]
    return summary_table(rows) if len(by_task) > 1 else None


def offline_table(runs: list[Run]) -> Table | None:
    """Held-out open-loop metrics, with the baselines as rows of their own; None if no run has any."""
    header = ["run", "frames", "token accuracy %", "RMSE chunk", "RMSE first action"]
    rows: dict[str, list[str]] = {}
    for run in runs:
        if run.offline is None:
            continue
        frames, metrics = str(run.offline["num_frames"]), {run.name: run.offline} | run.offline["baselines"]
        for name, numbers in metrics.items():
            accuracy = f"{100 * numbers['token_accuracy']:.1f}" if name == run.name else "–"
            rows.setdefault(name, [name, frames, accuracy, f"{numbers['rmse']:.2f}", f"{numbers['first_rmse']:.2f}"])
    ordered = sorted(rows.values(), key=lambda row: row[2] == "–")  # baselines last, otherwise as they came
    return (header, ordered) if rows else None


def energy_table(runs: list[Run]) -> Table | None:
    """What the training of each run took, all of it, against the success that it brought; None if none measured it.

    Energy against performance is how the study of efficient learners among the seeds compares fine-tunings. The ratio
    is to percents of success, not to successes: more episodes of evaluation must not make a training look cheaper.
    """
    rows = []
    for run in runs:
        if run.energy is not None:
            watt_hours, percent = 1000 * run.energy["kwh"], 100 * run.results["success_rate"]
            ratio = f"{watt_hours / percent:.3g}" if percent else "–"
            hours = f"{run.energy['seconds'] / 3600:.2f}"
            rows.append([run.name, str(run.energy["samples"]), hours, f"{watt_hours / 1000:.3g}", ratio])
    return (["run", "samples", "hours", "training kWh", "Wh per % of success"], rows) if rows else None


def format_table(table: Table, markdown: bool = False) -> str:
    """Aligned columns for a terminal, or Markdown: the first to the left, the others to the right."""
    header, rows = table
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for first, *others in [header, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append([first.ljust(widths[0]), *cells])
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + "-:"[markdown] for width in widths[1:])])
    if markdown:
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in lines)
