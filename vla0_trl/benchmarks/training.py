"""What recipes/bench_training.py compares: stock TRL, a collator as re-implementations of VLA-0 write it, and ours."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PrinterCallback,
    ProcessorMixin,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from vla0_trl.config import NANO, VLAConfig
from vla0_trl.models.loading import load_model, load_processor, set_image_size
from vla0_trl.models.nano import build_nano
from vla0_trl.processing.chat import with_images
from vla0_trl.processing.chat_tokenizer import IGNORED
from vla0_trl.processing.collator import VLADataCollator
from vla0_trl.training.arguments import VLASFTConfig
from vla0_trl.training.trainer import VLATrainer

Collator = Callable[[list[dict[str, Any]]], Any]
_COLLATED = 8  # rows at once, when only collators are measured
WARM_UP = 2  # steps that are not timed; with torch_compile, they compile


@dataclass
class Bench:
    """What all contestants share; `forward_way` says how ours computed in the end, `"fast"` or `"stock"`."""

    model: str
    config: VLAConfig
    rows: Dataset
    batch_size: int
    steps: int
    num_workers: int = 0
    random_weights: bool = False
    float32: bool = False
    forward_way: dict[str, str] = field(default_factory=dict)

    def processor(self, stock: bool = False) -> ProcessorMixin:
        """Ours, or what users of plain TRL load: only the splitting of images into 17 is off, for comparison."""
        if self.model == NANO:
            model, processor = build_nano()
            set_image_size(processor, model.config, self.config)
        elif stock:
            processor = AutoProcessor.from_pretrained(self.model)
            processor.image_processor.do_image_splitting = False
        else:
            processor = load_processor(self.model, self.config)
        return processor

    def build_model(self) -> torch.nn.Module:
        if self.model == NANO:
            return build_nano()[0]
        if self.random_weights:
            return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(self.model), dtype=torch.float32)
        return load_model(self.model)

    def collators(self) -> dict[str, Collator]:
        """Each takes rows as `datasets` gives them, and returns what it hands to the training device."""
        stock = self.processor(stock=True)
        return {
            "trl": DataCollatorForVisionLanguageModeling(stock, completion_only_loss=True),
            "peer": lambda rows: _peer_collator(rows, stock, self.config),
            "ours": VLADataCollator(self.processor(), self.config, defer_images=True),
        }

    def collate(self, collator: Collator) -> dict[str, float]:
        """Rows/s of one process, from the JPEG bytes in the dataset to the batch, and megabytes per row."""
        batch = collator([self.rows[i] for i in range(_COLLATED)])
        began = time.perf_counter()
        for start in range(0, len(self.rows), _COLLATED):
            collator([self.rows[i] for i in range(start, min(start + _COLLATED, len(self.rows)))])
        seconds = time.perf_counter() - began
        size = sum(leaf.nbytes for leaf in tree_leaves(dict(batch)) if torch.is_tensor(leaf))
        return {"rows_per_s": len(self.rows) / seconds, "mb_per_row": size / _COLLATED / 1e6}

    def trainer(self, name: str, folder: str) -> SFTTrainer:
        """`trl` as it comes, gradient checkpointing included; `trl_tuned` with our settings; `ours`; `compiled`."""
        on_gpu = torch.cuda.is_available()
        options = {
            "output_dir": folder,
            "max_steps": WARM_UP + self.steps,
            "per_device_train_batch_size": self.batch_size,
            "bf16": not self.float32,
            "use_cpu": not on_gpu,
            "optim": "adamw_torch_fused",
            "gradient_checkpointing": name == "trl",
            "torch_compile": name == "compiled",
            "dataloader_num_workers": self.num_workers,
            "dataloader_persistent_workers": self.num_workers > 0,
            "dataloader_drop_last": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "logging_strategy": "no",
        }
        shared = {"model": self.build_model(), "train_dataset": self.rows, "processing_class": self.processor()}
        if name.startswith("trl"):
            trainer = SFTTrainer(args=SFTConfig(**options), **shared)
        else:
            ours = {"vla_config": self.config, "stored_cameras": self.config.cameras}
            trainer = VLATrainer(args=VLASFTConfig(**options), **ours, **shared)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def train(self, name: str) -> dict[str, float]:
        """Optimizer steps and samples per second; on a GPU, the peak of its memory."""
        clock = Timed()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.trainer(name, folder)
            trainer.add_callback(clock)
            trainer.train()
        if isinstance(trainer, VLATrainer):
            self.forward_way[name] = trainer.forward.way
        speed = self.steps / clock.seconds
        figures = {"steps_per_s": speed, "samples_per_s": speed * self.batch_size}
        if torch.cuda.is_available():
            figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return figures

    def sample(self) -> dict[str, float]:
        """What a sample costs: tokens, those of its images, and TFLOP of a forward and backward pass."""
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.trainer("ours", folder)
            batch = next(iter(trainer.get_train_dataloader()))
            ids = batch["input_ids"]
            images = (ids == self.processor().image_token_id).sum().item()
            inputs = trainer._prepare_inputs(batch)
            trainer.check_forward(trainer.model, dict(inputs))  # else its passes would count
            with FlopCounterMode(display=False) as counter:
                trainer.compute_loss(trainer.model, inputs).backward()
        flop = counter.get_total_flops() / len(ids) / 1e12
        return {"tokens": ids.shape[1], "image_tokens": images // len(ids), "tflop": flop}

    def profile(self, trace: Path) -> str:
        """Where our steps' time goes, and the share of it in which the device is idle; `trace` is for Perfetto."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
        profiler = profile(activities=activities)
        clock = Timed(profiler)
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.trainer("ours", folder)
            trainer.add_callback(clock)
            trainer.train()
        profiler.export_chrome_trace(str(trace))
        events = profiler.key_averages()
        if device == "cuda":  # kernels of one stream, one after the other
            busy = sum(e.self_device_time_total for e in events if e.device_type == torch.autograd.DeviceType.CUDA)
        else:
            busy = sum(e.self_cpu_time_total for e in events if e.key.startswith("aten::"))
        idle = max(0.0, 1 - busy / 1e6 / clock.seconds)
        table = events.table(sort_by=f"self_{device}_time_total", row_limit=12, max_name_column_width=50)
        where = "the GPU runs no kernel" if device == "cuda" else "the main thread is outside of torch's operators"
        return f"{table}\n{where} in {idle:.1%} of {clock.seconds:.1f} s"


class Timed(TrainerCallback):
    """Takes the time of a run behind its warm-up, and profiles that part."""

    def __init__(self, profiler: profile | None = None):
        self.profiler = profiler
        self.seconds = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available() and state.global_step in (WARM_UP, state.max_steps):
            torch.cuda.synchronize()
        if state.global_step == WARM_UP:
            self._began = time.perf_counter()
            if self.profiler is not None:
                self.profiler.start()
        elif state.global_step == state.max_steps:
            if self.profiler is not None:
                self.profiler.stop()
            self.seconds = time.perf_counter() - self._began


def _peer_collator(
    rows: list[dict[str, Any]], processor: ProcessorMixin, config: VLAConfig
) -> dict[str, torch.Tensor]:
    """The usual way: each image cropped and jittered on its own, each row through chat template and processor."""
    side = rows[0]["images"][0].height
    augment = v2.Compose([v2.RandomCrop(round(0.9 * side)), v2.ColorJitter(0.2, 0.2, 0.2, 0.05)])
    images = [[augment(image) for image in row["images"]] for row in rows]
    chats = [with_images(row["prompt"] + row["completion"], len(config.cameras)) for row in rows]
    texts = [processor.apply_chat_template(chat) for chat in chats]
    batch = processor(text=texts, images=images, padding=True, return_tensors="pt", add_special_tokens=False)
    labels = batch["input_ids"].clone()
    for label, row in zip(labels, rows, strict=True):
        messages = with_images(row["prompt"], len(config.cameras))
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        length = len(processor(text=[prompt], images=[row["images"]], add_special_tokens=False)["input_ids"][0])
        label[:length] = IGNORED
    labels[batch["attention_mask"] == 0] = IGNORED
    return {**batch, "labels": labels}
