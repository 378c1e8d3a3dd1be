"""How fast chunks come: stock `generate()` against ours, in one run, on the same weights and inputs.

    python eval/bench_inference.py # nano, minutes on a CPU core; needs no files
    python eval/bench_inference.py --models nano smolvlm2-500m --json bench.json
    python eval/bench_inference.py --models smolvlm2-500m qwen2.5-vl-3b --max_gb 80 --json gpu.json

(a) stock `generate()` that allows digits and spaces only, as VLA-0 does; (b) stock with xgrammar's automaton, if it is
installed; (c) ours; (d) ours with drafts from the step before, as when every step asks again. Weights are random. A
recorded PushT episode says where drafts of (d) are wrong: a draft is the model's own answer, off by as many bins in as
many places as the recorded chunk of the step before is off that of this step; (d±) adds up to --jitter bins, as a
policy that is not sure of itself would. (c) depends on how much the numbers of a chunk are alike. (p) ours, all
numbers in parallel: other answers, whose cost does not depend on the weights.

The floor is the time to read the weights once for each token that the grammar leaves open, at the bandwidth measured
here; of (p) that of all its matrix products, at the rate measured here, or of reading the weights once in each pass.
Variants take turns, chunk by chunk. Every answer of (c) and (d) is compared with stock greedy decoding.
"""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vla0_trl.benchmarks.inference_table import MODELS, SEED, print_table, ratios
from vla0_trl.command_line import option, parse, user_errors
from vla0_trl.config import NANO
from vla0_trl.evaluation.arguments import DTYPES

PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


@dataclass(kw_only=True)
class Arguments:
    models: list[str] = option(
        [NANO], "models; all but nano need their config and processor (default: nano)", choices=[*MODELS]
    )
    batch_sizes: list[int] = option([1, 16], "observations in one call (default: 1 16)")
    chunks: int = option(8, "timed calls of each variant (default: %(default)s)")
    warmup: int = option(2, "calls before that, which capture graphs (default: %(default)s)")
    device: str | None = option(None, "cuda, cpu, … (default: a GPU if there is one)")
    dtype: str | None = option(None, "(default: bfloat16 on a GPU, float32 on a CPU)", choices=DTYPES)
    load_in_4bit: bool = option(False, "weights as NF4, with bitsandbytes, in all variants")
    models_dir: Path | None = option(None, "folders with configs and processors, by name (default: from the Hub)")
    max_gb: float = option(8.0, "skip models with more weights (default: %(default)s)")
    jitter: int = option(2, "bins by which drafts of (d±) are off at most (default: %(default)s)")
    json: Path | None = option(None, "write table, versions and ratios (the first model's, and all)", metavar="FILE")


def main() -> None:
    args = parse(Arguments, __doc__)
    from vla0_trl.benchmarks.inference import bench, check_sources, random_policy  # after parsing: torch takes seconds
    from vla0_trl.evaluation.episode_log import provenance, write_json
    from vla0_trl.policy.policy import resolve_device

    with user_errors():
        check_sources(args.models, args.models_dir)
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


if __name__ == "__main__":
    main()
