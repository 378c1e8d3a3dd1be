"""Which choice matters? Train variants of one recipe with the same budget, evaluate each, and compare.

    python recipes/ablate.py --ablations recipes/pusht/ablations.yaml --num_episodes 200 --output_dir runs/ablation

The file names the recipe's YAML and, for each arm, what it changes of the training (`train:`, any field of the
recipe) and of the execution (`evaluate:`, any flag of the evaluation), and what others published for it (`published:`,
a column of its own). Arms that differ in `evaluate:` alone share one training.

What comes after -- goes to every training, e.g. a smaller budget for a first look:

    python recipes/ablate.py --ablations recipes/pusht/ablations.yaml --arms "relative, state" "masking off" \\
        --output_dir runs/ablation_small -- --max_steps 200

Stopped at any moment, the same command goes on where it was: finished arms are not run again. An arm that fails is
named in the table, and the others still run. Writes ablation.md, .json and .png, again after every arm.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from vla0_trl.benchmarks.ablation import Ablation, run_arm, write_report
from vla0_trl.command_line import ScriptParser, option, user_errors
from vla0_trl.evaluation.report.summary import format_table
from vla0_trl.run_folder import RunFolder
from vla0_trl.stopping import Stopped, raising_stopped
from vla0_trl.streams import prepare_streams


@dataclass(kw_only=True)
class Arguments:
    ablations: Path = option(help="file of arms, such as recipes/pusht/ablations.yaml")
    output_dir: Path = option(help="gets train/, eval/, logs/ and the tables")
    arms: list[str] | None = option(None, "run only these arms (default: all)", metavar="NAME")
    num_episodes: int = option(200, "episodes to evaluate each arm on (default: %(default)s)")
    seed: int = option(100_000, "seed of the first episode, the same for all arms (default: %(default)s)")
    num_envs: int = option(16, "episodes side by side (default: %(default)s)")
    accelerate_config: str | None = option(None, "for `accelerate launch`, e.g. accelerate_configs/single_gpu.yaml")


def main() -> None:
    prepare_streams()
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    parser = ScriptParser(Arguments, __doc__)
    args, train = parser.parse(words[:split])[0], words[split + 1 :]
    with user_errors():
        ablation = Ablation.load(args.ablations)
        chosen = args.arms or [arm.name for arm in ablation.arms]
        if unknown := set(chosen) - {arm.name for arm in ablation.arms}:
            raise ValueError(f"--arms {sorted(unknown)}: the file has {[arm.name for arm in ablation.arms]}")
        for file in (ablation.config, ablation.recipe, ablation.evaluation):
            if not Path(file).is_file():
                raise ValueError(
                    f"{args.ablations} names {file}, which is not here: run this in the repository's folder"
                )

    evaluate = {"num_episodes": args.num_episodes, "seed": args.seed, "num_envs": args.num_envs, "num_videos": 0}
    evaluate = [word for name, value in evaluate.items() for word in (f"--{name}", str(value))]
    launch = ["--config_file", args.accelerate_config] if args.accelerate_config else []
    errors: dict[str, str] = {}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    try:
        with user_errors(), raising_stopped(), RunFolder(args.output_dir):
            for number, name in enumerate(chosen, start=1):
                print(f"{number}/{len(chosen)} {name}", flush=True)
                arm = next(arm for arm in ablation.arms if arm.name == name)
                error = run_arm(ablation, arm, args.output_dir, train, evaluate, launch)
                if error:
                    errors[name] = error
                    print(f"  failed: {error}", flush=True)
                table = write_report(ablation, args.output_dir, errors)
    except Stopped as stopped:
        parser.exit(stopped.status, "\nstopped; the same command goes on from here\n")
    print(f"\n{format_table(table)}\n\nablation.md, .json and .png: {args.output_dir}")
    if errors:
        parser.exit(1, f"{len(errors)} of {len(chosen)} arms failed; their logs: {args.output_dir}/logs\n")


if __name__ == "__main__":
    main()
