"""Evaluate a checkpoint in the PushT simulator: success rate with its 95 % interval, coverage, speed, videos.

    python eval/eval_pusht.py --model_name_or_path runs/pusht --num_episodes 64 --num_envs 16 --output_dir runs/eval

Without training anything, a Hub checkpoint; then 3 steps of each chunk, or the average of overlapping chunks:

    python eval/eval_pusht.py --model_name_or_path USER/NAME --output_dir runs/eval_hub
    python eval/eval_pusht.py --model_name_or_path runs/pusht --output_dir runs/eval_3 --n_action_steps 3
    python eval/eval_pusht.py --model_name_or_path runs/pusht --output_dir runs/eval_ens --ensemble_size 8

Stopped at any moment, the same command runs only what is missing; with a larger --num_episodes, only what is new.
Success is gym-pusht's own: the block covers more than 95 % of the target within --max_steps steps.
"""

import argparse
import json
from pathlib import Path

from vla0_trl.config import VLAConfig
from vla0_trl.ensembling import check_decay
from vla0_trl.envs.pusht import CAMERA, FPS, MAX_EPISODE_STEPS, STATE_MODES, SUCCESS_COVERAGE, PushTEnv
from vla0_trl.modeling import checkpoint_folder
from vla0_trl.policy import VLAPolicy, resolve_device
from vla0_trl.report.summary import format_table, summary_table
from vla0_trl.results import (
    RESULTS,
    VIDEOS,
    EpisodeLog,
    WriteError,
    aggregate,
    checkpoint_hash,
    provenance,
    write_json,
    write_video,
)
from vla0_trl.rollout import rollout

PACKAGES = ("torch", "transformers", "gym-pusht", "pymunk", "numpy")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="checkpoint, full or adapter: a folder or a Hub id")
    add("--output_dir", required=True, help="gets episodes.jsonl, results.json and videos/; one folder a run")
    add("--num_episodes", type=int, default=64, help="one a seed (default: %(default)s)")
    add("--num_envs", type=int, default=16, help="episodes side by side: speed, not results (default: %(default)s)")
    add("--seed", type=int, default=100000, help="of the first episode, then counting up (default: %(default)s)")
    add("--n_action_steps", type=int, help="steps of a chunk to execute before the next (default: the checkpoint's)")
    add("--ensemble_size", type=int, help="ask at every step, average up to that many chunks; not with n_action_steps")
    add("--ensemble_decay", type=float, help="m of ACT's weights exp(-m*i), i=0 the oldest chunk (default: uniform)")
    add("--max_steps", type=int, default=MAX_EPISODE_STEPS, help="time limit of an episode (default: %(default)s)")
    add("--num_videos", type=int, default=4, help="film that many episodes, from --seed on (default: %(default)s)")
    add("--device", help="cuda, cuda:1, cpu, … (default: a GPU if there is one)")
    add("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--overwrite", action="store_true", help="delete the evaluation in --output_dir and start anew")
    return parser


def evaluation_config(config: VLAConfig, args: argparse.Namespace) -> VLAConfig:
    """The checkpoint's config with the execution that the flags ask for; `ValueError` if it can't act in PushT."""
    if config.cameras != [CAMERA] or config.action_dim != 2 or config.state_dim not in (0, *STATE_MODES.values()):
        raise ValueError(
            f"{args.model_name_or_path} is not for PushT: it has cameras {config.cameras}, action_dim="
            f"{config.action_dim}, state_dim={config.state_dim}; the simulator gives camera {CAMERA!r}, takes 2 "
            f"dimensions and has states of {sorted(STATE_MODES.values())}"
        )
    changes = {name: vars(args)[name] for name in ("n_action_steps", "ensemble_size") if vars(args)[name] is not None}
    if (args.ensemble_size or 1) > 1:
        changes.setdefault("n_action_steps", None)  # the checkpoint's own is not what was asked for
    config = config.replace(**changes)
    check_decay(config.ensemble_size, args.ensemble_decay)
    return config


def run_missing(policy: VLAPolicy, log: EpisodeLog, seeds: list[int], state: str, args: argparse.Namespace) -> None:
    """Run and write the episodes that `log` does not have yet, then the results of all."""
    missing = log.missing(seeds)
    (log.folder / RESULTS).unlink(missing_ok=True)  # it exists when nothing is missing
    envs = [PushTEnv(state, args.max_steps) for _ in range(min(args.num_envs, len(missing)))]
    for episode in rollout(policy, envs, missing, seeds[: args.num_videos], args.ensemble_decay):
        if episode.frames:  # before the line: an episode that has one is never run again
            outcome = "success" if episode.result["success"] else "failure"
            write_video(log.folder / VIDEOS / f"episode_{episode.seed:06d}_{outcome}.mp4", episode.frames, FPS)
        log.append(episode)
    for env in envs:
        env.close()
    about = provenance(str(policy.model.device), PACKAGES)
    write_json(log.folder / RESULTS, log.run | aggregate(log.episodes) | about)


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    seeds = list(range(args.seed, args.seed + args.num_episodes))
    try:
        for name in ("num_episodes", "num_envs", "max_steps"):
            if vars(args)[name] < 1:
                raise ValueError(f"--{name} {vars(args)[name]} must be at least 1")
        checkpoint = checkpoint_folder(args.model_name_or_path)
        config = evaluation_config(VLAConfig.from_pretrained(checkpoint), args)
        state = {dim: name for name, dim in STATE_MODES.items()}.get(config.state_dim, "agent")
        protocol = {
            "env": "gym_pusht/PushT-v0",
            "state": state,
            "max_steps": args.max_steps,
            "success_coverage": SUCCESS_COVERAGE,
            "n_action_steps": config.n_action_steps,
            "ensemble_size": config.ensemble_size,
            "ensemble_decay": args.ensemble_decay,
            "dtype": str(resolve_device(args.device, args.dtype)[1]).removeprefix("torch."),
        }
        run = {"checkpoint": args.model_name_or_path, "checkpoint_hash": checkpoint_hash(checkpoint)}
        log = EpisodeLog(Path(args.output_dir), run | {"protocol": protocol}, args.overwrite)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")

    with log:
        try:
            if log.missing(seeds) or not (log.folder / RESULTS).exists():
                policy = VLAPolicy.from_pretrained(checkpoint, args.device, args.dtype)
                policy.config = config
                run_missing(policy, log, seeds, state, args)
        except KeyboardInterrupt:
            parser.exit(130, f"\nstopped: {len(log.episodes)} episodes are in {log.folder}; run it again to go on\n")
        except WriteError as error:
            parser.exit(1, f"error: {error}; {len(log.episodes)} episodes are in {log.folder}\n")
    results = json.loads((log.folder / RESULTS).read_text())
    print(format_table(summary_table([(args.model_name_or_path, results)])))
    print(f"\nresults, episodes and videos: {log.folder}")


if __name__ == "__main__":
    main()
