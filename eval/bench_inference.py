"""How fast chunks come: stock `generate()` against ours, in one run, on the same weights and inputs.

    python eval/bench_inference.py --models nano smolvlm2-500m --json bench.json
    python eval/bench_inference.py --models smolvlm2-500m qwen2.5-vl-3b --max_gb 80 --json gpu.json

(a) stock `generate()` that allows digits and spaces only, as VLA-0 does; (b) stock with xgrammar's automaton, if it is
installed; (c) ours; (d) ours with drafts from the step before, as when every step asks again. Weights are random: what
is measured does not depend on what is said, but for (d). There a recorded PushT episode says where drafts are wrong: a
draft is the model's own answer, off by as many bins in as many places as the recorded chunk of the step before is off
that of this step; (d±) adds up to --jitter bins, as a policy that is not sure of itself would.

The floor is the time to read the weights once for each token that the grammar leaves open, at the bandwidth measured
here. Variants take turns, chunk by chunk. Every answer of (c) and (d) is compared with stock greedy decoding.
"""

import argparse
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from transformers import LogitsProcessorList

from vla0_trl.benchmarking import (
    MODELS,
    DigitsAndSpaces,
    clock,
    floor_seconds,
    grammar_seconds,
    open_tokens,
    random_policy,
    recorded_steps,
    xgrammar_processor,
)
from vla0_trl.decoding import ChunkDecoder
from vla0_trl.grammar import ActionGrammarLogitsProcessor
from vla0_trl.policy import VLAPolicy, resolve_device
from vla0_trl.results import provenance, write_json

VARIANTS = {"a": "stock, digits and spaces", "b": "stock, xgrammar", "c": "ours", "d": "ours, drafts", "d±": "jitter"}
RATIOS = {"ours_vs_stock": ("a", "c"), "drafts_vs_stock": ("a", "d"), "ours_vs_xgrammar": ("b", "c")}
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
            table = bench(policy, size, args)
            rows += [{"model": name, "batch": size} | row for row in table]
            print_table(name, size, table)
        del policy
    by_model = {name: ratios([row for row in rows if row["model"] == name]) for name in {row["model"] for row in rows}}
    for name, found in by_model.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.2f}" for key, value in found.items()))
    if args.json:
        about = provenance(str(device), PACKAGES) | {"dtype": str(dtype).removeprefix("torch.")}
        about |= {"load_in_4bit": args.load_in_4bit, "skipped": skipped}
        try:
            about["versions"]["xgrammar"] = version("xgrammar")
        except PackageNotFoundError:
            about["versions"]["xgrammar"] = None
        first = by_model[rows[0]["model"]] if rows else {}
        write_json(args.json, {"table": rows, "ratios": first, "ratios_by_model": by_model} | about)


def bench(policy: VLAPolicy, size: int, args: argparse.Namespace) -> list[dict]:
    """All variants on one model and batch size -> a table row each."""
    rng, make_xgrammar = np.random.default_rng(0), xgrammar_processor(policy)
    decoders = {key: ChunkDecoder(policy.grammar, prefix=policy.decoder.prefix) for key in ("c", "d", "d±")}
    timings, counts, wrong, answers = {}, {}, dict.fromkeys(decoders, 0), []
    steps = recorded_steps(policy.config, (args.warmup + args.chunks) * size)
    for turn in range(args.warmup + args.chunks):
        observations, offs = zip(*steps[turn * size : (turn + 1) * size], strict=True)
        grammar = LogitsProcessorList([ActionGrammarLogitsProcessor(grammar=policy.grammar)])
        stock, _ = timed(policy, observations, policy.grammar.max_new_tokens, logits_processor=grammar)
        expected = [row[: row.index(policy.chat.end_of_turn_id) + 1] for row in stock.tolist()]
        calls = {"a": {"logits_processor": LogitsProcessorList([DigitsAndSpaces(policy)])}}
        if make_xgrammar is not None:
            calls["b"] = {"logits_processor": LogitsProcessorList([make_xgrammar()])}
        for key, decoder in decoders.items():
            calls[key] = {"custom_generate": decoder}
            if key != "c":
                spread = args.jitter if key == "d±" else 0
                calls[key]["drafts"] = [draft(policy, *pair, spread, rng) for pair in zip(expected, offs, strict=True)]
        keys = [*calls][turn % len(calls) :] + [*calls][: turn % len(calls)]
        for key in keys:
            before = decoders[key].stats.passes if key in decoders else 0
            output, seconds = timed(policy, observations, stock.shape[1], **calls[key])  # (a) has no end of its own
            if turn >= args.warmup:
                passes = decoders[key].stats.passes - before if key in decoders else stock.shape[1]
                timings.setdefault(key, []).append(seconds)
                counts.setdefault(key, []).append(passes)
            if key in decoders:
                pairs = zip(output.tolist(), expected, strict=True)
                wrong[key] += sum(tokens[: len(other)] != other for tokens, other in pairs)
        answers.append(max(open_tokens(policy, answer) for answer in expected))
    floor = float(np.median(answers)) * floor_seconds(policy)
    table = []
    for key in (key for key in VARIANTS if key in timings):
        median, p95 = np.quantile(timings[key], [0.5, 0.95])
        stats = decoders[key].stats if key in decoders else None
        table.append(
            {
                "variant": key, "median_ms": median * 1e3, "p95_ms": p95 * 1e3, "chunks_per_s": size / median,
                "hz_n_step": policy.config.chunk_size / median, "hz_requery": 1 / median,
                "passes_per_chunk": float(np.mean(counts[key])), "of_floor": median / floor,
                "acceptance": stats.acceptance if stats and stats.drafted else None, "other_answers": wrong.get(key),
                "grammar_share": None,
            }
        )  # fmt: skip
        if key == "c":  # host time of a token, of a pass
            table[-1]["grammar_share"] = grammar_seconds(policy) / (median / table[-1]["passes_per_chunk"])
    return table


def timed(policy: VLAPolicy, observations, max_new_tokens: int, **options) -> tuple[torch.Tensor, float]:
    """Answers (B, A), and seconds from observations to tokens."""
    began = clock(policy.model.device)
    inputs = policy._inputs(observations)
    policy.generation_config.max_new_tokens = max_new_tokens
    output = policy.model.generate(**inputs, generation_config=policy.generation_config, **options)
    return output[:, inputs["input_ids"].shape[1] :], clock(policy.model.device) - began


def draft(policy: VLAPolicy, answer: list[int], off: np.ndarray, jitter: int, rng: np.random.Generator) -> list[int]:
    """The model's own answer, off by so many bins."""
    integers = np.array(policy.processor.tokenizer.decode(answer, skip_special_tokens=True).split(), np.int64)
    integers = integers + off + rng.integers(-jitter, jitter + 1, off.shape)
    return policy.chat.encode_answer(integers.clip(0, policy.grammar.num_bins))[0]


def ratios(rows: list[dict]) -> dict[str, float]:
    """Of median times; a key is there if both of its variants are."""
    times = {(row["variant"], row["batch"]): row["median_ms"] for row in rows}
    found = {
        f"{name}_b{size}": times[slow, size] / times[fast, size]
        for name, (slow, fast) in RATIOS.items()
        for size in sorted({size for _, size in times})
        if (slow, size) in times
    }
    return found | {f"of_floor_b{row['batch']}": row["of_floor"] for row in rows if row["variant"] == "c"}


def print_table(name: str, size: int, table: list[dict]) -> None:
    print(f"{f'{name}, batch {size}':30s}" + "".join(f"{title:>13s}" for title in TITLES.values()))
    for row in table:
        cells = ("-" if row[key] is None else f"{row[key]:.2f}" for key in TITLES)
        print(f"({row['variant']}) {VARIANTS[row['variant']]:26s}" + "".join(f"{cell:>13s}" for cell in cells))
        if row["grammar_share"] is not None:
            print(f"    the grammar takes {row['grammar_share']:.1%} of a pass a token, on the host", flush=True)


if __name__ == "__main__":
    main()
