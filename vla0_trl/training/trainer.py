"""The trainer: TRL's, with our collator, and images that stay uint8 until they are on the device."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, ProcessorMixin, TrainerControl

from vla0_trl.config import VLAConfig
from vla0_trl.data.chat_dataset import tasks_of
from vla0_trl.data.chat_rows import ChatRows
from vla0_trl.data.vision_chat import VisionChats
from vla0_trl.internals import disagreement, warn_fallback
from vla0_trl.models.attention import TrainingForward
from vla0_trl.processing.branches import visible
from vla0_trl.processing.collator import VLADataCollator
from vla0_trl.processing.images import model_inputs
from vla0_trl.stopping import on_first_signal
from vla0_trl.training.arguments import VLASFTConfig
from vla0_trl.training.callbacks import PolicyCallback
from vla0_trl.training.checkpoints import CheckpointingTrainer
from vla0_trl.training.cotrain import MixedOrder, MixedRows, losses_apart
from vla0_trl.training.growing_rows import GrowingRows
from vla0_trl.training.muon import MUON, build_muon
from vla0_trl.training.observation_gap import ProbeCallback
from vla0_trl.training.progress import EnergyCallback, SpeedCallback
from vla0_trl.training.pushing import Uploads
from vla0_trl.training.row_trace import RowTrace, TracedCollator
from vla0_trl.training.settings import global_batch_size

MASKING = ("mask_max", "mask_skip", "mask_full", "mask_branches", "mask_labels", "mask_unit")
LOSSES = ("action_loss", "cotrain_loss")
DAGGER = "dagger"  # in the run's folder: what the policy visited while it learnt


class VLATrainer(CheckpointingTrainer):
    """`SFTTrainer` on chat datasets.

    With `cotrain_dataset_name`, the losses of both kinds of rows are logged, too, as `action_loss` and `cotrain_loss`:
    each the mean over its tokens, as `loss`, which is minimized, is over all of them.

    Args:
        vla_config ([`VLAConfig`]): how rows become text and images; saved with every checkpoint.
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
        self.chats = VisionChats(args.cotrain_dataset_name) if args.cotrain_dataset_name else None
        self.mixed_order: MixedOrder | None = None
        self.trained_on: dict[str, Any] = {}
        self.uploads = Uploads(args)
        self.vla_config, self.stop_signal, self._trace = vla_config, 0, RowTrace()  # the signal's number
        self.forward = TrainingForward(model, args.torch_compile)
        if args.mask_branches:
            attend_to_branches(self.forward)
        # Compiled steps want batches of one length, and tensor cores a multiple of 8.
        tasks = tasks_of(train_dataset, eval_dataset) if args.torch_compile else ()
        multiple = args.pad_to_multiple_of or (8 if args.torch_compile else None)
        shared = {"seed": args.seed, "defer_images": True, "stored_cameras": stored_cameras}
        shared |= {"static_tasks": tasks, "pad_to_multiple_of": multiple}
        masking = {name: getattr(args, name) for name in MASKING}
        self.eval_collator = VLADataCollator(processing_class, vla_config, train=False, **shared)
        super().__init__(
            model=model,
            args=args,
            data_collator=TracedCollator(processing_class, vla_config, **masking, **shared),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
        )
        if self.chats is not None:
            max_tokens = self.model.config.get_text_config().max_position_embeddings
            self.chats.check(self.eval_collator.chat_tokenizer, max_tokens)
        optional = [(EnergyCallback, args.log_energy), (ProbeCallback, args.probe_steps)]
        for callback, wanted in [(PolicyCallback, True), (SpeedCallback, True), *optional]:
            if wanted:
                self.add_callback(callback(self))
        if args.dagger_steps:
            folder = Path(args.output_dir, DAGGER)
            self.growing_rows = GrowingRows(
                self.train_dataset, args.dagger_fraction, args.seed, folder, args.gradient_accumulation_steps
            )

    def train(self, *args, **kwargs):
        """As `Trainer.train`; the first Ctrl-C ends it after the current step, with a checkpoint."""

        def stop(number: int) -> None:
            self.stop_signal = number  # for [`PolicyCallback`]
            print("\nsaving soon; a second signal stops without", flush=True)

        with on_first_signal(stop):
            return super().train(*args, **kwargs)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """As `Trainer.create_optimizer`; Muon is not among its own."""
        if self.args.optim != MUON or self.optimizer is not None:
            return super().create_optimizer(model)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError("optim=muon needs whole matrices: train in processes that do not shard the model")
        args = self.args
        self.optimizer = build_muon(
            self.model if model is None else model,
            args.learning_rate,
            args.muon_adamw_learning_rate or args.learning_rate,
            weight_decay=args.weight_decay,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
        )
        return self.optimizer

    def log_beside_training(self, control: TrainerControl, metrics: dict[str, float]) -> None:
        """Log from `on_step_end`, without mixing with what training itself logs at this step, or taking its place."""
        log_training, training = control.should_log, self.model.training
        self.model.eval()  # by which TRL tells evaluation's metrics from training's
        try:
            self.log(metrics)
        finally:
            self.model.train(training)
            control.should_log = log_training  # which every log switches off

    def get_train_dataloader(self) -> DataLoader:
        dataset = self.train_dataset
        self.train_dataset = ChatRows(dataset, keep=self.args.rows_in_memory)
        if self.args.dagger_steps:
            self.growing_rows.dataset = self.train_dataset
            self.train_dataset = self.growing_rows
        if self.chats is not None:
            self.train_dataset = MixedRows(self.train_dataset, self.chats)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = dataset

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        if self.chats is None:
            return super()._get_train_sampler(train_dataset)
        args, size = self.args, global_batch_size(self.args)
        counts = (len(train_dataset) - len(self.chats), len(self.chats), size, round(args.cotrain_fraction * size))
        seed = args.seed if args.data_seed is None else args.data_seed
        self.mixed_order = MixedOrder(*counts, seed, shuffle=args.train_sampling_strategy == "random")
        return self.mixed_order

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        train_collator, self.data_collator = self.data_collator, self.eval_collator
        try:
            rows = self.eval_dataset if eval_dataset is None else eval_dataset
            return super().get_eval_dataloader(ChatRows(rows, keep=False))
        finally:
            self.data_collator = train_collator

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self._trace.take(inputs)
        return self.prepare_batch(inputs)

    def prepare_batch(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What a collator gave, on the device, with images as the model takes them."""
        inputs = super()._prepare_inputs(inputs)
        if "images" in inputs:
            pixels = inputs.pop("images")
            inputs |= model_inputs(self.processing_class.image_processor, config=self.vla_config, **pixels)
        return inputs

    def check_forward(self, model: torch.nn.Module, inputs: dict[str, Any]) -> None:
        """Compare our forward pass with the stock one on a batch; all processes switch together, and one says so.

        It costs two forward passes of the first batch of a run, and changes no number of it.
        """
        arguments = inputs | {"use_cache": False, "fused_lm_head": True}
        autocast = self.accelerator.mixed_precision != "no"

        def log_probs() -> torch.Tensor:
            with self.forward.scored():
                return model(**arguments).log_probs

        failure = self.forward.difference(log_probs, autocast)
        failures = self.accelerator.reduce(torch.tensor(float(failure is not None), device=self.args.device), "sum")
        if failures.item():
            self.forward.use_stock()
            if self.accelerator.is_main_process:
                found = failure or "failed in another process"
                packages = ("transformers", "trl", "torch")
                message = disagreement("fast training", self.accelerator.unwrap_model(model), found, packages)
                warn_fallback(message, "transformers' forward pass")

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args, **kwargs):
        if not self.model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        if not self.forward.checked:
            self.check_forward(model, inputs)
        outputs = None

        def forward(**arguments):
            nonlocal outputs
            with self.forward.scored():
                outputs = model(**arguments)
            return outputs

        loss = super().compute_loss(forward, inputs, *args, **kwargs)
        # Here, where TRL's metrics have just waited for the device: behind the backward pass it would wait again.
        self._trace.check(loss, self.state, self.args)
        if self.chats is not None:
            sums = losses_apart(outputs.log_probs, outputs.label_mask, self._trace.rows[:, 0])
            for name, (total, count) in zip(LOSSES, self.accelerator.reduce(sums, "sum").tolist(), strict=True):
                if count:
                    self._metrics["train"][name].append(total / count)
        return loss


def attend_to_branches(forward: TrainingForward) -> None:
    """Give batches with branches, see [`VLADataCollator`], their attention mask when they reach the model.

    `ValueError` if its attention takes no such mask.
    """
    if not forward.sdpa:
        raise ValueError("mask_branches needs attention that takes any mask: set attn_implementation=sdpa")
    forward.model.base_model.register_forward_pre_hook(_mask_branches, with_kwargs=True)


def _mask_branches(backbone: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """`branches` (B, L, 2) and `attention_mask` (B, L) -> `attention_mask` (B, 1, L, L), bool."""
    branches = kwargs.pop("branches", None)
    if branches is not None:
        places = torch.arange(branches.shape[1], device=branches.device)
        seen = visible(places, places[None], *branches.unbind(-1), kwargs["attention_mask"].bool())
        kwargs["attention_mask"] = seen[:, None]
    return args, kwargs
