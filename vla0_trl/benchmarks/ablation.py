"""An ablation: one recipe, a list of changes to it, the same budget for each, compared with what others published."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vla0_trl.evaluation.episode_log import RESULTS
from vla0_trl.evaluation.metrics import wilson_interval
from vla0_trl.evaluation.report.charts import beside_published
from vla0_trl.evaluation.report.summary import Table, format_table, percent_interval, read_results, success_cells
from vla0_trl.files import write_whole
from vla0_trl.manifest import read_json
from vla0_trl.schema import between, checked, each, is_number, line_of_text, mapping, optional, read_record
from vla0_trl.stopping import SIGNALS, Stopped, exit_status
from vla0_trl.training.fields import recipe_fields

# What all arms must share: how much they learn from, and where they go.
_SHARED = {
    *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("config", "output_dir"),
}
_COMMANDS = "commands.json"


def _published(value: Any) -> float | str | None:
    """A rate in percent, or words."""
    if value is None or isinstance(value, str):
        return value
    if not is_number(value) or not 0 <= value <= 100:
        raise ValueError("a rate from 0 to 100, or words")
    return value


def _setting(value: Any) -> Any:
    """What fits on a command line."""
    if isinstance(value, list):
        return [_setting(item) for item in value]
    if isinstance(value, dict):
        return each(_setting)(value)
    if not (isinstance(value, str | bool) or is_number(value)):
        raise ValueError("text, a number, true or false, or a list of them")
    return value


_ARM = {**dict.fromkeys(("train", "evaluate"), optional(each(_setting), {})), "published": _published}
_FILE = {
    **dict.fromkeys(("config", "recipe", "evaluation", "published_source"), line_of_text),
    "published_episodes": between(1, 10**9),
    "arms": each(optional(mapping, {}), 1000),
}


@dataclass
class Arm:
    """One variant: fields of the recipe and flags of the evaluation that it changes."""

    name: str
    train: dict[str, Any] = field(default_factory=dict)
    evaluate: dict[str, Any] = field(default_factory=dict)
    published: float | str | None = None  # others' success rate in percent, or what they say in words

    @property
    def slug(self) -> str:
        """The name as a folder's."""
        return re.sub(r"[^a-z0-9.]+", "_", self.name.lower()).strip("_")


@dataclass
class Ablation:
    """An ablation file, read."""

    config: str  # the YAML that arms change
    recipe: str
    evaluation: str
    published_source: str
    published_episodes: int
    arms: list[Arm]

    @classmethod
    def load(cls, path: Path) -> Ablation:
        """Read and check a file, so that a typo is found before hours of training."""
        data = read_record(path, _FILE)
        _check_keys(data, _FILE.keys(), str(path))
        arms, known = [], set(recipe_fields())
        for name, found in data["arms"].items():
            where = f"{path}, arm {name!r}"
            arm = checked(where, {} if found is None else found, _ARM)
            _check_keys(arm, _ARM.keys(), where)
            _check_keys(arm["train"], known, f"{where}, train")
            for field_name in arm["train"].keys() & _SHARED:
                raise ValueError(f"{where} changes {field_name}, which all arms share: leave it out")
            arms.append(Arm(name, **arm))
        ablation = cls(**data | {"arms": arms})
        slugs = [arm.slug for arm in arms]
        if len(set(slugs)) < len(slugs):
            raise ValueError(f"{path}: two arms have the same folder: {sorted(slugs)}")
        return ablation

    def trained_by(self, arm: Arm) -> Arm:
        """The arm whose training this one uses: the first with the same changes, since executing needs no other."""
        return next(other for other in self.arms if other.train == arm.train)

    def published(self, arm: Arm) -> dict[str, Any] | None:
        """Rate and Wilson interval of what was published, as of `metrics.aggregate`; None if there is no number."""
        if not isinstance(arm.published, int | float):
            return None
        successes, n = round(arm.published / 100 * self.published_episodes), self.published_episodes
        return {"success_rate": arm.published / 100, "success_rate_interval": wilson_interval(successes, n)}


def _check_keys(given: dict[str, Any], known: set[str], where: str) -> None:
    if unknown := given.keys() - known:
        raise ValueError(f"{where}: unknown keys {sorted(unknown)}")


def flags(options: dict[str, Any]) -> list[str]:
    """Options as a command line: `--name value`, as JSON where that is not a plain word."""
    words = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(v if isinstance(v, str) else json.dumps(v) for v in values)]
    return words


def run_logged(command: list[str], log: Path) -> str | None:
    """Run a command with its output in `log`; None if it went well, else the error that it ended with.

    [`Stopped`] if a signal stopped us, within [`raising_stopped`], or the command: once that has saved and ended.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the last process that writes to it has ended
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait()
        except Stopped as stopped:
            # To all of them: `accelerate launch` of one process does not pass it on, nor wait for what it has started.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, stopped.number)
            process.wait()
            file.close()  # a lock that we hold, too
            with log.open() as written:
                fcntl.flock(written, fcntl.LOCK_EX)
            raise
    for number in SIGNALS:
        if code == exit_status(number):
            raise Stopped(number)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] or ["no output"]
    # a recipe's own message is more useful than that of `accelerate launch` about its exit
    return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])[:300] if code else None


def run_arm(
    ablation: Ablation, arm: Arm, folder: Path, train: list[str], evaluate: list[str], launch: list[str]
) -> str | None:
    """Train and evaluate one arm, or what is missing of it; None if it went well, else what went wrong.

    Args:
        train, evaluate, launch (`list[str]`): flags of recipe, evaluation and `accelerate launch` that all arms share.
    """
    trained, evaluated = folder / "train" / ablation.trained_by(arm).slug, folder / "eval" / arm.slug
    commands = {
        "train": [
            *(sys.executable, "-m", "accelerate.commands.launch", *launch, ablation.recipe),
            *("--config", ablation.config, *train, *flags(arm.train), "--output_dir", str(trained)),
        ],
        "evaluate": [
            *(sys.executable, ablation.evaluation, "--model_name_or_path", str(trained), *evaluate),
            *(*flags(arm.evaluate), "--output_dir", str(evaluated)),
        ],
    }
    record = evaluated / _COMMANDS
    if (evaluated / RESULTS).is_file() and read_json(record) == commands:
        return None
    for stage, command in commands.items():
        log = folder / "logs" / f"{arm.slug}_{stage}.log"
        print(f"  {stage}: {log}", flush=True)
        if error := run_logged(command, log):
            return f"{stage}: {error}"
    write_whole(record, json.dumps(commands, indent=1) + "\n")
    return None


def write_report(ablation: Ablation, folder: Path, errors: dict[str, str]) -> Table:
    """ablation.json, .md and .png, out of the arms that have results; `errors` by the arms' names."""
    rows, ours, report = [], [], []
    for arm in ablation.arms:
        file = folder / "eval" / arm.slug / RESULTS
        done = read_results(file) if file.is_file() and arm.name not in errors else None
        cells = ["–", errors.get(arm.name, "not run yet"), "–", "–"]
        if done is not None:
            coverage = done.get("mean_max_coverage")
            cells = [*success_cells(done), "–" if coverage is None else f"{coverage:.3f}", str(done["num_episodes"])]
        published = ablation.published(arm)
        their_interval = percent_interval(published["success_rate_interval"]) if published else "–"
        rows.append([arm.name, *cells, str(arm.published or "–"), their_interval])
        ours.append(done)
        numbers = ("success_rate", "success_rate_interval", "mean_max_coverage", "num_episodes", "successes")
        report.append(
            {"name": arm.name, "train": arm.train, "evaluate": arm.evaluate, "error": errors.get(arm.name)}
            | {name: done.get(name) for name in numbers if done}
            | {"published": arm.published, "published_interval": published and published["success_rate_interval"]}
        )
    table = (["arm", "success %", "95 %", "max coverage", "episodes", "published %", "95 %"], rows)
    source = f"Published: {ablation.published_source}, {ablation.published_episodes} episodes."
    write_whole(folder / "ablation.md", f"{format_table(table, markdown=True)}\n\n{source}\n")
    data = {"config": ablation.config, "published_source": ablation.published_source, "arms": report}
    write_whole(folder / "ablation.json", json.dumps(data, indent=2) + "\n")
    if any(ours):
        figure = beside_published([arm.name for arm in ablation.arms], ours, [*map(ablation.published, ablation.arms)])
        figure.savefig(folder / "ablation.png", dpi=150)
    return table
