"""A metric against the samples seen, for one run or several: what training has bought so far.

    python recipes/curves.py runs/pusht_nano --key loss --output loss.png
    python recipes/curves.py runs/a runs/b --key success_rate --output success.png

Keys are those of the training log (loss, mean_token_accuracy, observation_gap, …) and, where checkpoints were
evaluated into RUN/eval/checkpoint-N and RUN/eval/final, success_rate and mean_max_coverage. Runs that still go on are
shown up to their last checkpoint. The points are written beside the picture, as JSON.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla0_trl.command_line import ScriptParser, option, user_errors
from vla0_trl.evaluation.episode_log import RESULTS
from vla0_trl.evaluation.report.charts import training_curve
from vla0_trl.evaluation.report.summary import read_results
from vla0_trl.files import write_whole
from vla0_trl.run_files import global_batch, read_state
from vla0_trl.run_folder import RUN_FILE, STATE_FILE, last_checkpoint

EVALUATED = ("success_rate", "success_rate_interval", "mean_max_coverage", "num_episodes")


@dataclass(kw_only=True)
class Arguments:
    key: str = option(help="what to draw")
    label: str | None = option(None, "what the picture calls it (default: the key)")
    output: Path = option(help="the PNG")
    samples_per_minute: float | None = option(None, "draw minutes instead of samples, at this speed", metavar="RATE")


def read_run(folder: Path) -> list[dict[str, Any]]:
    """Log entries and evaluations of a run, each with the `samples` that it had seen."""
    checkpoint = folder if (folder / STATE_FILE).is_file() else last_checkpoint(folder)
    if checkpoint is None or not (folder / RUN_FILE).is_file():
        raise FileNotFoundError(f"{folder}: no run of recipes/sft_*.py with a checkpoint")
    state = read_state(checkpoint)
    if state is None:
        raise ValueError(f"{checkpoint} has no {STATE_FILE} that can be read")
    entries = list(state["log_history"])
    for file in folder.glob(f"eval/*/{RESULTS}"):
        name, results = file.parent.name, read_results(file)
        number = name.removeprefix("checkpoint-")
        if name == "final" or number.isdecimal():
            step = state["global_step"] if name == "final" else int(number)
            entries.append({"step": step} | {key: results[key] for key in EVALUATED if key in results})
    batch = global_batch(folder)
    return sorted(({**entry, "samples": entry["step"] * batch} for entry in entries), key=lambda e: e["samples"])


def main() -> None:
    parser = ScriptParser(Arguments, __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output_dir of a recipe")
    args, others, _ = parser.parse()
    with user_errors():
        entries = {run.name: read_run(run) for run in others.runs}
        logs = {name: [entry for entry in log if args.key in entry] for name, log in entries.items()}
        if not any(logs.values()):
            known = sorted({key for log in entries.values() for entry in log for key in entry} - {"step", "samples"})
            runs = ", ".join(map(str, others.runs))
            raise ValueError(f"{args.key} is in no log of {runs}, which have {', '.join(known)}")
    speed = args.samples_per_minute
    unit = speed or 1
    figure = training_curve(
        {name: [entry | {"step": entry["samples"] / unit} for entry in entries] for name, entries in logs.items()},
        args.key,
        args.label or args.key,
    )
    figure.axes[0].set_xlabel(f"minutes, at {speed:g} samples per minute" if speed else "samples")
    with user_errors():
        args.output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.output, dpi=150)
    kept = ("step", "samples", args.key, *EVALUATED)
    points = {name: [{k: e[k] for k in kept if k in e} for e in entries] for name, entries in logs.items()}
    write_whole(args.output.with_suffix(".json"), json.dumps(points, indent=1) + "\n")
    print(args.output)


if __name__ == "__main__":
    main()
