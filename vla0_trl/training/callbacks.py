"""What a policy's training does between its steps: the epoch, and stopping."""

import math
from pathlib import Path

import torch
from transformers import TrainerCallback
from trl import SFTTrainer

INITIAL = "initial"
_ASK_EVERY = 10  # steps


class PolicyCallback(TrainerCallback):
    """Sets the epoch, saves the untrained policy, and stops at the wanted accuracy or at a signal."""

    def __init__(self, trainer: SFTTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        # Here, because sharded models can only be saved once the engine has wrapped them.
        if args.save_initial and state.global_step == 0:
            self.trainer.save_policy(Path(args.output_dir, INITIAL))

    def on_step_end(self, args, state, control, **kwargs):
        number = self.trainer.stop_signal
        if args.world_size > 1:
            # Together: a signal reaches processes in different steps, or only one of them, and saving needs all of
            # them in one. Not at every step, because the answer makes the host wait for the device.
            if state.global_step % _ASK_EVERY:
                return
            number = int(self.trainer.accelerator.gather(torch.tensor([number], device=args.device)).max())
        if number:
            self.trainer.stop_signal = number
            control.should_save = control.should_training_stop = True

    def on_epoch_begin(self, args, state, control, **kwargs):
        # Before the first step of a run `epoch` is None or 0; after a resume it is a fraction. Rounded: n/n is not 1.
        epoch = math.floor(round(state.epoch or 0, 6))
        self.trainer.data_collator.set_epoch(epoch)
        if self.trainer.mixed_order is not None:
            self.trainer.mixed_order.epoch = epoch

    def on_log(self, args, state, control, logs=None, **kwargs):
        threshold = args.stop_at_token_accuracy
        if threshold is not None and (logs or {}).get("mean_token_accuracy", 0) >= threshold:
            control.should_training_stop = control.should_save = True
