"""Go a recipe's whole way once, at true size, without weights, data or GPU: does it work, and what does it need?

    python recipes/rehearse.py recipes/libero/night_12gb.yaml --output_dir runs/rehearsal
    python recipes/rehearse.py recipes/libero/night_12gb.yaml --output_dir … --model_configs FOLDER_OF_MODELS

The recipe's architecture with random weights, its real processor, optimizer and adapter, on synthetic rows of true
shape: two optimizer steps, a checkpoint, one step more after resuming, a chunk of actions, merging, the same chunk.
Without a GPU, one sample per step. Stopped at any moment, the same command goes on with the part that it was in. Only
the model's config and processor are read; OUTPUT_DIR takes 5 GB, and may be deleted.
"""

from dataclasses import dataclass
from pathlib import Path

from vla0_trl.command_line import ScriptParser, option, user_errors
from vla0_trl.run_folder import RunFolder


@dataclass(kw_only=True)
class Arguments:
    output_dir: Path = option(help="for weights, rows, checkpoints and rehearsal.json")
    model_configs: Path | None = option(None, "folder with the models' folders, instead of the Hub")


def main() -> None:
    parser = ScriptParser(Arguments, __doc__)
    parser.add_argument("recipe", type=Path, metavar="YAML")
    args, others, options = parser.parse(unknown_allowed=True)
    import torch  # after parsing: it takes seconds

    from vla0_trl.benchmarks.plan import kind_of, plan_of, source_of
    from vla0_trl.benchmarks.rehearsal import Rehearsal

    fixed = {"logging_steps": 1, "warmup_steps": 0, "save_strategy": "steps", "save_total_limit": 1}
    if not torch.cuda.is_available():
        fixed |= {"use_cpu": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}

    def plan(**settings):
        return plan_of(others.recipe, fixed | settings, options)

    with user_errors(), RunFolder(args.output_dir):
        args.output_dir.mkdir(parents=True, exist_ok=True)
        source = source_of(plan(output_dir=args.output_dir), args.model_configs)
        parts = Rehearsal(plan, kind_of(others.recipe), source, args.output_dir)().values()
    seconds, peak = sum(part["seconds"] for part in parts), max(part["peak_gib"] for part in parts)
    print(f"{seconds:6.0f} s  {peak:5.1f} GiB  the whole way, {'GPU' if torch.cuda.is_available() else 'CPU'}")


if __name__ == "__main__":
    main()
