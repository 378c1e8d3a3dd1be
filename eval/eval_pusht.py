"""Evaluate a checkpoint in the PushT simulator: success rate with its 95 % interval, coverage, speed, videos.

    python eval/eval_pusht.py --model_name_or_path runs/pusht --num_episodes 64 --num_envs 16 --output_dir runs/eval

Without training anything, a Hub checkpoint; then 3 steps of each chunk, or the average of overlapping chunks:

    python eval/eval_pusht.py --model_name_or_path USER/NAME --output_dir runs/eval_hub
    python eval/eval_pusht.py --model_name_or_path runs/pusht --output_dir runs/eval_3 --n_action_steps 3
    python eval/eval_pusht.py --model_name_or_path runs/pusht --output_dir runs/eval_ens --ensemble_size 8

Over several processes, GPUs or machines with a shared folder (without a GPU, too), each running its share:

    accelerate launch --config_file accelerate_configs/multi_gpu.yaml --num_processes 2 eval/eval_pusht.py …

Stopped at any moment, the same command runs only what is missing; with a larger --num_episodes, only what is new.
Success is gym-pusht's own: the block covers more than 95 % of the target within --max_steps steps.
"""

import argparse
import json
from pathlib import Path

from vla0_trl.config import VLAConfig
from vla0_trl.envs.pusht.env import FPS, MAX_EPISODE_STEPS, SUCCESS_COVERAGE, PushTEnv, check_speaks_pusht, state_mode
from vla0_trl.evaluation.episode_log import RESULTS, EpisodeLog
from vla0_trl.evaluation.report.summary import format_table, summary_table
from vla0_trl.evaluation.runner import (
    NOT_ALL,
    EvaluationParser,
    execution_config,
    execution_protocol,
    finish,
    missing_share,
    open_log,
    run_episodes,
    run_identity,
    simulator_version,
    stopping_well,
)
from vla0_trl.models.loading import checkpoint_folder
from vla0_trl.policy.policy import VLAPolicy, resolve_device

PACKAGES = ("torch", "transformers", "gym-pusht", "pymunk", "numpy")


def build_parser() -> EvaluationParser:
    parser = EvaluationParser(__doc__, num_envs=16, num_videos=4, max_steps=MAX_EPISODE_STEPS)
    parser.add_argument("--num_episodes", type=int, default=64, help="one a seed (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=100000, help="of the first episode (default: %(default)s)")
    return parser


def evaluation_config(config: VLAConfig, args: argparse.Namespace) -> VLAConfig:
    """The checkpoint's config with the execution that the flags ask for; `ValueError` if it can't act in PushT."""
    check_speaks_pusht(config, args.model_name_or_path)
    return execution_config(config, args)


def run_missing(policy: VLAPolicy, log: EpisodeLog, missing: list[int], state: str, args: argparse.Namespace) -> None:
    """Run and write these episodes."""
    envs = [PushTEnv(state, args.max_steps) for _ in range(min(args.num_envs, len(missing)))]
    filmed = range(args.seed, args.seed + args.num_videos)
    run_episodes(policy, log, envs, missing, filmed, FPS)
    for env in envs:
        env.close()


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    seeds = list(range(args.seed, args.seed + args.num_episodes))
    device, dtype = resolve_device(args.device, args.dtype)
    try:
        checkpoint = checkpoint_folder(args.model_name_or_path)
        config = evaluation_config(VLAConfig.from_pretrained(checkpoint), args)
        state = state_mode(config.state_dim)
        protocol = {
            "env": "gym_pusht/PushT-v0",
            "state": state,
            "simulator": simulator_version("gym-pusht", "pymunk", "shapely"),
            "seed": args.seed,
            "max_steps": args.max_steps,
            "success_coverage": SUCCESS_COVERAGE,
            **execution_protocol(config, args, str(dtype)),
        }
        log = open_log(Path(args.output_dir), run_identity(args, checkpoint, protocol), seeds, args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")

    with log, stopping_well(parser, log):
        missing = missing_share(log, seeds, args)
        if missing:
            policy = VLAPolicy.from_pretrained(checkpoint, device, dtype, load_in_4bit=args.load_in_4bit)
            policy.config = config
            run_missing(policy, log, missing, state, args)
        if not finish(log, seeds, str(device), PACKAGES):
            parser.exit(0, NOT_ALL)
    results = json.loads((log.folder / RESULTS).read_text())
    print(format_table(summary_table([(args.model_name_or_path, results)])))
    print(f"\nresults, episodes and videos: {log.folder}")


if __name__ == "__main__":
    main()
