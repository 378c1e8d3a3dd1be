"""Evaluate a checkpoint in the LIBERO simulator: success per task and suite, as papers report it, with 95 % intervals.

    python eval/eval_libero.py --model_name_or_path runs/libero --num_envs 8 --output_dir runs/libero/eval

Four suites, all tasks, 50 initial states each: the full protocol. A part of it; and the two ways to execute chunks:

    python eval/eval_libero.py --model_name_or_path runs/libero --suites libero_object --task_ids 0,3 \\
        --num_episodes_per_task 10 --assets_dir PATH/assets --output_dir runs/libero/eval_part
    python eval/eval_libero.py --model_name_or_path runs/libero --ensemble_size 8 --output_dir runs/libero/eval_ens
    python eval/eval_libero.py --model_name_or_path runs/libero --n_action_steps 8 --output_dir runs/libero/eval_open

With something changed, beside the clean result; and over several processes, GPUs or machines with a shared folder,
of which each runs its share (--num_processes: the number of GPUs, or of processes without any):

    python eval/eval_libero.py … --perturb rotate:180 --perturb noise:3 --perturb no_task
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml --num_processes 2 eval/eval_libero.py …

Stopped at any moment, the same command runs only what is missing. The protocol: vla0_trl/envs/libero/protocol.py. An
episode whose simulator crashes is tried once more in a fresh process, and is never counted as a failure.
"""

import warnings
from functools import partial
from pathlib import Path

from vla0_trl.command_line import parse, user_errors
from vla0_trl.envs.libero import protocol
from vla0_trl.envs.libero.perturb import parse_perturbation
from vla0_trl.evaluation.arguments import LiberoArguments
from vla0_trl.evaluation.report.page import REPORT, write_report
from vla0_trl.evaluation.report.summary import format_table, load_runs, suite_table, summary_table, task_table


def report(folders: list[Path]) -> None:
    """The tables here, and report.html in the first folder."""
    runs = load_runs(folders)
    write_report(folders[0] / REPORT, runs, "LIBERO evaluation")
    tables = [task_table(runs), summary_table([(run.name, run.results) for run in runs]), suite_table(runs)]
    print("\n\n".join(format_table(table) for table in tables if table) + "\n")
    for run in runs:
        environment, model = (run.results[f"{name}_seconds"] for name in ("environment", "model"))
        print(f"{run.name}: {environment:.1f} s environment-bound, {model:.1f} s model-bound")
    print(", ".join(f"{name} {version}" for name, version in runs[0].results["versions"].items()))
    print(f"\nresults, episodes, videos and {REPORT}: {folders[0]}")


def main() -> None:
    args = parse(LiberoArguments, __doc__)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    with user_errors():
        protocol.select_episodes(args.suites, args.task_ids, args.num_episodes_per_task)
        for name in args.perturb:
            parse_perturbation(name)
    from vla0_trl.evaluation import driver, libero  # after parsing: they import torch, which takes seconds

    prepare, source = partial(libero.prepare, args=args), driver.checkpoint_policy
    if args.policy is not None:
        from vla0_trl.serving.remote_policy import LIBERO, remote_policy

        source = partial(remote_policy, simulator=LIBERO)
    if args.benchmark_envs:
        with user_errors():
            simulation = prepare(source(args).config)
        one, many = libero.benchmark_envs(simulation, args.num_envs)
        print(f"1 environment: {one:.1f} steps/s; {args.num_envs}: {many:.1f} steps/s, {many / one:.2f} times that")
        return
    report(driver.evaluate(args, prepare, source))


if __name__ == "__main__":
    main()
