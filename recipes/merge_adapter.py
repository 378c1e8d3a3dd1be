"""Merge a LoRA adapter into its base model: an ordinary checkpoint, for servers and tools that know no adapters.

    python recipes/merge_adapter.py --model_name_or_path runs/libero_lora_12gb --output_dir runs/libero_merged
    python eval/eval_libero.py --model_name_or_path runs/libero_merged …

Evaluation and training take adapters as they are. The adapter finds its base model by itself, and refuses another one.
LoRA, rsLoRA and DoRA merge alike; an adapter trained on 4-bit weights is merged into the full ones, which is not
exactly what it was trained on: evaluate the result.
"""

import argparse
import sys
from pathlib import Path

import torch

from vla0_trl.config import VLAConfig
from vla0_trl.models.fingerprint import is_adapter
from vla0_trl.models.loading import checkpoint_folder, load_model, load_processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="adapter: a run's folder, or a Hub id")
    parser.add_argument("--revision", help="of an adapter on the Hub")
    parser.add_argument("--output_dir", required=True, type=Path, help="new folder for the merged checkpoint")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16"],
        help="of the merged weights: float32 keeps the adapter's actions, bfloat16 rounds and halves the file "
        "(default: %(default)s)",
    )
    args = parser.parse_args()
    try:
        merge(args.model_name_or_path, args.output_dir, getattr(torch, args.dtype), args.revision)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"merged checkpoint: {args.output_dir}")


def merge(name_or_path: str, output_dir: Path, dtype: torch.dtype, revision: str | None = None) -> None:
    """Write base model and adapter as one checkpoint.

    Raises:
        ValueError: that is no adapter, or its base model is another one now.
        FileExistsError: something is in `output_dir`.
    """
    folder = checkpoint_folder(name_or_path, revision)
    if not is_adapter(folder):
        raise ValueError(f"{name_or_path} has no adapter to merge: it is a whole model already")
    if output_dir.is_dir() and any(output_dir.iterdir()):
        raise FileExistsError(f"{output_dir} is not empty: choose another --output_dir")
    config = VLAConfig.from_pretrained(folder)
    # Summed in float32, whatever is written: bfloat16 would swallow most of a small change.
    model = load_model(folder, dtype=torch.float32).merge_and_unload().to(dtype)
    model.save_pretrained(output_dir)
    load_processor(folder, config).save_pretrained(output_dir)
    config.save_pretrained(output_dir)  # last: it says that the checkpoint is whole


if __name__ == "__main__":
    main()
