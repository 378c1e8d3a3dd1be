"""How much memory a recipe needs: its model with random weights, trained on synthetic rows of true shape."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig, TrainerCallback
from trl import ModelConfig
from trl.kernels import chunked_logprob

from vla0_trl.benchmarks.memory_table import CARD, GIB, PARTS
from vla0_trl.benchmarks.plan import Plan
from vla0_trl.benchmarks.synthetic import synthetic_dataset
from vla0_trl.data.chat_dataset import align_config
from vla0_trl.models import attention as forward
from vla0_trl.training.run import load_backbone, lora_config
from vla0_trl.training.trainer import VLATrainer

_CPU_TOKEN_CHUNK = 64
_BATCHES = (2, 3)  # one sample needs no padding, and takes another way through attention


def random_checkpoint(source: str, folder: Path, dtype: torch.dtype, layers: tuple[int, int] | None = None) -> None:
    """Write a model of `source`'s architecture with random weights, and its processor, into `folder`.

    It has `layers` in language model and image encoder, or all.
    """
    backbone = AutoConfig.from_pretrained(source)
    if layers is not None:
        text, vision = _depth_fields(backbone)
        setattr(backbone.text_config, text, layers[0])
        setattr(backbone.vision_config, vision, layers[1])
        if backbone.model_type.startswith("qwen"):  # lists its layers, too
            backbone.text_config.layer_types = backbone.text_config.layer_types[: layers[0]]
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForImageTextToText.from_config(backbone, dtype=dtype)
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(source, backend="torchvision").save_pretrained(folder)


def _depth_fields(backbone: PreTrainedConfig) -> tuple[str, str]:
    """How the configs of language model and image encoder call their depth."""
    return "num_hidden_layers", "depth" if backbone.model_type.startswith("qwen") else "num_hidden_layers"


def measure(plan: Plan, kind: str) -> dict[str, float]:
    """Train the plan's model on a GPU for its `max_steps`: where the memory went, in GiB, and samples/s."""
    trainer, parts = _trainer(plan, kind, rows=256)
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    figures = parts.sizes | {"activations": torch.cuda.max_memory_allocated() - sum(parts.sizes.values())}
    figures |= {"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    batch = plan[1].per_device_train_batch_size * plan[1].gradient_accumulation_steps
    seconds = (parts.ends[-1] - parts.ends[0]) / (len(parts.ends) - 1)
    return {f"{name}_gib": size / GIB for name, size in figures.items()} | {"samples_per_second": batch / seconds}


def estimate(plan: Plan, kind: str, source: str, folder: Path) -> dict[str, float]:
    """What [`measure`] would find, without a GPU or the memory: from models of one and two layers on a CPU.

    What is kept from step to step, and for the backward pass, grows linearly with the depth of language model and
    image encoder, the latter with the batch, too; so a few shallow models, with two and three samples, tell the whole
    one's figures. Kernels differ between CPU and GPU, and so does what they keep: an estimate.
    """
    backbone = AutoConfig.from_pretrained(source)
    text, vision = _depth_fields(backbone)
    depth = getattr(backbone.text_config, text), getattr(backbone.vision_config, vision)
    batch = plan[1].per_device_train_batch_size
    found: dict[tuple[int, int, int], dict[str, int]] = {}
    for layers in ((1, 1), (2, 1), (1, 2)):
        target = folder / "x".join(map(str, layers))
        random_checkpoint(source, target, _dtype(plan[2]), layers)
        for size in _BATCHES:
            training = replace(plan[1], per_device_train_batch_size=size)
            small = (plan[0], training, replace(plan[2], model_name_or_path=str(target)))
            with _kernels_like_a_gpus():
                found[*layers, size] = _measure_on_cpu(small, kind)

    def whole(name: str, size: int) -> float:
        shallow = found[1, 1, size][name]
        of_text, of_vision = found[2, 1, size][name] - shallow, found[1, 2, size][name] - shallow
        return shallow + (depth[0] - 1) * of_text + (depth[1] - 1) * of_vision

    few, more = _BATCHES
    figures = {name: whole(name, few) for name in PARTS[:-1]}
    kept = whole("kept", few) + (batch - few) * (whole("kept", more) - whole("kept", few))
    of_few, of_more = (found[1, 1, size]["passing"] for size in _BATCHES)
    passing = of_few + (batch - few) * (of_more - of_few)
    tile = min(chunked_logprob.TOKEN_CHUNK_SIZE, batch * found[1, 1, few]["answer_tokens"])
    head = tile * backbone.get_text_config().vocab_size * torch.bfloat16.itemsize
    figures["activations"] = kept + passing + head
    return {f"{name}_gib": size / GIB for name, size in (figures | {"peak": sum(figures.values())}).items()}


@contextmanager
def _kernels_like_a_gpus() -> Iterator[None]:
    """What a CPU keeps beyond a GPU, made small: several tiles of float32 logits instead of one in bfloat16 (the
    GPU's is added to the estimate), and attention weights."""
    usual = chunked_logprob.TOKEN_CHUNK_SIZE
    chunked_logprob.TOKEN_CHUNK_SIZE, forward.blocks_on_cpu = _CPU_TOKEN_CHUNK, False
    try:
        yield
    finally:
        chunked_logprob.TOKEN_CHUNK_SIZE, forward.blocks_on_cpu = usual, True


def _measure_on_cpu(plan: Plan, kind: str) -> dict[str, int]:
    """Bytes of weights, gradients, optimizer, `kept` for a backward pass, `passing` during it; and answer tokens."""
    trainer, parts = _trainer(plan, kind, rows=plan[1].max_steps * plan[1].per_device_train_batch_size)
    for name in ("training_step", "compute_loss"):
        setattr(trainer, name, record_function(name)(getattr(trainer, name)))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train()
    with tempfile.NamedTemporaryFile(suffix=".json") as trace:
        profiler.export_chrome_trace(trace.name)  # the only public place with every allocation and release in order
        events = json.loads(Path(trace.name).read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    times, allocated = [time for time, _ in changes], np.cumsum([size for _, size in changes])
    # The last of them: gradients and optimizer state are there, and are counted on their own.
    step, loss = (
        max((e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == name and "dur" in e)
        for name in ("training_step", "compute_loss")
    )
    begun, ready, done = np.searchsorted(times, (loss[0], loss[1], step[1]))
    kept = allocated[ready - 1] - allocated[begun - 1]
    passing = allocated[ready - 1 : done].max() - allocated[ready - 1]
    answer = (trainer.eval_collator([trainer.train_dataset[0]])["labels"] >= 0).sum()
    return parts.sizes | {"kept": int(kept), "passing": int(passing), "answer_tokens": int(answer)}


def _trainer(plan: Plan, kind: str, rows: int) -> tuple[VLATrainer, _PartsCallback]:
    data, training, model_args = plan
    dataset, config = synthetic_dataset(kind, rows)
    config = align_config(dataset, config, **data.overrides())
    model, processor = load_backbone(model_args, training, config)
    trainer = VLATrainer(
        model=model,
        args=training,
        vla_config=config,
        processing_class=processor,
        train_dataset=dataset,
        stored_cameras=config.cameras,
        peft_config=lora_config(model_args, training),
    )
    parts = _PartsCallback()
    trainer.add_callback(parts)
    return trainer, parts


def build(plan: Plan, source: str, folder: Path) -> Plan:
    """The plan, with a random checkpoint of the whole architecture in place of the pretrained one."""
    random_checkpoint(source, folder, _dtype(plan[2]))
    return (*plan[:2], replace(plan[2], model_name_or_path=str(folder)))


def cap_at_card(card: int = CARD) -> float:
    """Let this process have what a card of `card` bytes would leave it: all but the CUDA context. Returns GiB."""
    torch.ones(64, 64, device="cuda").matmul(torch.ones(64, 64, device="cuda"))  # loads what every run loads
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    limit = min(card, total) - context
    torch.cuda.set_per_process_memory_fraction(limit / total)
    return limit / GIB


class _PartsCallback(TrainerCallback):
    """Bytes of what lives from step to step, and when each step ended."""

    def __init__(self):
        self.sizes: dict[str, int] = {}
        self.ends: list[float] = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.sizes["weights"] = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        self.sizes["gradients"] = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)

    def on_step_end(self, args, state, control, optimizer, **kwargs):
        tensors = torch.utils._pytree.tree_leaves(optimizer.state_dict()["state"])
        self.sizes["optimizer"] = sum(tensor.nbytes for tensor in tensors if torch.is_tensor(tensor))
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def _dtype(model_args: ModelConfig) -> torch.dtype:
    return getattr(torch, str(model_args.dtype))
