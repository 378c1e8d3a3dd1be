"""What a run reports about itself: its size, the time and memory that it will take, the energy that it took."""

import json
import math
import resource
import time
from pathlib import Path

import torch
from peft import PeftModel
from transformers import TrainerCallback
from transformers.trainer_pt_utils import get_model_param_count
from trl import SFTTrainer

from vla0_trl import pip_install
from vla0_trl.files import write_whole
from vla0_trl.processing.collator import VLADataCollator
from vla0_trl.run_files import read_energy
from vla0_trl.run_folder import ENERGY_FILE
from vla0_trl.training.settings import global_batch_size

# The first steps warm up caches, allocator and workers: they are not timed.
_TIMED_FROM, _TIMED_TO = 5, 20
_GIB = 2**30
_JOULES_PER_KWH = 3.6e6


def describe_run(trainer: SFTTrainer, collator: VLADataCollator) -> str:
    """What is about to be trained: one line each for model, sample, batch and duration.

    `collator` is without masking, so that all tokens of an answer count.
    """
    args, model, rows = trainer.args, trainer.model, len(trainer.train_dataset)
    chats = round(args.cotrain_fraction * global_batch_size(args)) if args.cotrain_dataset_name else 0
    if isinstance(model, PeftModel):
        trainable, total = model.get_nb_trainable_parameters()
    else:
        trainable, total = get_model_param_count(model, trainable_only=True), get_model_param_count(model)
    sample = collator([trainer.train_dataset[0]])
    tokens = sample["input_ids"].numel()
    of_images = int((sample["input_ids"] == collator.chat_tokenizer.image_token_id).sum())
    of_answer = int((sample["labels"] >= 0).sum())
    batch = global_batch_size(args)
    of_epochs = math.ceil(args.num_train_epochs * math.ceil(rows / (batch - chats)))
    steps = args.max_steps if args.max_steps > 0 else of_epochs
    lines = {
        "model": f"{model.name_or_path or type(model).__name__}, {total / 1e6:.1f} M parameters, "
        f"{trainable / 1e6:.1f} M of them trained ({trainable / total:.1%})",
        "sample": f"{tokens} tokens: {of_images} of images, {of_answer} of the answer",
        "batch": f"{batch} samples = {args.per_device_train_batch_size} at once × {args.gradient_accumulation_steps} "
        f"accumulated × {args.world_size} process{'es' if args.world_size > 1 else ''}"
        + (f", {chats} of them from {args.cotrain_dataset_name}" if chats else ""),
        "duration": f"{steps} steps = {steps * (batch - chats) / rows:.2f} epochs over {rows} samples",
    }
    return "\n".join(f"{name + ':':10}{text}" for name, text in lines.items())


class SpeedCallback(TrainerCallback):
    """After the first steps, says how long the run will take and how much memory it needs."""

    def __init__(self, trainer: SFTTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._first = state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        done = state.global_step - self._first
        if done == _TIMED_FROM:
            self._started = time.perf_counter()
        elif done == _TIMED_TO:
            seconds = (time.perf_counter() - self._started) / (_TIMED_TO - _TIMED_FROM)
            left = seconds * (state.max_steps - state.global_step)
            self.trainer.accelerator.print(
                f"speed:    {seconds:.3g} s per step, {global_batch_size(args) / seconds:.1f} samples/s; about "
                f"{_duration(left)} left\nmemory:   {_peak_memory(args.device)}"
            )


class EnergyCallback(TrainerCallback):
    """Measures the machine's energy with codecarbon, offline, into `output_dir/energy.json`.

    The file adds up all sessions of a run, those that were killed up to their last checkpoint.
    """

    def __init__(self, trainer: SFTTrainer):
        try:
            from codecarbon import OfflineEmissionsTracker
        except ImportError as error:
            raise ValueError(f"log_energy=True needs codecarbon: {pip_install('energy')}") from error
        self.trainer = trainer
        self._file = Path(trainer.args.output_dir, ENERGY_FILE)
        # The country only matters for CO2, which we do not report. One process per machine measures.
        self._tracker = trainer.accelerator.is_local_main_process and OfflineEmissionsTracker(
            country_iso_code="USA", save_to_file=False, log_level="error", allow_multiple_runs=True
        )

    def on_train_begin(self, args, state, control, **kwargs):
        before = read_energy(self._file.parent) or {"kwh": 0.0, "seconds": 0.0}
        self._kwh, self._seconds = before["kwh"], before["seconds"]
        self._begin()

    def on_save(self, args, state, control, **kwargs):
        self._write(args, state)
        self._begin()

    def on_train_end(self, args, state, control, **kwargs):
        self._write(args, state)
        if self._tracker:
            self._tracker.stop()

    def _begin(self) -> None:
        self._started = time.perf_counter()
        if self._tracker:
            self._tracker.start_task()

    def _write(self, args, state) -> None:
        spent = self._tracker.stop_task().energy_consumed if self._tracker else 0.0
        # All machines' together. In joules: float32, which some devices need, would lose small fractions of a kWh.
        joules = torch.tensor([spent * _JOULES_PER_KWH], dtype=torch.float32, device=args.device)
        self._kwh += self.trainer.accelerator.gather(joules).sum().item() / _JOULES_PER_KWH
        self._seconds += time.perf_counter() - self._started
        if args.should_save:
            samples = state.global_step * global_batch_size(args)
            report = {"kwh": self._kwh, "seconds": self._seconds, "steps": state.global_step, "samples": samples}
            write_whole(self._file, json.dumps(report | {"processes": args.world_size}, indent=2) + "\n")


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return f"at most {allocated / _GIB:.2f} GiB allocated, {reserved / _GIB:.2f} GiB reserved on a GPU"
    return f"at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB:.2f} GiB of main memory"
