"""Compare a checkpoint's answers with held-out demonstrations: token accuracy and action error, no simulator.

    python eval/eval_offline.py --model_name_or_path runs/pusht --dataset_name data/pusht --episodes 190:200 \\
        --output_dir runs/eval

Writes offline.json. With the output folder of eval_pusht.py, summarize.py shows both. The action error is of chunks
that the policy generates from the stored frames, greedily whatever its temperature; the error of never looking is
shown, too.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from vla0_trl.command_line import option, parse, user_errors
from vla0_trl.config import VLAConfig
from vla0_trl.evaluation.arguments import DecodingArguments
from vla0_trl.internals import PARALLEL

PACKAGES = ("torch", "transformers", "datasets", "numpy")


@dataclass(kw_only=True)
class Arguments(DecodingArguments):
    dataset_name: str = option(help="chat dataset: a folder or a Hub id")
    episodes: str = option(
        help="from:to, to exclusive, e.g. 36:40: episodes that were not trained on", metavar="FROM:TO"
    )
    num_frames: int = option(200, "frames, spread evenly over these episodes (default: %(default)s)")
    batch_size: int = option(16, "frames at once (default: %(default)s)")
    output_dir: Path = option(help="where to write offline.json")

    def __post_init__(self):
        parse_episodes(self.episodes)


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
    args = parse(Arguments, __doc__)
    from vla0_trl.data.chat_dataset import load_chat_dataset  # after parsing: datasets and torch take seconds
    from vla0_trl.data.row_check import check_rows
    from vla0_trl.evaluation.episode_log import provenance, write_json
    from vla0_trl.evaluation.open_loop import action_errors, pick_frames, token_accuracy
    from vla0_trl.evaluation.report.summary import OFFLINE
    from vla0_trl.manifest import trained_on
    from vla0_trl.models.fingerprint import checkpoint_hash
    from vla0_trl.models.loading import checkpoint_folder
    from vla0_trl.policy.policy import VLAPolicy

    with user_errors():
        episodes = parse_episodes(args.episodes)
        checkpoint = checkpoint_folder(args.model_name_or_path)
        dataset, dataset_config = load_chat_dataset(args.dataset_name)
        config = VLAConfig.from_pretrained(checkpoint)
        check_fits(config, dataset_config)
        options = args.decoding_options(config)
        rows = pick_frames(dataset, *episodes, args.num_frames)
        check_rows(args.dataset_name, rows, dataset_config)
        run = {"checkpoint": args.model_name_or_path, "checkpoint_hash": checkpoint_hash(checkpoint)}
        args.output_dir.mkdir(parents=True, exist_ok=True)
        policy = VLAPolicy.from_pretrained(checkpoint, args.device, args.dtype, decoding=options)
        policy.config = policy.config.replace(temperature=0.0)  # the error of drawn answers would be chance, too

    errors = action_errors(policy, rows, dataset_config.cameras, args.batch_size)
    known = trained_on(checkpoint)
    same_dataset = known.get("dataset") == args.dataset_name
    seen = set(known["episodes"]) & set(range(*episodes)) if same_dataset else set()
    if seen:
        print(f"warning: {len(seen)} of these episodes were trained on", file=sys.stderr)
    accuracy = token_accuracy(policy, rows, dataset_config.cameras, args.batch_size)
    data = {"dataset": args.dataset_name, "episodes": args.episodes, "num_frames": len(rows)}
    data |= {"num_trained_on": len(seen)} if seen else {}
    data |= {"temperature": policy.config.temperature, "decoding": policy.decoding}
    data |= {"refine": options.refine} if policy.decoding == PARALLEL else {}
    about = provenance(str(policy.model.device), PACKAGES)
    write_json(args.output_dir / OFFLINE, run | data | {"token_accuracy": accuracy} | errors | about)

    print(f"action-token accuracy  {100 * accuracy:.1f} %")
    for name, error in {"policy": errors, **errors["baselines"]}.items():
        print(f"RMSE of {name:<14} {error['rmse']:.2f} over the chunk, {error['first_rmse']:.2f} of the first action")
    print(f"\n{len(rows)} frames: {args.output_dir / OFFLINE}")


if __name__ == "__main__":
    main()
