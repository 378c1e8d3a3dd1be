"""Training's collator: it says which rows a batch is made of, so that a loss that is NaN or infinite names them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import get_worker_info
from transformers import TrainerState, TrainingArguments

from vla0_trl.processing.collator import Row, VLADataCollator
from vla0_trl.stopping import leave_signals_to_parent

_ROWS = "row_indices"


class NotFiniteError(RuntimeError):
    """The loss became NaN or infinite: the weights are lost, and what comes after would be, too."""


class TracedCollator(VLADataCollator):
    """The collator of training: a batch, and which rows it is made of: (B, 2), episode and frame."""

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        if get_worker_info() is not None:
            leave_signals_to_parent()
        indices = [[row["episode_index"], row["frame_index"]] for row in rows]
        return super().__call__(rows) | {_ROWS: torch.tensor(indices)}


class RowTrace:
    """The rows that this process saw last: the batch itself may be at fault, or the update by the one before."""

    def __init__(self):
        self.rows = self._before = None  # (B, 2) each

    def take(self, inputs: dict[str, Any]) -> None:
        """Remove from a batch what [`TracedCollator`] put there."""
        self._before, self.rows = self.rows, inputs.pop(_ROWS, None)

    def check(self, loss: torch.Tensor, state: TrainerState, args: TrainingArguments) -> None:
        """Raise `NotFiniteError`, with the rows in a file of `output_dir`, unless the loss is finite."""
        if torch.isfinite(loss):
            return
        step = state.global_step + 1
        rows = {"step": step, "epoch": state.epoch, "columns": ["episode_index", "frame_index"]}
        rows |= {k: v if v is None else v.tolist() for k, v in (("rows", self.rows), ("before", self._before))}
        file = Path(args.output_dir, f"not_finite_step{step}_process{args.process_index}.json")
        file.write_text(json.dumps(rows, indent=2) + "\n")
        raise NotFiniteError(
            f"the loss is {loss.item()} at step {step}; the batch's rows are in {file}: look at them, lower "
            "learning_rate, or set max_grad_norm"
        )
