"""How fast chunks come: stock `generate()` against ours, in one run, on the same weights and inputs.

    python eval/bench_inference.py --models nano smolvlm2-500m --json bench.json
    python eval/bench_inference.py --models smolvlm2-500m qwen2.5-vl-3b --max_gb 80 --json gpu.json

(a) stock `generate()` that allows digits and spaces only, as VLA-0 does; (b) stock with xgrammar's automaton, if it is
installed; (c) ours; (d) ours with drafts from the step before, as when every step asks again. Weights are random. A
recorded PushT episode says where drafts of (d) are wrong: a draft is the model's own answer, off by as many bins in as
many places as the recorded chunk of the step before is off that of this step; (d±) adds up to --jitter bins, as a
policy that is not sure of itself would. (c) depends on how much the numbers of a chunk are alike.

The floor is the time to read the weights once for each token that the grammar leaves open, at the bandwidth measured
here. Variants take turns, chunk by chunk. Every answer of (c) and (d) is compared with stock greedy decoding.
"""

import argparse
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vla0_trl.benchmarks.inference import MODELS, SEED, VARIANTS, bench, random_policy, ratios
from vla0_trl.evaluation.episode_log import provenance, write_json
from vla0_trl.policy.policy import resolve_device

PACKAGES = ("torch", "transformers", "tokenizers", "numpy")
TITLES = {"median_ms": "ms/chunk", "p95_ms": "p95", "chunks_per_s": "chunks/s", "hz_n_step": "Hz, n-step"}
TITLES |= {"hz_requery": "Hz, re-query", "passes_per_chunk": "passes", "of_floor": "x floor"}
TITLES |= {"acceptance": "accepted", "other_answers": "differ"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all that fit")
    add("--batch_sizes", nargs="+", type=int, default=[1, 16])
    add("--chunks", type=int, default=8, help="timed calls a variant (default: %(default)s)")
    add("--warmup", type=int, default=2, help="calls before that, which capture graphs (default: %(default)s)")
    add("--device", help="default: a GPU if there is one")
    add("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--load_in_4bit", action="store_true", help="weights as NF4, with bitsandbytes, in all variants")
    add("--models_dir", type=Path, help="folders with configs and processors, by name (default: from the Hub)")
    add("--max_gb", type=float, default=8.0, help="skip models with more weights (default: %(default)s)")
    add("--jitter", type=int, default=2, help="bins by which drafts of (d±) are off at most (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the table, versions and ratios (the first model's, and all)")
    args = parser.parse_args()
    device, dtype = resolve_device(args.device, args.dtype)
    rows, skipped = [], {}
    for name in args.models:
        try:
            policy = random_policy(name, args.models_dir, device, dtype, args.max_gb, args.load_in_4bit)
        except MemoryError as error:
            skipped[name] = str(error)
            print(f"{name} skipped: {error}")
            continue
        for size in args.batch_sizes:
            table = bench(policy, size, args.chunks, args.warmup, args.jitter)
            rows += [{"model": name, "batch": size, "decoding": policy.decoding} | row for row in table]
            print(f"{name}: ours decodes the {policy.decoding} way")
            print_table(name, size, table)
        del policy
    by_model = {name: ratios([row for row in rows if row["model"] == name]) for name in {row["model"] for row in rows}}
    for name, found in by_model.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.2f}" for key, value in found.items()))
    if args.json:
        about = provenance(str(device), PACKAGES) | {"dtype": str(dtype).removeprefix("torch.")}
        about |= {"seed": SEED, "load_in_4bit": args.load_in_4bit, "skipped": skipped}
        try:
            about["versions"]["xgrammar"] = version("xgrammar")
        except PackageNotFoundError:
            about["versions"]["xgrammar"] = None
        first = by_model[rows[0]["model"]] if rows else {}
        write_json(args.json, {"table": rows, "ratios": first, "ratios_by_model": by_model} | about)


def print_table(name: str, size: int, table: list[dict]) -> None:
    print(f"{f'{name}, batch {size}':30s}" + "".join(f"{title:>13s}" for title in TITLES.values()))
    for row in table:
        cells = ("-" if row[key] is None else f"{row[key]:.2f}" for key in TITLES)
        print(f"({row['variant']}) {VARIANTS[row['variant']]:26s}" + "".join(f"{cell:>13s}" for cell in cells))
        if row["grammar_share"] is not None:
            print(f"    the grammar takes {row['grammar_share']:.1%} of a pass a token, on the host", flush=True)


if __name__ == "__main__":
    main()
