"""What eval/bench_inference.py measures: our decoding and other people's, on random models, and the floor."""

import functools
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText, LogitsProcessor, LogitsProcessorList

from vla0_trl.actions import NormStats
from vla0_trl.benchmarks.inference_table import MODELS, SEED, VARIANTS
from vla0_trl.config import NANO, VLAConfig
from vla0_trl.envs.pusht.env import TASK
from vla0_trl.envs.pusht.expert import record_episode
from vla0_trl.internals import PARALLEL, STOCK
from vla0_trl.models.loading import load_processor
from vla0_trl.models.nano import build_nano
from vla0_trl.policy.grammar import ActionGrammarLogitsProcessor
from vla0_trl.policy.policy import VLAPolicy
from vla0_trl.policy.speculative.decoder import ChunkDecoder
from vla0_trl.policy.speculative.draft_state import DraftState, Speller
from vla0_trl.policy.speculative.options import DecodingOptions


def check_sources(names: list[str], models_dir: Path | None) -> None:
    """`ValueError`, in one line, for the first of these MODELS whose config can't be read."""
    for name in names:
        source = _source(name, models_dir)
        try:
            if source is not None:
                AutoConfig.from_pretrained(source)
        except (OSError, ValueError) as error:
            where = "the Hub can't be reached" if models_dir is None else "there is no config"
            raise ValueError(
                f"{name} needs the config and processor of {source}, and {where}: give their folders with "
                f"--models_dir, or leave it out (--models {NANO} needs no files)"
            ) from error


def _source(name: str, models_dir: Path | None) -> str | None:
    """Where a model's config and processor are; None for nano, which is built."""
    hub_id = MODELS[name][0]
    return hub_id if hub_id is None or models_dir is None else str(models_dir / hub_id.split("/")[1])


def random_policy(
    name: str,
    models_dir: Path | None,
    device: torch.device,
    dtype: torch.dtype,
    max_gb: float,
    load_in_4bit: bool = False,
) -> VLAPolicy:
    """One of MODELS in its true architecture, with random weights; `MemoryError` if they take more than `max_gb`."""
    _, side, steps, width = MODELS[name]
    low, high = [0.0] * width, [512.0] * width
    stats = NormStats(low, high, low, high, low, high, 1)
    config = VLAConfig(
        action_dim=width, state_dim=width, chunk_size=steps, image_size=side, use_state=True, relative_actions=True,
        normalization=[-200.0, 200.0], action_stats=stats, state_stats=stats, crop_ratio=0.875,
    )  # fmt: skip
    source = _source(name, models_dir)
    if source is None:
        model, processor = build_nano(seed=SEED)
    else:
        architecture, processor = AutoConfig.from_pretrained(source), load_processor(source, config)
        with torch.device("meta"):
            parameters = sum(p.numel() for p in AutoModelForImageTextToText.from_config(architecture).parameters())
        size = parameters * dtype.itemsize / 1e9
        if size > max_gb:
            raise MemoryError(f"{size:.1f} GB of weights, --max_gb is {max_gb:g}")
        torch.manual_seed(SEED)
        with device:
            model = AutoModelForImageTextToText.from_config(architecture, dtype=dtype)
    model = model.to(device, dtype).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(2.0 if parameter.ndim > 1 else 1.0)  # or all answers are nearly the same
    policy = VLAPolicy(model, processor, config)
    if load_in_4bit:  # weights are packed when they are loaded
        with tempfile.TemporaryDirectory() as folder:
            for part in (model, processor, config):
                part.save_pretrained(folder)
            policy = VLAPolicy.from_pretrained(folder, device, dtype, load_in_4bit=True)
    return policy


def bench(policy: VLAPolicy, size: int, chunks: int, warmup: int, jitter: int) -> list[dict]:
    """Time all VARIANTS on one model and batch size, in turns: a row of the table each.

    Args:
        chunks, warmup: timed calls of each variant, and calls before that.
        jitter: bins by which the drafts of (d±) are off at most, beside what a recorded episode says.
    """
    rng, make_xgrammar = np.random.default_rng(0), _xgrammar_processor(policy)
    options = {"prefix": policy.decoder.prefix, "period": policy.config.action_dim}
    decoders = {key: ChunkDecoder(policy.grammar, **options) for key in ("c", "d", "d±")}
    options |= {"options": DecodingOptions(mode=PARALLEL), "reader": policy.decoder.reader}
    decoders["p"] = ChunkDecoder(policy.grammar, **options)
    steps = _recorded_steps(policy.config, (warmup + chunks) * size)
    policy.predict_action_chunk([observation for observation, _ in steps[:size]])
    if policy.decoding == STOCK:  # it failed its check, and a warning has said so: there is nothing of ours to time
        decoders = {}
    timings, counts, wrong, answers = {}, {}, dict.fromkeys(decoders.keys() - {"p"}, 0), []
    for turn in range(warmup + chunks):
        observations, offs = zip(*steps[turn * size : (turn + 1) * size], strict=True)
        grammar = LogitsProcessorList([ActionGrammarLogitsProcessor(grammar=policy.grammar)])
        stock, _ = _timed(policy, observations, policy.grammar.max_new_tokens, logits_processor=grammar)
        expected = [row[: row.index(policy.chat_tokenizer.end_of_turn_id) + 1] for row in stock.tolist()]
        calls = {"a": {"logits_processor": LogitsProcessorList([DigitsAndSpaces(policy)])}}
        if make_xgrammar is not None:
            calls["b"] = {"logits_processor": LogitsProcessorList([make_xgrammar()])}
        calls |= {key: {"custom_generate": decoder} for key, decoder in decoders.items()}
        for key, most in (("d", 0), ("d±", jitter)):
            if key in calls:
                calls[key]["drafts"] = [_draft(policy, *pair, most, rng) for pair in zip(expected, offs, strict=True)]
        keys = [*calls][turn % len(calls) :] + [*calls][: turn % len(calls)]
        for key in keys:
            before = decoders[key].stats.passes if key in decoders else 0
            output, seconds = _timed(policy, observations, stock.shape[1], **calls[key])  # (a) has no end of its own
            if turn >= warmup:
                passes = decoders[key].stats.passes - before if key in decoders else stock.shape[1]
                timings.setdefault(key, []).append(seconds)
                counts.setdefault(key, []).append(passes)
            if key in wrong:
                pairs = zip(output.tolist(), expected, strict=True)
                wrong[key] += sum(tokens[: len(other)] != other for tokens, other in pairs)
        answers.append(max(_open_tokens(policy, answer) for answer in expected))
    floors = dict.fromkeys(VARIANTS, float(np.median(answers)) * _floor_seconds(policy))
    if "p" in decoders:
        floors["p"] = _parallel_floor(policy, observations)
    table = []
    for key in (key for key in VARIANTS if key in timings):
        stats = decoders[key].stats if key in decoders else None
        median, p95 = np.quantile(timings[key], [0.5, 0.95])
        row = {"variant": key, "median_ms": median * 1e3, "p95_ms": p95 * 1e3, "chunks_per_s": size / median}
        row |= {"hz_n_step": policy.config.chunk_size / median, "hz_requery": 1 / median}
        row |= {"of_floor": median / floors[key]}  # how many times the least possible time
        row |= {"passes_per_chunk": float(np.mean(counts[key])), "other_answers": wrong.get(key)}
        table.append(row | {"acceptance": stats.acceptance if stats and stats.drafted else None})
    return table


def _timed(policy: VLAPolicy, observations, max_new_tokens: int, **options) -> tuple[torch.Tensor, float]:
    """Answers (B, A), and seconds from observations to tokens."""
    began = _clock(policy.model.device)
    inputs, config = policy._inputs(observations), deepcopy(policy.generation_config)
    config.max_new_tokens = max_new_tokens
    output = policy.model.generate(**inputs, generation_config=config, **options)
    return output[:, inputs["input_ids"].shape[1] :], _clock(policy.model.device) - began


def _draft(policy: VLAPolicy, answer: list[int], off: np.ndarray, jitter: int, rng: np.random.Generator) -> list[int]:
    """The model's own answer, each integer off by `off` and a random number of bins up to `jitter`."""
    integers = np.array(policy.processor.tokenizer.decode(answer, skip_special_tokens=True).split(), np.int64)
    integers = integers + off + rng.integers(-jitter, jitter + 1, off.shape)
    return policy.chat_tokenizer.encode_answer(integers.clip(0, policy.grammar.num_bins))[0]


class DigitsAndSpaces(LogitsProcessor):
    """What VLA-0 and its re-implementations allow; it knows no end, so `generate` has to be told how many tokens."""

    def __init__(self, policy: VLAPolicy):
        names = [*"0123456789", " "]
        self.ids = [policy.processor.tokenizer(name, add_special_tokens=False)["input_ids"][-1] for name in names]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, self.ids] = scores[:, self.ids]
        return allowed


def _xgrammar_processor(policy: VLAPolicy) -> Callable[[], LogitsProcessor] | None:
    """Makes a processor for one `generate()`; None without xgrammar."""
    try:
        import xgrammar
        from xgrammar.contrib.hf import LogitsProcessor as Masked
    except ImportError:
        return None
    vocabulary = policy.model.config.get_text_config().vocab_size
    info = xgrammar.TokenizerInfo.from_huggingface(
        policy.processor.tokenizer, vocab_size=vocabulary, stop_token_ids=policy.chat_tokenizer.end_of_turn_id
    )
    compiled = xgrammar.GrammarCompiler(info).compile_regex(policy.grammar.regular_expression())
    return functools.partial(Masked, compiled)


def _recorded_steps(config: VLAConfig, count: int) -> list[tuple[dict, np.ndarray]]:
    """`count` steps of the scripted PushT expert: observation, and by how many bins drafts are off there, (values,).

    A draft is the chunk that was recorded for the step before, shifted by one step; actions wider than PushT's repeat.
    """
    recording = record_episode(100000)
    actions = np.resize(recording.actions.T, (config.action_dim, len(recording.actions))).T
    states = np.resize(recording.states[:, :2].T, actions.T.shape).T.astype(np.float32)
    actions = np.concatenate([actions, np.repeat(actions[-1:], config.chunk_size, 0)])
    tokenizer = config.action_tokenizer()
    steps = []
    for step in range(1, count + 1):
        now, before = step % len(states), (step - 1) % len(states)
        chunk = tokenizer.to_integers(actions[now : now + config.chunk_size], states[now])
        last = tokenizer.to_integers(actions[before : before + config.chunk_size], states[before])
        last = tokenizer.from_integers(last, states[before])
        draft = tokenizer.to_integers(np.concatenate([last[1:], last[-1:]]), states[now])
        observation = {"images": {"image": recording.frames[now]}, "state": states[now], "task": TASK}
        steps.append((observation, draft - chunk))
    return steps


def _open_tokens(policy: VLAPolicy, answer: list[int]) -> int:
    """Tokens of an answer that the grammar does not force: passes that one-by-one decoding can't do without."""
    speller = Speller(policy.grammar)
    row, count = DraftState(speller), 0
    while not row.done:
        row.write(speller.column[answer[len(row.tokens)]])
        count += 1
    return count


def _floor_seconds(policy: VLAPolicy) -> float:
    """The least time of a pass: reading the language model's weights once, at the bandwidth measured here."""
    model = policy.model
    weights = sum(p.nbytes for p in model.get_decoder().parameters())
    weights -= model.get_input_embeddings().weight.nbytes  # of which a pass reads a row
    return weights / _bandwidth(model.device, model.dtype)


def _parallel_floor(policy: VLAPolicy, observations) -> float:
    """The least time of a parallel reading: of its products, and of reading the weights once in each pass."""
    options = DecodingOptions(mode=PARALLEL, graphs=False)  # what a captured graph computes is not counted
    decoder = ChunkDecoder(policy.grammar, options, policy.decoder.prefix, reader=policy.decoder.reader)
    with FlopCounterMode(display=False) as counter:
        _timed(policy, observations, policy.grammar.max_new_tokens, custom_generate=decoder)
    products = counter.get_total_flops() / _product_rate(policy.model.device, policy.model.dtype)
    return max(products, decoder.stats.passes * _floor_seconds(policy))


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of a product of large matrices."""
    matrix, best = torch.ones(2048, 2048, device=device, dtype=dtype), float("inf")
    for _ in range(8):
        began = _clock(device)
        matrix @ matrix
        best = min(best, _clock(device) - began)
    return 2 * 2048**3 / best


def _bandwidth(device: torch.device, dtype: torch.dtype) -> float:
    """Bytes per second that a matrix-vector product reads."""
    matrices = [torch.zeros(4096, 4096, device=device, dtype=dtype) for _ in range(8)]
    vector, best = torch.zeros(1, 4096, device=device, dtype=dtype), float("inf")
    for _ in range(8):
        began = _clock(device)
        for matrix in matrices:
            torch.nn.functional.linear(vector, matrix)
        best = min(best, _clock(device) - began)
    return sum(matrix.nbytes for matrix in matrices) / best


def _clock(device: torch.device) -> float:
    """Seconds, after all that the device had to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
