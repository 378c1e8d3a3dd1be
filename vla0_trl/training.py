"""The trainer: TRL's, with images that stay uint8 until they are on the device, and checkpoints that are whole."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProcessorMixin
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import SFTTrainer

from vla0_trl.arguments import VLASFTConfig
from vla0_trl.callbacks import PolicyCallback
from vla0_trl.collator import Row, VLADataCollator
from vla0_trl.config import CONFIG_NAME, VLAConfig
from vla0_trl.images import model_inputs
from vla0_trl.modeling import is_adapter, prepare_for_training, save_base_fingerprint
from vla0_trl.probes import ProbeCallback
from vla0_trl.run_report import EnergyCallback, SpeedCallback

_ROWS = "row_indices"
_STATIC_MULTIPLE = 64  # tokens: compiled steps have one length for all tasks of about the same length


class NotFiniteError(RuntimeError):
    """The loss became NaN or infinite: the weights are lost, and what comes after would be, too."""


class VLATrainer(SFTTrainer):
    """`SFTTrainer` on chat datasets.

    Args:
        vla_config ([`VLAConfig`]): saved with every checkpoint, as the last file: its existence means that the
            checkpoint is whole.
        stored_cameras (`list[str]`): the dataset's cameras, of which the config may take a part.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: VLASFTConfig,
        vla_config: VLAConfig,
        processing_class: ProcessorMixin,
        train_dataset: Dataset,
        stored_cameras: list[str],
        eval_dataset: Dataset | None = None,
        peft_config: PeftConfig | None = None,
    ):
        self.vla_config = vla_config
        self.interrupted = False
        prepare_for_training(model)
        shared = {"seed": args.seed, "defer_images": True, "stored_cameras": stored_cameras}
        shared["pad_to_multiple_of"] = args.pad_to_multiple_of or (_STATIC_MULTIPLE if args.torch_compile else None)
        self.eval_collator = VLADataCollator(processing_class, vla_config, train=False, **shared)
        super().__init__(
            model=model,
            args=args,
            data_collator=_TracedCollator(
                processing_class, vla_config, args.mask_max, args.mask_skip, mask_unit=args.mask_unit, **shared
            ),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
        )
        self._rows = self._previous_rows = None
        self.add_callback(PolicyCallback(self))
        self.add_callback(SpeedCallback(self))
        if args.log_energy:
            self.add_callback(EnergyCallback(self))
        if args.probe_steps:
            self.add_callback(ProbeCallback(self))

    def train(self, *args, **kwargs):
        """As `Trainer.train`; the first Ctrl-C ends it after the current step, with a checkpoint."""

        def interrupt(*_):
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            print("\nsaving soon; Ctrl-C again to stop without", flush=True)

        previous = signal.signal(signal.SIGINT, interrupt)
        try:
            return super().train(*args, **kwargs)
        finally:
            signal.signal(signal.SIGINT, previous)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        train_collator, self.data_collator = self.data_collator, self.eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = train_collator

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self._previous_rows, self._rows = self._rows, inputs.pop(_ROWS, None)
        return self.prepare_batch(inputs)

    def prepare_batch(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What a collator gave, on the device, with images as the model takes them."""
        inputs = super()._prepare_inputs(inputs)
        if "images" in inputs:
            pixels = inputs.pop("images")
            inputs |= model_inputs(self.processing_class.image_processor, config=self.vla_config, **pixels)
        return inputs

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        # Here, where TRL's metrics have just waited for the device: behind the backward pass it would wait once more.
        if self.model.training and not torch.isfinite(loss):
            raise NotFiniteError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}; the batch's rows are in "
                f"{self._save_rows()}: look at them, lower learning_rate, or set max_grad_norm"
            )
        return loss

    def _save_rows(self) -> Path:
        """Which rows this process saw last: the batch itself may be at fault, or the update by the one before."""
        step, rank = self.state.global_step + 1, self.args.process_index
        rows = {"step": step, "epoch": self.state.epoch, "columns": ["episode_index", "frame_index"]}
        rows |= {
            name: r if r is None else r.tolist() for name, r in (("rows", self._rows), ("before", self._previous_rows))
        }
        file = Path(self.args.output_dir, f"not_finite_step{step}_process{rank}.json")
        file.write_text(json.dumps(rows, indent=2) + "\n")
        return file

    def save_policy(self, directory: Path) -> None:
        """Save a self-sufficient checkpoint; all processes call it."""
        with self._marked_whole(directory):
            self.save_model(str(directory))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        # Old checkpoints may only go once the new one is whole, or a kill in between would leave none.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            checkpoint = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            if self.args.should_save and checkpoint.exists() and not (checkpoint / CONFIG_NAME).exists():
                shutil.rmtree(checkpoint)  # half written when an earlier session was killed
            self.accelerator.wait_for_everyone()
            with self._marked_whole(checkpoint):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(self.args.output_dir, limit, self.state.best_model_checkpoint, use_mtime=True)

    @contextmanager
    def _marked_whole(self, directory: Path) -> Iterator[None]:
        """`vla_config.json` is gone while a checkpoint is written, and back once all processes have written theirs."""
        if self.args.should_save:
            (directory / CONFIG_NAME).unlink(missing_ok=True)
        yield
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if is_adapter(directory):
                save_base_fingerprint(directory)
            self.vla_config.save_pretrained(directory)


class _TracedCollator(VLADataCollator):
    """Says which rows a batch is made of: (B, 2), episode and frame."""

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        indices = [[row["episode_index"], row["frame_index"]] for row in rows]
        return super().__call__(rows) | {_ROWS: torch.tensor(indices)}


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest whole checkpoint-N of a run: one that a kill left half written has no vla_config.json."""
    whole = [path.parent for path in output_dir.glob(f"checkpoint-*/{CONFIG_NAME}")]
    return max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)
