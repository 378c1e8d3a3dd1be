"""Compare evaluations: a table with 95 % intervals here, and summary.md, success.png and report.html in --output.

    python eval/summarize.py runs/eval_untrained runs/eval --output runs/report
    python eval/summarize.py runs/libero/eval runs/libero/eval/perturbed/*

Each OUTPUT_DIR is what eval_pusht.py or eval_libero.py wrote; an offline.json of eval_offline.py, and beside the
checkpoint the training log and the energy that --log_energy measured, are shown where they exist. report.html is one
file, with videos inside.
"""

from dataclasses import dataclass
from pathlib import Path

from vla0_trl.command_line import ScriptParser, option, user_errors
from vla0_trl.evaluation.report import summary
from vla0_trl.evaluation.report.page import REPORT, success_figure, write_report


@dataclass(kw_only=True)
class Arguments:
    output: Path | None = option(None, "where to write (default: the first OUTPUT_DIR)")
    title: str = option("Evaluation", "title of the page (default: %(default)s)")
    commands: Path | None = option(None, "a file with what was run, for the page (default: as recorded)")


def main() -> None:
    parser = ScriptParser(Arguments, __doc__)
    parser.add_argument("output_dirs", nargs="+", type=Path, metavar="OUTPUT_DIR", help="finished evaluations")
    args, others, _ = parser.parse()
    output = args.output or others.output_dirs[0]
    with user_errors():
        runs = summary.load_runs(others.output_dirs)
        commands = args.commands.read_text().splitlines() if args.commands else None
        output.mkdir(parents=True, exist_ok=True)

    tables = [summary.suite_table(runs), summary.summary_table([(run.name, run.results) for run in runs])]
    tables += [summary.task_table(runs), summary.offline_table(runs), summary.energy_table(runs)]
    tables = [table for table in tables if table is not None]
    markdown = "\n\n".join(summary.format_table(table, markdown=True) for table in tables)
    (output / "summary.md").write_text(markdown + "\n")
    success_figure(runs).savefig(output / "success.png", dpi=200)
    write_report(output / REPORT, runs, args.title, commands)
    print("\n\n".join(map(summary.format_table, tables)))
    print(f"\nsummary.md, success.png and {REPORT}: {output}")


if __name__ == "__main__":
    main()
