"""Upload a policy to the Hub, with what it scored on its card.

    python eval/push_policy.py --model_name_or_path runs/pusht --push_to_hub USER/NAME
    python eval/push_policy.py --model_name_or_path runs/pusht --evaluations runs/pusht/eval --push_to_hub USER/NAME

The repository is private; --public makes a new one public. Only the policy's own files are sent: no optimizer, no
notes. After a broken upload the same command sends what is missing. Without --push_to_hub it only writes the card into
the folder. Training uploads by itself with `--push_to_hub true --hub_model_id USER/NAME`.
"""

from dataclasses import dataclass
from pathlib import Path

from vla0_trl.command_line import option, parse, user_errors
from vla0_trl.hub import open_repository


@dataclass(kw_only=True)
class Arguments:
    model_name_or_path: Path = option(help="a run's folder, or a checkpoint in it")
    evaluations: list[Path] = option([], "folders of finished evaluations of exactly these weights", nargs="+")
    push_to_hub: str | None = option(None, "upload to this repository; needs `hf auth login`", metavar="USER/NAME")
    public: bool = option(False, "make the repository public (default: private)")


def main() -> None:
    args = parse(Arguments, __doc__)
    folder = args.model_name_or_path
    from vla0_trl.evaluation.model_index import eval_results  # after parsing: torch takes seconds
    from vla0_trl.manifest import CHECKPOINT_FILE, damage, read_json, renew_manifest, trained_on
    from vla0_trl.models.fingerprint import checkpoint_hash
    from vla0_trl.policy.card import CARD_NAME, write_model_card
    from vla0_trl.run_folder import RUN_FILE, STATE_FILE
    from vla0_trl.training.pushing import push_policy

    with user_errors():
        if error := damage(folder) if (folder / CHECKPOINT_FILE).is_file() else f"it has no {CHECKPOINT_FILE}":
            raise ValueError(f"{folder} is not a whole checkpoint of a recipe: {error}")
        results = [entry for path in args.evaluations for entry in eval_results(path, checkpoint_hash(folder))]
        name = folder.resolve().name
        if args.push_to_hub:
            name = open_repository(args.push_to_hub, "model", not args.public)
        run = read_json(folder / RUN_FILE) or read_json(folder.parent / RUN_FILE) or {}
        step = (read_json(folder / STATE_FILE) or {}).get("global_step")
        write_model_card(folder, name, run, trained_on(folder), step, results)
        renew_manifest(folder)
        print(f"card: {folder / CARD_NAME}")
        if args.push_to_hub:
            print(f"uploaded: {push_policy(folder, name, 'Policy with its card')}")


if __name__ == "__main__":
    main()
