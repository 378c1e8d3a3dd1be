"""What a policy's training does between its steps: the collator's epoch, stopping, rollouts in the simulator."""

from __future__ import annotations

import math
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainerControl
from trl import SFTTrainer

from vla0_trl.config import VLAConfig
from vla0_trl.policy import VLAPolicy
from vla0_trl.rollout import Environment, rollout

# Rollouts during training choose checkpoints, so final evaluations use other seeds (eval_pusht.py starts at 100000).
ROLLOUT_SEED = 50_000
INITIAL, BEST = "initial", "best"
_ASK_EVERY = 10  # steps


def log_beside_training(trainer: SFTTrainer, control: TrainerControl, metrics: dict[str, float]) -> None:
    """Log from `on_step_end`, without mixing with what training itself logs at this step, or taking its place."""
    log_training, training = control.should_log, trainer.model.training
    trainer.model.eval()  # by which TRL tells evaluation's metrics from training's
    try:
        trainer.log(metrics)
    finally:
        trainer.model.train(training)
        control.should_log = log_training  # which every log switches off


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


class RolloutCallback(TrainerCallback):
    """Every `rollout_steps`, lets the policy act in the simulator, and keeps the best one as `output_dir/best`.

    Args:
        trainer ([`training.VLATrainer`]): whose policy acts, and which logs `rollout/…`.
        make_env: builds one environment for a config.
        num_envs (`int`): environments side by side.
    """

    def __init__(self, trainer: SFTTrainer, make_env: Callable[[VLAConfig], Environment], num_envs: int = 16):
        self.trainer, self.make_env = trainer, make_env
        self.num_envs = min(num_envs, trainer.args.rollout_episodes)
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            raise ValueError("rollout_steps needs the whole model in one process: evaluate sharded runs with eval/")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.rollout_steps:
            return
        score = self._evaluate() if state.is_world_process_zero else (0.0, 0.0)
        names = ("rollout/success_rate", "rollout/mean_max_coverage")
        scores = self.trainer.accelerator.gather(torch.tensor([score], device=args.device))[0].tolist()
        log_beside_training(self.trainer, control, dict(zip(names, scores, strict=True)))
        earlier = [tuple(entry[name] for name in names) for entry in state.log_history[:-1] if names[0] in entry]
        if tuple(scores) > max(earlier, default=(-1.0, -1.0)):
            self._keep(Path(args.output_dir))

    def _evaluate(self) -> tuple[float, float]:
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model).eval()
        policy = VLAPolicy(model, trainer.processing_class, trainer.vla_config)
        envs = [self.make_env(trainer.vla_config) for _ in range(self.num_envs)]
        seeds = range(ROLLOUT_SEED, ROLLOUT_SEED + trainer.args.rollout_episodes)
        try:
            results = [episode.result for episode in rollout(policy, envs, seeds)]
        finally:
            for env in envs:
                env.close()
            model.train()
        return tuple(sum(float(r[key]) for r in results) / len(results) for key in ("success", "max_coverage"))

    def _keep(self, output_dir: Path) -> None:
        """Replace `best` in one step, so that a kill leaves the old one or the new one."""
        fresh, best, old = (output_dir / f"{BEST}{suffix}" for suffix in (".partial", "", ".old"))
        if self.trainer.args.should_save:
            shutil.rmtree(fresh, ignore_errors=True)  # half written when an earlier session was killed
        self.trainer.save_policy(fresh)
        if self.trainer.args.should_save:
            if best.exists():
                best.rename(old)
            fresh.rename(best)
            shutil.rmtree(old, ignore_errors=True)
