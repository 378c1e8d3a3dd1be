"""Measure the training path: stock TRL, a collator as re-implementations of VLA-0 write it, and ours; in one run.

    python recipes/bench_training.py # nano, minutes on two CPU cores
    python recipes/bench_training.py --processor HuggingFaceTB/SmolVLM2-500M-Video-Instruct # and nano's steps
    python recipes/bench_training.py --model HuggingFaceTB/SmolVLM2-500M-Video-Instruct --batch_size 64 \\
        --num_workers 8 --torch_compile --peak_tflops 989 --trace trace.json # an H200
    python recipes/bench_training.py --recipe recipes/pusht/policy.yaml --dataset_name data/pusht_rows --steps 100

Same rows (JPEG bytes of two 256 px cameras), same model, same optimizer; they take turns, and the best turn of each
counts: noise only ever adds time. Steps are measured of TRL as it comes (`trl`: bfloat16, gradient checkpointing) and
with our settings (`trl_tuned`: bfloat16, no checkpointing). A collator's speed is one process's. `--random_weights`
builds a model from its config. `--recipe` measures something else: a recipe's own steps, a bare loop of the same
model, optimizer and batch, which is what the trainer could reach at best, and its collator alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vla0_trl.command_line import option, parse, user_errors
from vla0_trl.config import NANO

if TYPE_CHECKING:
    from vla0_trl.benchmarks.training import Bench

PACKAGES = ("torch", "torchvision", "transformers", "trl", "vla0_trl")


@dataclass(kw_only=True)
class Arguments:
    model: str = option(NANO, "nano, a folder or a Hub id (default: %(default)s)")
    recipe: Path | None = option(None, "measure this YAML's steps instead, with all that it sets", metavar="YAML")
    dataset_name: str | None = option(None, "with --recipe: rows instead of those that the YAML names")
    processor: str | None = option(None, "processor to measure collators with, if not the model's")
    random_weights: bool = option(False, "build --model from its config, without weights")
    image_size: int | None = option(None, "side of the model's images (default: 96 for nano, else 512)")
    batch_size: int = option(32, "rows of a batch (default: %(default)s)")
    rows: int = option(64, "rows of the dataset (default: %(default)s)")
    steps: int = option(8, "timed optimizer steps of a turn (default: %(default)s)")
    turns: int = option(3, "turns of each contestant (default: %(default)s)")
    num_workers: int = option(0, "processes that collate beside the training process (default: %(default)s)")
    float32: bool = option(False, "train without bfloat16: for CPUs that have no instructions for it")
    torch_compile: bool = option(False, "measure our steps compiled, too")
    skip_steps: bool = option(False, "measure only the collators")
    peak_tflops: float | None = option(None, "the GPU's peak in bf16, by its data sheet (H200: 989): prints the MFU")
    trace: Path | None = option(None, "write a chrome trace of our steps, and print where the time goes")
    json: Path | None = option(None, "write the table, versions and ratios")


def main() -> None:
    args = parse(Arguments, __doc__)
    import torch  # after parsing: it takes seconds

    from vla0_trl.evaluation.episode_log import provenance, write_json

    if args.recipe:
        print_recipe(args)
        return
    collating = make_bench(args.processor or args.model, args)
    with user_errors():
        contestants = {name: lambda c=c: collating.collate(c) for name, c in collating.collators().items()}
    table = take_turns(contestants, args.turns, "rows_per_s")
    ratios = {f"collator_vs_{other}": ratio(table, "rows_per_s", other) for other in ("trl", "peer")}
    if not args.skip_steps:
        bench = make_bench(args.model, args)
        steppers = ["trl", "trl_tuned", "ours"] + (["compiled"] if args.torch_compile else [])
        with user_errors():
            speeds = take_turns({n: lambda n=n: bench.train(n) for n in steppers}, args.turns, "steps_per_s")
        sample = bench.sample()
        for name, figures in speeds.items():
            table[name] = table.get(name, {}) | figures
            if args.peak_tflops:
                table[name]["mfu"] = figures["samples_per_s"] * sample["tflop"] / args.peak_tflops
        ratios |= {f"step_vs_{other}": ratio(table, "steps_per_s", other) for other in ("trl", "trl_tuned")}
        tokens, of_images, tflop = (sample[name] for name in ("tokens", "image_tokens", "tflop"))
        print(f"a sample: {tokens} tokens, {of_images} of them of images; {tflop:.3g} TFLOP to train on\n")
    print_table(table)
    if not args.skip_steps:
        print("\nforward pass: " + ", ".join(f"{name} {way}" for name, way in bench.forward_way.items()))
    print("\n" + "  ".join(f"{name} {value:.2f}×" for name, value in ratios.items()))
    if args.trace:
        print("\n" + make_bench(args.model, args).profile(args.trace))
    if args.json:
        settings = {key: str(value) for key, value in vars(args).items()}
        report = {"table": table, "ratios": ratios, "settings": settings}
        report |= {} if args.skip_steps else {"sample": sample, "forward": bench.forward_way}
        write_json(args.json, report | provenance("cuda" if torch.cuda.is_available() else "cpu", PACKAGES))


def print_recipe(args: Arguments) -> None:
    from vla0_trl.benchmarks.recipe import recipe_speed

    with user_errors():
        turns = [recipe_speed(args.recipe, args.dataset_name, args.steps) for _ in range(args.turns)]
    best = {name: max(turn[name] for turn in turns) for name in turns[0]}
    for name, speed in best.items():
        print(f"{name:10}{speed:10.0f} rows/s")
    share = max(turn["recipe"] / turn["bare loop"] for turn in turns)
    print(f"\nthe recipe reaches {share:.0%} of the bare loop (best of {args.turns} turns)")


def make_bench(model: str, args: Arguments) -> Bench:
    from vla0_trl.benchmarks.synthetic import synthetic_dataset
    from vla0_trl.benchmarks.training import Bench

    side = args.image_size or (96 if model == NANO else 512)
    rows, config = synthetic_dataset("libero", max(args.rows, args.batch_size), use_state=True, image_size=side)
    return Bench(model, config, rows, args.batch_size, args.steps, args.num_workers, args.random_weights, args.float32)


def take_turns(
    contestants: dict[str, Callable[[], dict[str, float]]], turns: int, key: str
) -> dict[str, dict[str, float]]:
    """The figures of each one's best turn, measured in alternation, so that a busy moment hits all alike."""
    measured = [{name: measure() for name, measure in contestants.items()} for _ in range(turns)]
    return {name: max((turn[name] for turn in measured), key=lambda figures: figures[key]) for name in contestants}


def ratio(table: dict[str, dict[str, float]], key: str, other: str) -> float:
    return table["ours"][key] / table[other][key]


def print_table(table: dict[str, dict[str, float]]) -> None:
    columns = list(dict.fromkeys(column for figures in table.values() for column in figures))
    print(f"{'':10}" + "".join(f"{column:>15}" for column in columns))
    for name in sorted(table, key=["trl", "trl_tuned", "peer", "ours", "compiled"].index):
        cells = [f"{table[name][c]:15.2f}" if c in table[name] else f"{'–':>15}" for c in columns]
        print(f"{name:10}" + "".join(cells))


if __name__ == "__main__":
    main()
