# /// script
# requires-python = ">=3.11"
# dependencies = ["huggingface_hub>=1.31"]
# ///
"""Train a recipe by ids alone: the same file with `uv run` here, and with `hf jobs uv run` on the Hub's machines.

The recipe travels with its dataset, as `recipe.yaml` in the dataset's repository:

    python data_prep/convert_lerobot.py --source HuggingFaceVLA/libero … --push_to_hub USER/libero_spatial
    hf upload USER/libero_spatial recipes/libero/night_12gb.yaml recipe.yaml --repo-type dataset

Here, with the checkout; there, with the repository that it was pushed to:

    IDS="--dataset_name USER/libero_spatial --hub_model_id USER/policy"
    uv run --with-editable ".[train8bit]" recipes/jobs/train.py $IDS
    hf jobs uv run --flavor l4x1 --timeout 12h --secrets HF_TOKEN \\
        --with "vla0_trl[train8bit] @ git+https://HOST/USER/FORK" recipes/jobs/train.py $IDS

A machine of the Hub forgets its disk: each checkpoint is uploaded, with what a training needs to go on, into
`last-checkpoint/` of the policy's repository. A job that starts again goes on from there. Further options are the
recipe's own.
"""

import argparse
import sys
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

RECIPE, LAST = "recipe.yaml", "last-checkpoint"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True, metavar="USER/NAME", help="chat dataset with a recipe.yaml")
    parser.add_argument("--dataset_revision", metavar="REVISION", help="of both (default: main)")
    parser.add_argument("--hub_model_id", required=True, metavar="USER/NAME", help="where the policy goes; private")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/job"), help="(default: %(default)s)")
    args, options = parser.parse_known_args()
    try:
        recipe = hf_hub_download(args.dataset_name, RECIPE, repo_type="dataset", revision=args.dataset_revision)
    except (EntryNotFoundError, RepositoryNotFoundError) as error:
        sys.exit(f"error: {args.dataset_name} has no {RECIPE}, or can't be read ({type(error).__name__})")
    fetch_checkpoint(args.hub_model_id, args.output_dir)
    words = ["--config", recipe, "--dataset_name", args.dataset_name, "--output_dir", str(args.output_dir)]
    words += ["--push_to_hub", "true", "--hub_model_id", args.hub_model_id, "--hub_strategy", "checkpoint"]
    if args.dataset_revision:
        words += ["--dataset_revision", args.dataset_revision]
    sys.argv[1:] = [*words, *options]
    from vla0_trl.training.fields import check_recipe_words
    from vla0_trl.training.run import main as train

    check_recipe_words(Path(recipe), __doc__)
    train(Path(recipe), __doc__)


def fetch_checkpoint(repo_id: str, output_dir: Path) -> None:
    """Bring back what an earlier job has uploaded, unless this disk has a run already."""
    if output_dir.exists():
        return
    try:
        folder = Path(snapshot_download(repo_id, allow_patterns=f"{LAST}/*"), LAST)
    except RepositoryNotFoundError:
        return  # the first job
    if folder.is_dir():
        from vla0_trl.training.pushing import restore_checkpoint  # it imports transformers

        restore_checkpoint(folder, output_dir)


if __name__ == "__main__":
    main()
