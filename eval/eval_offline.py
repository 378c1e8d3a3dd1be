"""Compare a checkpoint's answers with held-out demonstrations: token accuracy and action error, no simulator.

    python eval/eval_offline.py --model_name_or_path runs/pusht --dataset_name data/pusht --episodes 190:200 \\
        --output_dir runs/eval

Writes offline.json. With the output folder of eval_pusht.py, summarize.py shows both. The action error is of chunks
that the policy generates from the stored frames, as on a robot, beside that of never looking.
"""

import argparse
import sys
from pathlib import Path

from vla0_trl.config import VLAConfig
from vla0_trl.data.chat_dataset import load_chat_dataset
from vla0_trl.evaluation.episode_log import provenance, write_json
from vla0_trl.evaluation.open_loop import action_errors, pick_frames, token_accuracy
from vla0_trl.evaluation.report.summary import OFFLINE
from vla0_trl.manifest import trained_on
from vla0_trl.models.fingerprint import checkpoint_hash
from vla0_trl.models.loading import checkpoint_folder
from vla0_trl.policy.policy import VLAPolicy

PACKAGES = ("torch", "transformers", "datasets", "numpy")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="checkpoint, full or adapter: a folder or a Hub id")
    add("--dataset_name", required=True, help="chat dataset: a folder or a Hub id")
    add("--episodes", required=True, help="from:to, to exclusive, e.g. 36:40: episodes that were not trained on")
    add("--num_frames", type=int, default=200, help="spread evenly over these episodes (default: %(default)s)")
    add("--batch_size", type=int, default=16, help="frames at once (default: %(default)s)")
    add("--output_dir", required=True, type=Path, help="where to write offline.json")
    add("--device", help="cuda, cuda:1, cpu, … (default: a GPU if there is one)")
    add("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU, float32 on a CPU")
    return parser


def parse_episodes(text: str) -> tuple[int, int]:
    """`"36:40"` -> (36, 40)."""
    first, colon, end = text.partition(":")
    if not (colon and first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise ValueError(f"--episodes {text}: expected from:to with from < to, such as 36:40")
    return int(first), int(end)


def check_fits(policy: VLAConfig, dataset: VLAConfig) -> None:
    """`ValueError` if the dataset's frames are not what the policy was trained on."""
    for name in ("action_dim", "state_dim", "fps"):
        asked, stored = policy.to_dict()[name], dataset.to_dict()[name]
        if asked != stored:
            raise ValueError(f"the checkpoint has {name}={asked}, the dataset {name}={stored}")
    if policy.chunk_size > dataset.chunk_size or set(policy.cameras) - set(dataset.cameras):
        raise ValueError(
            f"the checkpoint has chunk_size={policy.chunk_size} and cameras {policy.cameras}, more than the dataset's "
            f"chunk_size={dataset.chunk_size} and cameras {dataset.cameras}"
        )


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    try:
        for name in ("num_frames", "batch_size"):
            if vars(args)[name] < 1:
                raise ValueError(f"--{name} {vars(args)[name]} must be at least 1")
        episodes = parse_episodes(args.episodes)
        checkpoint = checkpoint_folder(args.model_name_or_path)
        dataset, dataset_config = load_chat_dataset(args.dataset_name)
        check_fits(VLAConfig.from_pretrained(checkpoint), dataset_config)
        rows = pick_frames(dataset, *episodes, args.num_frames)
        run = {"checkpoint": args.model_name_or_path, "checkpoint_hash": checkpoint_hash(checkpoint)}
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")

    policy = VLAPolicy.from_pretrained(checkpoint, args.device, args.dtype)
    errors = action_errors(policy, rows, dataset_config.cameras, args.batch_size)
    known = trained_on(checkpoint)
    same_dataset = known.get("dataset") == args.dataset_name
    seen = set(known["episodes"]) & set(range(*episodes)) if same_dataset else set()
    if seen:
        print(f"warning: {len(seen)} of these episodes were trained on", file=sys.stderr)
    accuracy = token_accuracy(policy, rows, dataset_config.cameras, args.batch_size)
    data = {"dataset": args.dataset_name, "episodes": args.episodes, "num_frames": len(rows)}
    data |= {"num_trained_on": len(seen)} if seen else {}
    data["decoding"] = policy.decoding
    about = provenance(str(policy.model.device), PACKAGES)
    write_json(args.output_dir / OFFLINE, run | data | {"token_accuracy": accuracy} | errors | about)

    print(f"action-token accuracy  {100 * accuracy:.1f} %")
    for name, error in {"policy": errors, **errors["baselines"]}.items():
        print(f"RMSE of {name:<14} {error['rmse']:.2f} over the chunk, {error['first_rmse']:.2f} of the first action")
    print(f"\n{len(rows)} frames: {args.output_dir / OFFLINE}")


if __name__ == "__main__":
    main()
