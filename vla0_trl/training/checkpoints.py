"""Checkpoints that are whole: what a kill leaves half written is never taken for a policy."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import SFTTrainer

from vla0_trl.config import CONFIG_NAME, VLAConfig
from vla0_trl.models.fingerprint import is_adapter, save_base_fingerprint


class CheckpointingTrainer(SFTTrainer):
    """`SFTTrainer` that saves `vla_config` with every checkpoint, as the last file: if it exists, all of it does."""

    vla_config: VLAConfig

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
