"""Measure the training path: stock TRL, a collator as re-implementations of VLA-0 write it, and ours; in one run.

    python recipes/bench_training.py                                            # nano, minutes on two CPU cores
    python recipes/bench_training.py --processor HuggingFaceTB/SmolVLM2-500M-Video-Instruct --skip_steps
    python recipes/bench_training.py --model HuggingFaceTB/SmolVLM2-500M-Video-Instruct --batch_size 64 --num_workers 8

Same rows (JPEG bytes of two 256 px cameras), same model, same optimizer; they take turns, and the best turn of each
counts: noise only ever adds time. Steps are measured of TRL as it comes (`trl`: gradient checkpointing is on) and with
our settings (`trl_tuned`). `--random_weights` builds a model from its config alone.
"""

import argparse
import io
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from PIL import Image
from torch.profiler import ProfilerActivity, profile
from torchvision.transforms import v2
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, ProcessorMixin, TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from vla0_trl.actions import NormStats, join_integers
from vla0_trl.arguments import VLASFTConfig
from vla0_trl.chat import completion_messages, prompt_messages, with_images
from vla0_trl.chat_dataset import FEATURES
from vla0_trl.collator import VLADataCollator
from vla0_trl.config import VLAConfig
from vla0_trl.modeling import load_model, load_processor, set_image_size
from vla0_trl.nano import NANO, build_nano
from vla0_trl.results import write_json
from vla0_trl.training import VLATrainer

CAMERA_SIDE = 256
STEPPERS = ("trl", "trl_tuned", "ours")
TASK = "pick up the black bowl between the plate and the ramekin and place it on the plate"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=NANO, help="what is trained: nano, a folder or a Hub id (default: %(default)s)")
    add("--processor", help="of the collator measurement, if another than the model's")
    add("--random_weights", action="store_true", help="build --model from its config, without weights")
    add("--image_size", type=int, help="default: 96 for nano, else 512")
    add("--batch_size", type=int, default=32, help="(default: %(default)s)")
    add("--rows", type=int, default=64, help="of the collator measurement (default: %(default)s)")
    add("--steps", type=int, default=8, help="timed optimizer steps a turn (default: %(default)s)")
    add("--turns", type=int, default=3, help="of each contestant (default: %(default)s)")
    add("--num_workers", type=int, default=0, help="that collate beside the training process (default: %(default)s)")
    add("--skip_steps", action="store_true", help="only the collators")
    add("--trace", type=Path, help="write a chrome trace of our steps, and print where the time goes")
    add("--json", type=Path, help="write the table, versions and ratios")
    args = parser.parse_args()

    config = _config(args.image_size or (96 if args.model == NANO and not args.processor else 512))
    rows = synthetic_rows(max(args.rows, args.batch_size), config)
    processor = _processor(args.processor or args.model, config)
    table: dict[str, dict[str, float]] = {name: {} for name in ("trl", "trl_tuned", "peer", "ours")}
    collators = make_collators(stock_processor(args.processor or args.model, processor), processor, config)
    speeds = take_turns({n: lambda c=c: _collate_speed(c, rows, args.rows) for n, c in collators.items()}, args.turns)
    for name, collator in collators.items():
        batch = collator([rows[i] for i in range(8)])
        table[name] |= {"rows_per_s": speeds[name], "mb_per_row": _bytes(batch) / 8 / 1e6}
    if not args.skip_steps:
        train_config = _config(args.image_size or (96 if args.model == NANO else 512))
        runs = {name: lambda n=name: _train(n, args, rows, train_config) for name in STEPPERS}
        for name, speed in take_turns(runs, args.turns).items():
            table[name] |= {"steps_per_s": speed, "samples_per_s": speed * args.batch_size}
        if torch.cuda.is_available():
            table["ours"]["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if args.trace:
        print(_profile(args, rows, _config(config.image_size)))

    ratios = {f"collator_vs_{other}": speeds["ours"] / speeds[other] for other in ("trl", "peer")}
    if not args.skip_steps:
        ratios |= {
            f"step_vs_{name}": table["ours"]["steps_per_s"] / table[name]["steps_per_s"] for name in STEPPERS[:-1]
        }
    print_table(table, ratios)
    if args.json:
        about = {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__}
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
        settings = {key: str(value) for key, value in vars(args).items()}
        write_json(args.json, {"table": table, "ratios": ratios, "device": device, **about, "settings": settings})


def _config(image_size: int) -> VLAConfig:
    """LIBERO's shape: two cameras, 7 dimensions, chunks of 8, 8 state values."""
    actions, states = ([[-1.0] * dim, [1.0] * dim] for dim in (7, 8))
    return VLAConfig(
        cameras=["image", "image2"],
        action_dim=7,
        state_dim=8,
        use_state=True,
        image_size=image_size,
        action_stats=NormStats.from_array(np.array(actions)),
        state_stats=NormStats.from_array(np.array(states)),
    )


def _processor(name: str, config: VLAConfig) -> ProcessorMixin:
    if name != NANO:
        return load_processor(name, config)
    model, processor = build_nano()
    set_image_size(processor, model.config, config)
    return processor


def stock_processor(name: str, ours: ProcessorMixin) -> ProcessorMixin:
    """What users of plain TRL load: only the splitting of images into 17 is off, or nothing could be compared."""
    if name == NANO:
        return ours
    processor = AutoProcessor.from_pretrained(name)
    if "do_image_splitting" in processor.image_processor.to_dict():
        processor.image_processor.do_image_splitting = False
    return processor


def synthetic_rows(count: int, config: VLAConfig) -> Dataset:
    """Chat rows of true shape, their images as JPEG bytes."""
    rng = np.random.default_rng(0)
    columns: dict[str, list[Any]] = {name: [] for name in FEATURES}
    for index in range(count):
        state, action = rng.uniform(-1, 1, 8), rng.uniform(-1, 1, (8, 7))
        coarse = rng.integers(0, 256, (2, 16, 16, 3), np.uint8)  # photographs are smooth, noise is not
        frames = [Image.fromarray(image).resize((CAMERA_SIDE, CAMERA_SIDE)) for image in coarse]
        texts = join_integers(config.state_quantizer().encode(state)), config.action_tokenizer().encode(action)
        values = {
            "images": [_jpeg(frame) for frame in frames],
            "task": TASK,
            "state": texts[0],
            "action": texts[1],
            "prompt": prompt_messages(config, TASK, texts[0]),
            "completion": completion_messages(texts[1]),
            "episode_index": 0,
            "frame_index": index,
            "raw_state": state,
            "raw_action": action.ravel(),
        }
        for name, value in values.items():
            columns[name].append(value)
    return Dataset.from_dict(columns, features=FEATURES)


def _jpeg(frame: Image.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    frame.save(buffer, "JPEG", quality=95)
    return {"bytes": buffer.getvalue(), "path": None}


def make_collators(stock: ProcessorMixin, processor: ProcessorMixin, config: VLAConfig) -> dict[str, Callable]:
    """The contestants. Each takes rows as `datasets` gives them, and returns what it hands to the training device."""
    return {
        "trl": DataCollatorForVisionLanguageModeling(stock, completion_only_loss=True),
        "peer": lambda rows: peer_collator(rows, stock, config),
        "ours": VLADataCollator(processor, config, defer_images=True),
    }


def peer_collator(rows: list[dict[str, Any]], processor: ProcessorMixin, config: VLAConfig) -> dict[str, torch.Tensor]:
    """The usual way: each image cropped and jittered on its own, each row through chat template and processor."""
    augment = v2.Compose([v2.RandomCrop(round(0.9 * CAMERA_SIDE)), v2.ColorJitter(0.2, 0.2, 0.2, 0.05)])
    images = [[augment(image) for image in row["images"]] for row in rows]
    chats = [with_images(row["prompt"] + row["completion"], len(config.cameras)) for row in rows]
    texts = [processor.apply_chat_template(chat) for chat in chats]
    batch = processor(text=texts, images=images, padding=True, return_tensors="pt", add_special_tokens=False)
    labels = batch["input_ids"].clone()
    for label, row in zip(labels, rows, strict=True):
        prompt = processor.apply_chat_template(
            with_images(row["prompt"], len(config.cameras)), add_generation_prompt=True
        )
        length = len(processor(text=[prompt], images=[row["images"]], add_special_tokens=False)["input_ids"][0])
        label[:length] = -100
    labels[batch["attention_mask"] == 0] = -100
    return {**batch, "labels": labels}


def take_turns(contestants: dict[str, Callable[[], float]], turns: int) -> dict[str, float]:
    """The best figure of each, measured in alternation, so that a busy moment hits all alike."""
    best = dict.fromkeys(contestants, 0.0)
    for _ in range(turns):
        for name, measure in contestants.items():
            best[name] = max(best[name], measure())
    return best


def _collate_speed(collator: Callable, rows: Dataset, count: int) -> float:
    """Rows/s of one process, from the JPEG bytes in the dataset to the batch."""
    collator([rows[i] for i in range(8)])
    began = time.perf_counter()
    for start in range(0, count, 8):
        collator([rows[i] for i in range(start, min(start + 8, count))])
    return count / (time.perf_counter() - began)


def _bytes(batch: Any) -> int:
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(dict(batch)) if torch.is_tensor(leaf)]
    return sum(tensor.nbytes for tensor in tensors)


class _Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, *_, **__):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def _model(args: argparse.Namespace) -> torch.nn.Module:
    if args.model == NANO:
        return build_nano()[0]
    if args.random_weights:
        return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(args.model))
    return load_model(args.model)


def _trainer(name: str, args: argparse.Namespace, rows: Dataset, config: VLAConfig, folder: str) -> SFTTrainer:
    on_gpu = torch.cuda.is_available()
    options = {
        "output_dir": folder,
        "max_steps": args.steps + 2,
        "per_device_train_batch_size": args.batch_size,
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "gradient_checkpointing": name == "trl",
        "dataloader_num_workers": args.num_workers,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    shared = {"model": _model(args), "train_dataset": rows, "processing_class": _processor(args.model, config)}
    if name != "ours":
        return SFTTrainer(args=SFTConfig(**options), **shared)
    return VLATrainer(args=VLASFTConfig(**options), vla_config=config, stored_cameras=config.cameras, **shared)


def _train(name: str, args: argparse.Namespace, rows: Dataset, config: VLAConfig) -> float:
    """Optimizer steps/s, after two to warm up."""
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(name, args, rows, config, folder)
        trainer.add_callback(clock)
        trainer.train()
    return args.steps / (clock.ends[-1] - clock.ends[1])


def _profile(args: argparse.Namespace, rows: Dataset, config: VLAConfig) -> str:
    """What our steps spend their time on; the chrome trace goes to `--trace`."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer("ours", args, rows, config, folder)
        with profile(activities=activities) as profiler:
            trainer.train()
    profiler.export_chrome_trace(str(args.trace))
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=50)


def print_table(table: dict[str, dict[str, float]], ratios: dict[str, float]) -> None:
    columns = list(dict.fromkeys(column for figures in table.values() for column in figures))
    print(f"{'':10}" + "".join(f"{column:>15}" for column in columns))
    for name, figures in table.items():
        print(f"{name:10}" + "".join(f"{figures[c]:15.2f}" if c in figures else f"{'–':>15}" for c in columns))
    print("\n" + "  ".join(f"{name} {ratio:.1f}×" for name, ratio in ratios.items()))


if __name__ == "__main__":
    main()
