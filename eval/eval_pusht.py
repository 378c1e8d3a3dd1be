"""Evaluate a checkpoint in the PushT simulator: success rate with its 95 % interval, coverage, speed, videos.

    python eval/eval_pusht.py --model_name_or_path runs/pusht --num_episodes 64 --num_envs 16 --output_dir runs/eval

Without training anything, a Hub checkpoint; then 3 steps of each chunk, or the average of overlapping chunks:

    python eval/eval_pusht.py --model_name_or_path USER/NAME --output_dir runs/eval_hub
    python eval/eval_pusht.py --model_name_or_path runs/pusht --output_dir runs/eval_3 --n_action_steps 3
    python eval/eval_pusht.py --model_name_or_path runs/pusht --output_dir runs/eval_ens --ensemble_size 8

What answers at an address by openpi's protocol, such as eval/serve.py or eval/baselines/serve_lerobot.py:

    python eval/eval_pusht.py --policy ws://127.0.0.1:8000 --output_dir runs/eval_remote

Over several processes, GPUs or machines with a shared folder (without a GPU, too), each running its share:

    accelerate launch --config_file accelerate_configs/multi_gpu.yaml --num_processes 2 eval/eval_pusht.py …

Stopped at any moment, the same command runs only what is missing; with a larger --num_episodes, only what is new.
Success is gym-pusht's own: the block covers more than 95 % of the target within --max_steps steps.
"""

import json
from dataclasses import dataclass
from functools import partial

from vla0_trl.command_line import option, parse
from vla0_trl.config import VLAConfig
from vla0_trl.envs.pusht.env import FPS, MAX_EPISODE_STEPS, SUCCESS_COVERAGE, PushTEnv, check_speaks_pusht, state_mode
from vla0_trl.evaluation.arguments import EvaluationArguments
from vla0_trl.evaluation.episode_log import RESULTS
from vla0_trl.evaluation.report.summary import format_table, summary_table

PACKAGES = ("torch", "transformers", "gym-pusht", "pymunk", "numpy")


@dataclass(kw_only=True)
class Arguments(EvaluationArguments):
    num_episodes: int = option(64, "episodes, one per seed (default: %(default)s)")
    seed: int = option(100_000, "seed of the first episode (default: %(default)s)")
    num_envs: int = option(16, "episodes side by side: speed, not results (default: %(default)s)")
    num_videos: int = option(4, "film the first N episodes (default: %(default)s)", metavar="N")
    max_steps: int = option(MAX_EPISODE_STEPS, "time limit of an episode (default: %(default)s)")


def main() -> None:
    args = parse(Arguments, __doc__)
    from vla0_trl.evaluation import driver  # after parsing: it imports torch, which takes seconds

    def prepare(config: VLAConfig) -> driver.Simulation:
        check_speaks_pusht(config, args.model_name_or_path)
        state = state_mode(config.state_dim)
        protocol = {
            "env": "gym_pusht/PushT-v0",
            "state": state,
            "simulator": driver.simulator_version("gym-pusht", "pymunk", "shapely"),
            "seed": args.seed,
            "max_steps": args.max_steps,
            "success_coverage": SUCCESS_COVERAGE,
        }
        run = driver.Run(folder=args.output_dir, protocol=protocol, make_env=partial(PushTEnv, state, args.max_steps))
        return driver.Simulation(
            config=config,
            seeds=list(range(args.seed, args.seed + args.num_episodes)),
            filmed=range(args.seed, args.seed + args.num_videos),
            fps=FPS,
            runs=[run],
            packages=PACKAGES,
        )

    source = driver.checkpoint_policy
    if args.policy is not None:
        from vla0_trl.serving.remote_policy import PUSHT, remote_policy

        source = partial(remote_policy, simulator=PUSHT)
    [folder] = driver.evaluate(args, prepare, source)
    results = json.loads((folder / RESULTS).read_text())
    print(format_table(summary_table([(args.model_name_or_path, results)])))
    print(f"\nresults, episodes and videos: {folder}")


if __name__ == "__main__":
    main()
