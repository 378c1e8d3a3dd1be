"""Measure whether a recipe fits a 12 GB card: its architecture with random weights, a few real optimizer steps.

    python recipes/bench_memory.py recipes/libero/*12gb.yaml recipes/pusht/*12gb.yaml
    python recipes/bench_memory.py recipes/libero/lora_12gb.yaml --json memory.json --per_device_train_batch_size 16

The table that READMEs show is vla0_trl/benchmarks/memory_table.json: give that as --json to measure it again.

Rows are synthetic, of the true shape of `libero` or `pusht`, whichever folder the recipe is in. On a larger card, the
process gets 12 GiB minus the CUDA context: what runs, fits. Without a GPU it prints an estimate, made of what models
of one and two layers allocate on the CPU. Further options go to every recipe. Only configs and processors are read,
from the Hub or from the folders in --model_configs.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from vla0_trl.benchmarks.memory_table import CARD, GIB, PARTS
from vla0_trl.command_line import ScriptParser, as_flags, option, unknown_flag, user_errors
from vla0_trl.training.fields import recipe_fields

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "vla0_trl")
ALLOCATOR_GIB = 11  # what a 12 GB card has left beside the CUDA context and a desktop
STEPS = 4


@dataclass(kw_only=True)
class Arguments:
    model_configs: Path | None = option(None, "folder with the models' folders, instead of the Hub")
    card_gib: float = option(CARD / GIB, "memory of the card (default: %(default)g)")
    json: Path | None = option(None, "write the table, versions and machine")


def main() -> None:
    parser = ScriptParser(Arguments, __doc__)
    parser.add_argument("configs", nargs="+", type=Path, metavar="CONFIG", help="YAML of a recipe")
    args, others, options = parser.parse(unknown_allowed=True)
    fields = recipe_fields().keys()
    for word in options:
        name = word.split("=")[0].lstrip("-").replace("-", "_").removeprefix("no_")
        if word.startswith("--") and name not in fields:
            parser.error(unknown_flag(word, fields))
    import torch  # after parsing: it takes seconds

    from vla0_trl.evaluation.episode_log import provenance, write_json

    table = {}
    for config in others.configs:
        if len(others.configs) == 1:
            with user_errors():
                table[str(config)] = one(config, args, options)
        else:  # each in a process of its own, so that none finds the other's leftovers
            table[str(config)] = in_a_process(config, args, options)
        print(row(str(config), table[str(config)]), flush=True)
    if args.json:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        peaks = {name: figures.get("peak_gib") for name, figures in table.items()}
        report = {"estimated": device == "cpu", "limit_gib": ALLOCATOR_GIB, "peak_gib": peaks, "configs": table}
        write_json(args.json, report | provenance(device, PACKAGES))


def one(config: Path, args: Arguments, options: list[str]) -> dict[str, float | str]:
    """Figures of one recipe in GiB; `error` if it does not fit."""
    import torch

    from vla0_trl.benchmarks.memory import build, cap_at_card, estimate, measure
    from vla0_trl.benchmarks.plan import A_FEW_STEPS, kind_of, plan_of, source_of

    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        settings = {"output_dir": f"{folder}/run"} | ({"max_steps": STEPS} if on_gpu else A_FEW_STEPS)
        plan = plan_of(config, settings | ({} if on_gpu else {"use_cpu": True}), options)
        source = source_of(plan, args.model_configs)
        if not on_gpu:
            return estimate(plan, kind_of(config), source, Path(folder))
        plan = build(plan, source, Path(folder, "model"))
        torch.cuda.empty_cache()
        limit = cap_at_card(int(args.card_gib * GIB))
        try:
            return measure(plan, kind_of(config)) | {"limit_gib": limit}
        except torch.cuda.OutOfMemoryError as error:
            return {"error": str(error).splitlines()[0], "limit_gib": limit}


def in_a_process(config: Path, args: Arguments, options: list[str]) -> dict[str, float | str]:
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        flags = [word for flag in as_flags(args, leave_out=["json"]) for word in flag]
        words = [sys.executable, __file__, str(config), "--json", file.name, *flags, *options]
        status = subprocess.run(words, stdout=subprocess.DEVNULL).returncode
        if status:  # it has said why
            sys.exit(status)
        return json.loads(Path(file.name).read_text())["configs"][str(config)]


def row(name: str, figures: dict[str, float | str]) -> str:
    if "error" in figures:
        return f"{name}: does not fit: {figures['error']}"
    name += ": fits" if figures["peak_gib"] <= ALLOCATOR_GIB else f": does not fit into {ALLOCATOR_GIB} GiB"
    parts = " + ".join(f"{part} {figures[f'{part}_gib']:.2f}" for part in PARTS)
    if "reserved_gib" not in figures:
        return f"{name}, about {figures['peak_gib']:.2f} GiB at its peak (estimated without a GPU) = {parts}"
    return (
        f"{name}, {figures['peak_gib']:.2f} GiB at its peak = {parts}; {figures['reserved_gib']:.2f} GiB reserved, "
        f"{figures['limit_gib']:.2f} GiB allowed; {figures['samples_per_second']:.1f} samples/s"
    )


if __name__ == "__main__":
    main()
