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
from pathlib import Path

from vla0_trl.config import VLAConfig
from vla0_trl.envs.libero import protocol
from vla0_trl.envs.libero.perturb import NAMES, parse_perturbation
from vla0_trl.envs.libero.setup import check_mujoco, find_assets
from vla0_trl.evaluation.libero import (
    benchmark_envs,
    environment_factory,
    evaluation_config,
    run_missing,
    run_protocol,
    suite_results,
)
from vla0_trl.evaluation.report.page import REPORT, write_report
from vla0_trl.evaluation.report.summary import format_table, load_runs, suite_table, summary_table, task_table
from vla0_trl.evaluation.runner import (
    NOT_ALL,
    EvaluationParser,
    finish,
    missing_share,
    open_log,
    run_identity,
    stopping_well,
)
from vla0_trl.models.loading import checkpoint_folder
from vla0_trl.policy.policy import VLAPolicy, resolve_device


def build_parser() -> EvaluationParser:
    parser = EvaluationParser(__doc__, num_envs=8, num_videos=1)
    add = parser.add_argument
    add("--suites", default=",".join(list(protocol.MAX_STEPS)[:4]), help="separated by commas (default: %(default)s)")
    add("--task_ids", help="of each suite, separated by commas, from 0 (default: all)")
    add("--num_episodes_per_task", type=int, default=protocol.NUM_INIT_STATES, help="(default: %(default)s)")
    add("--assets_dir", help="LIBERO's assets (default: $LIBERO_ASSETS, else the Hub's)")
    add("--perturb", action="append", default=[], metavar="NAME[:SEVERITY]", help=f"may be repeated; {NAMES}")
    add("--benchmark_envs", action="store_true", help="only print the speed of --num_envs against one in sequence")
    return parser


def report(folders: list[Path]) -> None:
    """The tables here, and report.html in the first folder."""
    runs = load_runs(folders)
    tables = [task_table(runs), summary_table([(run.name, run.results) for run in runs]), suite_table(runs)]
    print("\n\n".join(format_table(table) for table in tables if table) + "\n")
    for run in runs:
        environment, model = (run.results[f"{name}_seconds"] for name in ("environment", "model"))
        print(f"{run.name}: {environment:.1f} s environment-bound, {model:.1f} s model-bound")
    print(", ".join(f"{name} {version}" for name, version in runs[0].results["versions"].items()))
    write_report(folders[0] / REPORT, runs, "LIBERO evaluation")
    print(f"\nresults, episodes, videos and {REPORT}: {folders[0]}")


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    device, dtype = resolve_device(args.device, args.dtype)
    try:
        episodes = protocol.select_episodes(args.suites, args.task_ids, args.num_episodes_per_task)
        conditions = {None: None} | {name: parse_perturbation(name) for name in args.perturb}
        checkpoint = checkpoint_folder(args.model_name_or_path)
        config = evaluation_config(VLAConfig.from_pretrained(checkpoint), args)
        check_mujoco()
        args.assets_dir = str(find_assets(args.assets_dir))
        if args.benchmark_envs:
            make_env = environment_factory(config, args, None)
            one, many = benchmark_envs(make_env, config, episodes[0], args.num_envs)
            print(
                f"1 environment: {one:.1f} steps/s; {args.num_envs}: {many:.1f} steps/s, {many / one:.2f} times that"
            )
            return
        base = run_identity(args, checkpoint, {})
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")

    policy, folders, crashed, unfinished = None, [], [], False
    for name, perturbation in conditions.items():
        folders.append(Path(args.output_dir) / ("" if name is None else f"perturbed/{name.replace(':', '_')}"))
        run = base | {"protocol": run_protocol(config, args, name, str(dtype))}
        try:
            log = open_log(folders[-1], run, episodes, args)
        except (ValueError, OSError) as error:
            parser.exit(2, f"error: {error}\n")
        with log, stopping_well(parser, log):
            missing = missing_share(log, episodes, args)
            if missing:
                policy = policy or VLAPolicy.from_pretrained(checkpoint, device, dtype, load_in_4bit=args.load_in_4bit)
                policy.config = config
                make_env = environment_factory(config, args, perturbation)
                crashed += run_missing(policy, log, missing, make_env, args)
            unfinished |= not finish(log, episodes, str(device), protocol.PACKAGES, suite_results)
    for episode in crashed:
        print(f"crashed twice, so without a result: {episode.seed}")
    if unfinished:
        # launchers end the other processes when one fails
        parser.exit(1 if crashed and args.num_processes == 1 else 0, NOT_ALL)
    report(folders)


if __name__ == "__main__":
    main()
