"""Merge a LoRA adapter into its base model: an ordinary checkpoint, for servers and tools that know no adapters.

    python recipes/merge_adapter.py --model_name_or_path runs/libero_lora_12gb --output_dir runs/libero_merged
    python eval/eval_libero.py --model_name_or_path runs/libero_merged …

Evaluation and training take adapters as they are. The adapter finds its base model by itself, and refuses another one.
Before the folder appears, the merged checkpoint is loaded from disk and has to answer a prompt as the adapter does.
LoRA, rsLoRA and DoRA merge alike; an adapter trained on 4-bit weights is merged into the full ones, which is not
exactly what it was trained on: evaluate the result.
"""

from dataclasses import dataclass
from pathlib import Path

from vla0_trl.command_line import option, parse, user_errors
from vla0_trl.run_folder import RunFolder


@dataclass(kw_only=True)
class Arguments:
    model_name_or_path: str = option(help="adapter: a run's folder, or a Hub id")
    revision: str | None = option(None, "of an adapter on the Hub")
    output_dir: Path = option(help="new folder for the merged checkpoint")
    dtype: str = option(
        "float32",
        "of the merged weights: float32 keeps the adapter's actions, bfloat16 rounds and halves the file "
        "(default: %(default)s)",
        choices=["float32", "bfloat16"],
    )


def main() -> None:
    args = parse(Arguments, __doc__)
    import torch  # after parsing: it takes seconds

    from vla0_trl.policy.merging import merge

    with user_errors(), RunFolder(args.output_dir):
        merge(args.model_name_or_path, args.output_dir, getattr(torch, args.dtype), args.revision)
    print(f"merged checkpoint: {args.output_dir}")


if __name__ == "__main__":
    main()
