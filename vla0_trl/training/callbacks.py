"""What a policy's training does between its steps: the collator's epoch, and stopping."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import TrainerCallback
from trl import SFTTrainer

INITIAL = "initial"
_ASK_EVERY = 10  # steps


@contextmanager
def finish_on_interrupt(trainer: SFTTrainer) -> Iterator[None]:
    """The first Ctrl-C sets `trainer.interrupted`, for [`PolicyCallback`] to act on; a second one is as ever."""

    def interrupt(*_):
        if trainer.interrupted:
            raise KeyboardInterrupt
        trainer.interrupted = True
        print("\nsaving soon; Ctrl-C again to stop without", flush=True)

    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


class PolicyCallback(TrainerCallback):
    """Turns the collator's epoch, saves the untrained policy, and stops at the wanted accuracy or at Ctrl-C."""

    def __init__(self, trainer: SFTTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        # Here, because sharded models can only be saved once the engine has wrapped them.
        if args.save_initial and state.global_step == 0:
            self.trainer.save_policy(Path(args.output_dir, INITIAL))

    def on_step_end(self, args, state, control, **kwargs):
        interrupted = self.trainer.interrupted
        if args.world_size > 1:
            # Together: a Ctrl-C reaches processes in different steps, and saving needs all of them in one. Not at
            # every step, because the answer makes the host wait for the device.
            if state.global_step % _ASK_EVERY:
                return
            interrupted = torch.tensor(float(interrupted), device=args.device)
            interrupted = self.trainer.accelerator.reduce(interrupted, "sum").item() > 0
        if interrupted:
            self.trainer.interrupted = control.should_save = control.should_training_stop = True

    def on_epoch_begin(self, args, state, control, **kwargs):
        # Before the first step of a run `epoch` is None or 0; after a resume it is a fraction. Rounded: n/n is not 1.
        self.trainer.data_collator.set_epoch(math.floor(round(state.epoch or 0, 6)))

    def on_log(self, args, state, control, logs=None, **kwargs):
        threshold = args.stop_at_token_accuracy
        if threshold is not None and (logs or {}).get("mean_token_accuracy", 0) >= threshold:
            control.should_training_stop = control.should_save = True
