"""How fast chunks come: stock `generate()` against ours, in one run, on the same weights and inputs.

    python eval/bench_inference.py --models nano smolvlm2-500m --json bench.json
    python eval/bench_inference.py --models smolvlm2-500m qwen2.5-vl-3b --dtype bfloat16 --compile --json gpu.json

(a) stock `generate()` that allows digits and spaces only, as VLA-0 does; (b) stock with xgrammar's automaton, if it is
installed; (c) ours; (d) ours with drafts from the step before, as when every step asks again. Weights are random: what
is measured does not depend on what is said, but for (d). There a recorded PushT episode says where drafts are wrong: a
draft is the model's own answer, off by as many bins in as many places as the recorded chunk of the step before is off
that of this step; (d±) adds up to --jitter bins, as a policy that is not sure of itself would.

The floor is the time to read the weights once for each token that the grammar leaves open, at the bandwidth measured
here. Variants take turns, chunk by chunk. Every answer of (c) and (d) is compared with stock greedy decoding.
"""

import argparse
import functools
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LogitsProcessor, LogitsProcessorList

from vla0_trl.actions import NormStats
from vla0_trl.answers import Row, Speller, pack
from vla0_trl.config import VLAConfig
from vla0_trl.decoding import ChunkDecoder, DecodingOptions, DecodingStats
from vla0_trl.envs.pusht import TASK
from vla0_trl.envs.pusht_expert import record_episode
from vla0_trl.grammar import ActionGrammarLogitsProcessor
from vla0_trl.modeling import set_image_size
from vla0_trl.nano import NANO, build_nano
from vla0_trl.policy import VLAPolicy, resolve_device
from vla0_trl.results import provenance, write_json

# Hub id, image side, steps of a chunk, width of an action (PushT's for nano, LIBERO's for the others)
MODELS = {
    NANO: (None, 96, 10, 2),
    "smolvlm2-500m": ("HuggingFaceTB/SmolVLM2-500M-Video-Instruct", 512, 8, 7),
    "qwen2.5-vl-3b": ("Qwen/Qwen2.5-VL-3B-Instruct", 224, 8, 7),
}
VARIANTS = {"a": "stock, digits and spaces", "b": "stock, xgrammar", "c": "ours", "d": "ours, drafts", "d±": "jitter"}
PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


class DigitsAndSpaces(LogitsProcessor):
    """What VLA-0 and its re-implementations allow; the end comes after as many tokens as ours writes."""

    def __init__(self, policy: VLAPolicy):
        names = [*"0123456789", " "]
        self.ids = [policy.processor.tokenizer(name, add_special_tokens=False)["input_ids"][-1] for name in names]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, self.ids] = scores[:, self.ids]
        return allowed


def xgrammar_processor(policy: VLAPolicy) -> Callable[[], LogitsProcessor] | None:
    """Makes a processor for one `generate()`; None without xgrammar."""
    try:
        import xgrammar
        from xgrammar.contrib.hf import LogitsProcessor as Masked
    except ImportError:
        return None
    number = "(0|[1-9][0-9]?[0-9]?)"
    vocabulary = policy.model.config.get_text_config().vocab_size
    info = xgrammar.TokenizerInfo.from_huggingface(
        policy.processor.tokenizer, vocab_size=vocabulary, stop_token_ids=policy.chat.end_of_turn_id
    )
    regex = policy.chat.prefix + number + f"( {number}){{{policy.grammar.num_values - 1}}}"
    compiled = xgrammar.GrammarCompiler(info).compile_regex(regex)
    return functools.partial(Masked, compiled)


def build_policy(name: str, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> VLAPolicy:
    """A random model in its true architecture; `MemoryError` if that is too large for this machine."""
    hub_id, side, steps, width = MODELS[name]
    low, high = [0.0] * width, [512.0] * width
    stats = NormStats(low, high, low, high, low, high, 1)
    config = VLAConfig(
        action_dim=width, state_dim=width, chunk_size=steps, image_size=side, use_state=True, relative_actions=True,
        normalization=[-200.0, 200.0], action_stats=stats, state_stats=stats, crop_ratio=0.875,
    )  # fmt: skip
    if hub_id is None:
        model, processor = build_nano()
    else:
        local = Path(args.models_dir) / hub_id.split("/")[1]
        source = str(local) if local.is_dir() else hub_id
        architecture, processor = AutoConfig.from_pretrained(source), AutoProcessor.from_pretrained(source)
        if args.layers:
            text = architecture.get_text_config()
            text.num_hidden_layers = args.layers
            if getattr(text, "layer_types", None):
                text.layer_types = text.layer_types[: args.layers]
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForImageTextToText.from_config(architecture).parameters())
        size *= torch.finfo(dtype).bits / 8e9
        if size > args.max_gb:
            raise MemoryError(f"{size:.1f} GB of weights, --max_gb is {args.max_gb:g}: fewer --layers, or a GPU")
        set_image_size(processor, architecture, config)
        with device:
            model = AutoModelForImageTextToText.from_config(architecture, dtype=dtype)
    model = model.to(device, dtype).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0 if parameter.ndim > 1 else 1.0)  # or all answers are nearly the same
    return VLAPolicy(model, processor, config)


def record(config: VLAConfig, count: int) -> tuple[list[dict], list[np.ndarray], list[np.ndarray]]:
    """Observations, integers (values,) of the recorded chunks, and of their drafts from the step before."""
    recording = record_episode(100000)
    actions = np.resize(recording.actions.T, (config.action_dim, len(recording.actions))).T
    states = np.resize(recording.states[:, :2].T, actions.T.shape).T.astype(np.float32)
    actions = np.concatenate([actions, np.repeat(actions[-1:], config.chunk_size, 0)])
    tokenizer = config.action_tokenizer()
    observations, chunks, drafts = [], [], []
    for step in range(1, count + 1):
        now, before = step % len(states), (step - 1) % len(states)
        image = recording.frames[now]
        observations.append({"images": {"image": image}, "state": states[now], "task": TASK})
        chunks.append(tokenizer.to_integers(actions[now : now + config.chunk_size], states[now]))
        last = tokenizer.to_integers(actions[before : before + config.chunk_size], states[before])
        last = tokenizer.from_integers(last, states[before])
        drafts.append(tokenizer.to_integers(np.concatenate([last[1:], last[-1:]]), states[now]))
    return observations, chunks, drafts


def bandwidth(device: torch.device, dtype: torch.dtype) -> float:
    """Bytes a second that a matrix-vector product reads."""
    matrices = [torch.zeros(4096, 4096, device=device, dtype=dtype) for _ in range(8)]
    vector, best = torch.zeros(1, 4096, device=device, dtype=dtype), float("inf")
    for _ in range(8):
        began = clock(device)
        for matrix in matrices:
            torch.nn.functional.linear(vector, matrix)
        best = min(best, clock(device) - began)
    return sum(m.numel() * m.element_size() for m in matrices) / best


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def open_tokens(speller: Speller, answer: list[int]) -> int:
    """Tokens of an answer that the grammar does not force: passes that one-by-one decoding can't do without."""
    row, count = Row(speller), 0
    while not row.done:
        row.write(speller.column[answer[len(row.tokens)]])
        count += 1
    return count


def grammar_seconds(policy: VLAPolicy, answers: list[list[int]]) -> float:
    """Host time a token for choosing, forcing and packing, without any model."""
    speller, spent, tokens = Speller(policy.grammar), 0.0, 0
    logits = np.random.default_rng(0).standard_normal((64, len(speller.token_ids))).astype(np.float32)
    for _ in answers * 3:
        row = Row(speller)
        while not row.done:
            began = time.perf_counter()
            tree = row.grow(100, True, False, [])
            pack([tree], 64)
            before = len(row.tokens)
            row.follow(tree, logits, 100)
            spent, tokens = spent + time.perf_counter() - began, tokens + len(row.tokens) - before
    return spent / tokens


def bench(name: str, size: int, policy: VLAPolicy, args: argparse.Namespace) -> list[dict]:
    """All variants on one model and batch size -> a table row each."""
    device, rng = policy.model.device, np.random.default_rng(0)
    observations, chunks, drafts = record(policy.config, (args.chunks + args.warmup) * size)
    make_xgrammar, timings, speller = xgrammar_processor(policy), {}, Speller(policy.grammar)
    decoders = {
        key: ChunkDecoder(policy.grammar, args.decoding, policy.decoder.prefix)
        for key in ("c", "d", "d±")
        if key in args.variants
    }
    wrong, needed, written, answers = dict.fromkeys(decoders, 0), [], [], []

    def generate(inputs, **options):
        return policy.model.generate(**inputs, generation_config=policy.generation_config, **options)

    for turn in range(args.warmup + args.chunks):
        batch = slice(turn * size, (turn + 1) * size)
        inputs = policy._inputs(observations[batch])
        length = inputs["input_ids"].shape[1]
        policy.generation_config.max_new_tokens = policy.grammar.max_new_tokens
        stock = generate(inputs, logits_processor=[ActionGrammarLogitsProcessor(grammar=policy.grammar)])[:, length:]
        expected = [row[: row.index(policy.chat.end_of_turn_id) + 1] for row in stock.tolist()]
        if turn == args.warmup:
            for decoder in decoders.values():
                decoder.stats = DecodingStats()
        if turn >= args.warmup:
            needed.append(max(open_tokens(speller, answer) for answer in expected))
            written.append(stock.shape[1])
            answers += expected
        guesses = {"d": [], "d±": []}
        for answer, chunk, draft in zip(expected, chunks[batch], drafts[batch], strict=True):
            text = policy.processor.tokenizer.decode(answer, skip_special_tokens=True)
            own = np.array(text.split(), np.int64) + draft - chunk
            for key, jitter in (("d", 0), ("d±", args.jitter)):
                integers = (own + rng.integers(-jitter, jitter + 1, own.shape)).clip(0, policy.grammar.num_bins)
                guesses[key].append(policy.chat.encode_answer(integers)[0])
        policy.generation_config.max_new_tokens = stock.shape[1]  # (a) has no end
        calls = {"a": {"logits_processor": LogitsProcessorList([DigitsAndSpaces(policy)])}}
        if make_xgrammar is not None:
            calls["b"] = {"logits_processor": LogitsProcessorList([make_xgrammar()])}
        calls |= {key: {"custom_generate": decoder, "drafts": guesses.get(key)} for key, decoder in decoders.items()}
        calls = {key: options for key, options in calls.items() if key in args.variants}
        for key in [*calls][turn % len(calls) :] + [*calls][: turn % len(calls)]:
            began = clock(device)
            output = generate(policy._inputs(observations[batch]), **calls[key])[:, length:]
            seconds = clock(device) - began
            if turn >= args.warmup:
                timings.setdefault(key, []).append(seconds)
                if key in decoders and not torch.equal(output, stock):
                    same = [a.tolist()[: len(e)] == e for a, e in zip(output, expected, strict=True)]
                    wrong[key] += size - sum(same)

    decoder = policy.model.get_decoder()
    weights = sum(p.numel() * p.element_size() for p in decoder.parameters())
    weights -= policy.model.get_input_embeddings().weight.nbytes  # of which a pass reads a row
    floor = float(np.median(needed)) * weights / bandwidth(device, policy.model.dtype)
    rows = []
    for key in (key for key in VARIANTS if key in timings):
        median, p95 = np.quantile(timings[key], [0.5, 0.95])
        stats = decoders[key].stats if key in decoders else None
        steps = policy.config.chunk_size
        rows.append(
            {
                "model": name, "batch": size, "variant": key, "median_ms": median * 1e3, "p95_ms": p95 * 1e3,
                "chunks_per_s": size / median, "hz_n_step": steps / median, "hz_requery": 1 / median,
                "passes_per_chunk": stats.passes / args.chunks if stats else float(np.mean(written)),
                "of_floor": median / floor, "acceptance": stats.acceptance if stats and stats.drafted else None,
                "other_answers": wrong.get(key),
            }
        )  # fmt: skip
    ours = next(row for row in rows if row["variant"] == "c")
    per_pass = ours["median_ms"] / ours["passes_per_chunk"]
    host = grammar_seconds(policy, answers[:4]) * 1e3
    print(f"{name}, batch {size}: grammar {host * 1e3:.0f} us a token on the host, {host / per_pass:.1%} of a pass")
    return rows


def ratios(rows: list[dict]) -> dict[str, float]:
    """Of median times; a key is there if both of its variants are."""
    times = {(row["variant"], row["batch"]): row["median_ms"] for row in rows}
    pairs = {"ours_vs_stock": ("a", "c"), "drafts_vs_stock": ("a", "d"), "ours_vs_xgrammar": ("b", "c")}
    found = {
        f"{name}_b{size}": times[slow, size] / times[fast, size]
        for name, (slow, fast) in pairs.items()
        for size in sorted({size for _, size in times})
        if (slow, size) in times and (fast, size) in times
    }
    return found | {f"of_floor_b{row['batch']}": row["of_floor"] for row in rows if row["variant"] == "c"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all that fit")
    add("--batch_sizes", nargs="+", type=int, default=[1, 16])
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all; (c) always")
    add("--chunks", type=int, default=8, help="timed calls a variant (default: %(default)s)")
    add("--warmup", type=int, default=2, help="calls before that; captures and compiles (default: %(default)s)")
    add("--device", help="default: a GPU if there is one")
    add("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--layers", type=int, help="build only so many of the language model's layers")
    add("--models_dir", default=".", help="folders with configs and processors, by name; else from the Hub")
    add("--max_gb", type=float, default=8.0, help="skip models with more weights (default: %(default)s)")
    add(
        "--jitter", type=int, default=2, help="bins by which the drafts of (d±) are off at most (default: %(default)s)"
    )
    add("--compile", action="store_true", help="torch.compile ours as well (on a GPU)")
    add("--json", type=Path, metavar="FILE", help="write the table, versions and ratios (the first model's, and all)")
    args = parser.parse_args()
    args.variants = {"c", *args.variants}
    args.decoding = DecodingOptions(compile=args.compile)
    device, dtype = resolve_device(args.device, args.dtype)
    rows, skipped = [], {}
    for name in args.models:
        try:
            policy = build_policy(name, args, device, dtype)
        except MemoryError as error:
            skipped[name] = str(error)
            print(f"{name} skipped: {error}")
            continue
        for size in args.batch_sizes:
            rows += bench(name, size, policy, args)
            print_table([row for row in rows if (row["model"], row["batch"]) == (name, size)])
        del policy
    by_model = {name: ratios([row for row in rows if row["model"] == name]) for name in {row["model"] for row in rows}}
    for name, found in by_model.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.2f}" for key, value in found.items()))
    if args.json:
        about = provenance(str(device), PACKAGES) | {"dtype": str(dtype).removeprefix("torch."), "skipped": skipped}
        try:
            about["versions"]["xgrammar"] = version("xgrammar")
        except PackageNotFoundError:
            about["versions"]["xgrammar"] = None
        first = by_model[rows[0]["model"]] if rows else {}
        write_json(args.json, {"table": rows, "ratios": first, "ratios_by_model": by_model} | about)


def print_table(rows: list[dict]) -> None:
    names = {"median_ms": "ms/chunk", "p95_ms": "p95", "chunks_per_s": "chunks/s", "hz_n_step": "Hz, n-step"}
    names |= {"hz_requery": "Hz, re-query", "passes_per_chunk": "passes", "of_floor": "x floor"}
    names |= {"acceptance": "accepted", "other_answers": "differ"}
    print(f"{'':30s}" + "".join(f"{title:>13s}" for title in names.values()))
    for row in rows:
        cells = ("-" if row[key] is None else f"{row[key]:.2f}" for key in names)
        print(f"({row['variant']}) {VARIANTS[row['variant']]:26s}" + "".join(f"{cell:>13s}" for cell in cells))


if __name__ == "__main__":
    main()
