"""How much memory a recipe needs: its model with random weights, trained on synthetic rows of true shape."""

from __future__ import annotations

import json
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig, TrainerCallback
from trl import ModelConfig

from vla0_trl.actions import NormStats
from vla0_trl.arguments import DataArguments, VLASFTConfig
from vla0_trl.chat_dataset import FEATURES, align_config
from vla0_trl.config import VLAConfig
from vla0_trl.episodes import Episode, chat_columns, checked_episode
from vla0_trl.nano import NANO
from vla0_trl.recipe import load_backbone, lora_config
from vla0_trl.training import VLATrainer

GIB = 2**30
CARD = 12 * GIB
PARTS = ("weights", "gradients", "optimizer", "activations")
Plan = tuple[DataArguments, VLASFTConfig, ModelConfig]

_LIBERO_TASK = "turn on the stove and put the moka pot on it, then put both bowls on the plate"  # longer than any
# What the datasets of the recipes look like: (task, VLAConfig without statistics, side of a camera's image).
_DATASETS = {
    "libero": (
        _LIBERO_TASK,
        VLAConfig(cameras=["image", "image2"], action_dim=7, state_dim=8, chunk_size=8, image_size=256),
        256,
    ),
    "pusht": ("Push the T onto its goal.", VLAConfig(action_dim=2, state_dim=2, chunk_size=10, image_size=96), 96),
}


def synthetic_dataset(kind: str, rows: int) -> tuple[Dataset, VLAConfig]:
    """Rows as a conversion of `libero` or `pusht` gives them; integers of mostly three digits, the usual length."""
    task, config, side = _DATASETS[kind]
    rng = np.random.default_rng(0)
    stats = {
        f"{name}_stats": NormStats.from_array(np.array([[-1.0] * dim, [1.0] * dim]))
        for name, dim in (("action", config.action_dim), ("state", config.state_dim))
    }
    episode = Episode(
        task,
        rng.uniform(-1, 1, (rows, config.action_dim)),
        {camera: rng.integers(0, 256, (rows, side, side, 3), np.uint8) for camera in config.cameras},
        rng.uniform(-1, 1, (rows, config.state_dim)),
    )
    config = replace(config, **stats)
    return Dataset.from_dict(chat_columns(checked_episode(episode, config), config, 0), features=FEATURES), config


def random_checkpoint(source: str, folder: Path, dtype: torch.dtype, layers: tuple[int, int] | None = None) -> None:
    """Write a model of `source`'s architecture with random weights, and its processor, into `folder`.

    Args:
        source: a folder or Hub id, of which only config and processor are read.
        layers: of language model and image encoder, if not all.
    """
    backbone = AutoConfig.from_pretrained(source)
    if layers is not None:
        text, vision = depth_fields(backbone)
        setattr(backbone.text_config, text, layers[0])
        setattr(backbone.vision_config, vision, layers[1])
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForImageTextToText.from_config(backbone, dtype=dtype)
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(source, backend="torchvision").save_pretrained(folder)


def depth_fields(backbone: PreTrainedConfig) -> tuple[str, str]:
    """How the configs of language model and image encoder call their depth."""
    return "num_hidden_layers", "depth" if backbone.model_type.startswith("qwen") else "num_hidden_layers"


def measure(plan: Plan, kind: str, rows: int = 256) -> dict[str, float]:
    """Train the plan's model for its `max_steps`, and say where the memory went, in GiB, and samples/s.

    On a GPU the peaks are the allocator's own; on a CPU they are summed up from the profiler's allocations.
    """
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
    on_gpu = training.device.type == "cuda"
    profiler = nullcontext() if on_gpu else profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with profiler:
        trainer.train()
    tensors = [*trainer.model.parameters(), *trainer.model.buffers()]
    weights = sum(tensor.nbytes for tensor in tensors)
    if on_gpu:
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    else:
        peak = reserved = weights + _profiled_peak(profiler)
    figures = {"weights": weights, "gradients": parts.gradients, "optimizer": parts.optimizer}
    figures |= {"activations": peak - sum(figures.values()), "peak": peak, "reserved": reserved}
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    seconds = (parts.ends[-1] - parts.ends[0]) / (len(parts.ends) - 1)
    return {f"{name}_gib": size / GIB for name, size in figures.items()} | {"samples_per_second": batch / seconds}


def estimate(plan: Plan, kind: str, source: str, folder: Path) -> dict[str, float]:
    """What [`measure`] would find, without a GPU or the memory: from models of one and two layers, one and two
    samples.

    Memory grows linearly with the depth of language model and image encoder, and activations with the batch, so a few
    shallow models tell the whole one's figures. Kernels differ between CPU and GPU, and so does what they keep: an
    estimate.
    """
    backbone = AutoConfig.from_pretrained(source)
    text, vision = depth_fields(backbone)
    depth = getattr(backbone.text_config, text), getattr(backbone.vision_config, vision)
    batch = plan[1].per_device_train_batch_size
    by_batch = {1: {}, 2: {}}
    for layers in ((1, 1), (2, 1), (1, 2)):
        target = folder / "x".join(map(str, layers))
        random_checkpoint(source, target, _dtype(plan[2]), layers)
        for size, found in by_batch.items():
            training = replace(plan[1], per_device_train_batch_size=size)
            found[layers] = measure(
                (plan[0], training, replace(plan[2], model_name_or_path=str(target))), kind, rows=8
            )
    one, two = (
        {name: _extrapolate(found, name, depth) for name in found[1, 1] if name != "samples_per_second"}
        for found in by_batch.values()
    )
    return {name: one[name] + (batch - 1) * (two[name] - one[name]) for name in one}


def _extrapolate(found: dict[tuple[int, int], dict[str, float]], name: str, depth: tuple[int, int]) -> float:
    shallow = found[1, 1][name]
    text, vision = found[2, 1][name] - shallow, found[1, 2][name] - shallow
    return shallow + (depth[0] - 1) * text + (depth[1] - 1) * vision


def build(plan: Plan, source: str, folder: Path) -> Plan:
    """The plan, with a random checkpoint of the whole architecture in place of the pretrained one."""
    if plan[2].model_name_or_path == NANO:
        return plan
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
    """Sizes of what lives from step to step, and when each step ended."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.ends: list[float] = []
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)

    def on_step_end(self, args, state, control, optimizer, **kwargs):
        tensors = torch.utils._pytree.tree_leaves(optimizer.state_dict()["state"])
        self.optimizer = sum(tensor.nbytes for tensor in tensors if torch.is_tensor(tensor))
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def _profiled_peak(profiler: profile) -> int:
    """The most that was allocated on the CPU at once since the profiler began."""
    with tempfile.NamedTemporaryFile(suffix=".json") as trace:
        profiler.export_chrome_trace(trace.name)  # the only public place with every allocation and release in order
        events = json.loads(Path(trace.name).read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    return max(0, *np.cumsum([size for _, size in sorted(changes)]).tolist())


def _dtype(model_args: ModelConfig) -> torch.dtype:
    return getattr(torch, str(model_args.dtype))
