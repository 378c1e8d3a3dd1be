"""The trainer: TRL's, with images that stay uint8 until they are on the device, and the callbacks of a policy."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import SFTTrainer

from vla0_trl.arguments import VLASFTConfig
from vla0_trl.collator import Row, VLADataCollator
from vla0_trl.config import CONFIG_NAME, VLAConfig
from vla0_trl.images import model_inputs
from vla0_trl.modeling import cast_image_features, is_adapter, save_base_fingerprint
from vla0_trl.policy import VLAPolicy
from vla0_trl.rollout import Environment, rollout
from vla0_trl.run_report import EnergyCallback, SpeedCallback

# Rollouts during training choose checkpoints, so final evaluations use other seeds (eval_pusht.py starts at 100000).
ROLLOUT_SEED = 50_000
INITIAL, BEST = "initial", "best"
_ROWS = "row_indices"


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
        cast_image_features(model)
        shared = {"seed": args.seed, "defer_images": True, "stored_cameras": stored_cameras}
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
        self.add_callback(_PolicyCallback(self))
        self.add_callback(SpeedCallback(self))
        if args.log_energy:
            self.add_callback(EnergyCallback(self))

    def train(self, *args, **kwargs):
        """As `Trainer.train`; the first Ctrl-C ends it after the current step, with a checkpoint."""

        def interrupt(*_):
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            print("\nsaving after this step; Ctrl-C again to stop without", flush=True)

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
        inputs = super()._prepare_inputs(inputs)
        if "images" in inputs:
            pixels = inputs.pop("images")
            inputs |= model_inputs(self.processing_class.image_processor, config=self.vla_config, **pixels)
        return inputs

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
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
            with self._marked_whole(Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")):
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


class _PolicyCallback(TrainerCallback):
    """Turns the collator's epoch, saves the untrained policy, and stops at the wanted accuracy or at Ctrl-C."""

    def __init__(self, trainer: VLATrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        # Here, because sharded models can only be saved once the engine has wrapped them.
        if args.save_initial and state.global_step == 0:
            self.trainer.save_policy(Path(args.output_dir, INITIAL))

    def on_step_end(self, args, state, control, **kwargs):
        # Together: a Ctrl-C reaches processes in different steps, and saving needs all of them in one.
        interrupted = torch.tensor(float(self.trainer.interrupted), device=args.device)
        if self.trainer.accelerator.reduce(interrupted, "sum") > 0:
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
        trainer ([`VLATrainer`]): whose policy acts, and which logs `rollout/…`.
        make_env: builds one environment for a config.
        num_envs (`int`): environments side by side.
    """

    def __init__(self, trainer: VLATrainer, make_env: Callable[[VLAConfig], Environment], num_envs: int = 16):
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
        self.trainer.log(dict(zip(names, scores, strict=True)))
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
        self.trainer.save_policy(fresh)
        if self.trainer.args.should_save:
            if best.exists():
                best.rename(old)
            fresh.rename(best)
            shutil.rmtree(old, ignore_errors=True)


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest whole checkpoint-N of a run: one that a kill left half written has no vla_config.json."""
    whole = [path.parent for path in output_dir.glob(f"checkpoint-*/{CONFIG_NAME}")]
    return max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)
