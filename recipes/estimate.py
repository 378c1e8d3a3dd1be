"""What a recipe and its variations cost: tokens, FLOPs, hours on cards, and with --memory GiB; without a GPU.

    python recipes/estimate.py recipes/libero/night_12gb.yaml
    python recipes/estimate.py recipes/libero/night_12gb.yaml --vary num_bins=99 chunk_size=2,n_action_steps=2
    python recipes/estimate.py recipes/libero/night_12gb.yaml --vary lora_r=8 --memory --cards "RTX 3060" --markdown

One row for the recipe as it is, one for each variation; further options go to every row. Only the model's config and
processor are read, from the Hub or from --model_configs. All figures are estimates: FLOPs are counted on paper, hours
take a fifth of a card's peak, and --memory, minutes per row, is what recipes/bench_memory.py prints without a GPU.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from vla0_trl.command_line import ScriptParser, option, unknown_flag
from vla0_trl.training.fields import recipe_fields


@dataclass(kw_only=True)
class Arguments:
    vary: list[str] = option(
        [], "one row each; several changes with commas, lists as in waypoints=0+3+7", nargs="+", metavar="NAME=VALUE"
    )
    cards: list[str] = option(["RTX 3060", "RTX 4090", "A100"], "for the hours (default: %(default)s)", nargs="+")
    memory: bool = option(False, "estimate the peak of memory, too")
    model_configs: Path | None = option(None, "folder with the models' folders, instead of the Hub")
    markdown: bool = option(False, "print the table as Markdown")


def main() -> None:
    parser = ScriptParser(Arguments, __doc__)
    parser.add_argument("recipe", type=Path, metavar="YAML")
    args, others, options = parser.parse(unknown_allowed=True)
    known = recipe_fields()
    for name in (change.split("=")[0] for variation in args.vary for change in variation.split(",")):
        if name not in known:
            parser.error(unknown_flag(name, known))
    from vla0_trl.benchmarks.cost import PEAKS  # after parsing: torch takes seconds
    from vla0_trl.evaluation.report.summary import format_table

    if unknown := [card for card in args.cards if card not in PEAKS]:
        parser.error(f"--cards {unknown[0]!r}: known are {', '.join(PEAKS)}")
    head = ["change", "tokens", "of the answer", "TFLOP per sample", *(["GiB"] if args.memory else [])]
    head += [f"hours, {card}" for card in args.cards]
    rows = []
    for variation in ["", *args.vary]:
        try:
            rows.append([variation or "as it is", *row(args, others.recipe, [*flags_of(variation), *options])])
        except (ValueError, OSError) as error:  # OSError: the Hub has no such model, or can't be reached
            parser.error(f"{variation or others.recipe}: {error}")
    print(format_table((head, rows), args.markdown))


def flags_of(variation: str) -> list[str]:
    """The command line of "chunk_size=2,waypoints=0+1"."""
    pairs = [change.partition("=") for change in variation.split(",") if change]
    return [word for name, _, value in pairs for word in (f"--{name}", *value.split("+"))]


def row(args: Arguments, recipe: Path, options: list[str]) -> list[str]:
    """The figures of a recipe with these options."""
    from vla0_trl.benchmarks.cost import recipe_cost
    from vla0_trl.benchmarks.memory import estimate
    from vla0_trl.benchmarks.plan import A_FEW_STEPS, kind_of, plan_of, source_of

    kind = kind_of(recipe)
    with tempfile.TemporaryDirectory() as folder:
        here = {"use_cpu": True, "output_dir": f"{folder}/run"}
        plan = plan_of(recipe, here, options)
        source = source_of(plan, args.model_configs)
        cost = recipe_cost(plan, kind, source)
        figures = [str(cost.tokens), str(cost.answer_tokens), f"{cost.tflop:.2f}"]
        if args.memory:
            plan = plan_of(recipe, here | A_FEW_STEPS, options)
            figures.append(f"{estimate(plan, kind, source, Path(folder))['peak_gib']:.1f}")
        return figures + [f"{cost.hours(card):.1f}" for card in args.cards]


if __name__ == "__main__":
    main()
