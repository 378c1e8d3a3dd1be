"""Supervised fine-tuning, from parsed arguments to a saved policy: what all recipes/sft_*.py share."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import ModelConfig, get_peft_config, get_quantization_config

from vla0_trl.config import NANO, VLAConfig
from vla0_trl.data.chat_dataset import align_config, episode_indices, load_chat_dataset, tasks_of
from vla0_trl.data.row_check import check_rows, check_tasks
from vla0_trl.limits import check_limits
from vla0_trl.models.adapters import check_named_modules, check_tied_targets
from vla0_trl.models.fingerprint import base_model_of, is_adapter
from vla0_trl.models.loading import (
    IMAGE_ENCODER,
    freeze_vision,
    load_model,
    load_processor,
    local_adapter,
    set_image_size,
)
from vla0_trl.models.nano import build_nano, nano_from_dict
from vla0_trl.models.weights import sound
from vla0_trl.processing.chat import prompt_messages
from vla0_trl.processing.images import ImageError
from vla0_trl.run_folder import FolderError, RunFolder
from vla0_trl.schema import one_line
from vla0_trl.stopping import Stopped
from vla0_trl.training.arguments import DataArguments, VLASFTConfig, parse_recipe
from vla0_trl.training.checkpoints import finish_from_checkpoint, is_finished, resume_point
from vla0_trl.training.claim import BASE_MODEL, begin_run, episodes_trained_on, hold_run, run_identity
from vla0_trl.training.progress import describe_run
from vla0_trl.training.pushing import open_model_repository, push_finished
from vla0_trl.training.row_trace import NotFiniteError
from vla0_trl.training.settings import check_together
from vla0_trl.training.trainer import VLATrainer


class SetupError(ValueError):
    """A trainer can't be built from these settings; the message says what to change."""


@dataclass
class Run:
    """A run that may begin: arguments that fit the dataset, and an output folder that nobody else has."""

    data: DataArguments
    training: VLASFTConfig
    model_args: ModelConfig
    dataset: Dataset
    stored_cameras: list[str]
    config: VLAConfig
    identity: dict[str, Any]
    folder: RunFolder | None  # held by one process of all
    begun: bool = False

    def begin(self) -> None:
        """Make the folder this run's; all processes call it, before anything is written there."""
        with self.training.main_process_first(local=False, desc="claiming the output folder"):
            if self.folder is not None and not self.begun:
                begin_run(self.folder, self.identity, self.training.overwrite)
        self.begun = True


SimulatorCallbacks = Callable[[VLATrainer], list[TrainerCallback]]


def main(default_config: Path, description: str, in_simulator: SimulatorCallbacks | None = None) -> None:
    """A recipe's command line; an error that a user can fix is one line, without a traceback.

    Args:
        in_simulator: makes the callbacks that run episodes during training, for `rollout_steps` and `dagger_steps`.
    """
    try:
        run = prepare(*parse_recipe(default_config, description))
        wanted = [name for name in ("rollout_steps", "dagger_steps") if getattr(run.training, name)]
        if wanted and in_simulator is None:
            raise ValueError(f"{wanted[0]} is set, but this recipe has no simulator: set {wanted[0]}=0")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    try:
        train(run, in_simulator)
    except BrokenPipeError:  # see `streams`
        raise
    except (NotFiniteError, SetupError, FolderError, ImageError, OSError) as error:
        sys.exit(f"error: {error}")
    except Stopped as stopped:
        sys.exit(stopped.status)


def prepare(data: DataArguments, training: VLASFTConfig, model_args: ModelConfig) -> Run:
    """Read the dataset, fit its config to the recipe's changes, and hold the output folder; nothing is written yet.

    Raises:
        ValueError: the dataset can't give what the recipe asks for, or the folder belongs to another run.
        FileNotFoundError: there is no such dataset.
        HubError: `push_to_hub` is set, and the repository can't be written to.
    """
    check_limits(vars(data) | vars(training) | vars(model_args))
    check_together(data, training, model_args)
    dataset, stored = load_chat_dataset(data.dataset_name, revision=data.dataset_revision)
    check_rows(data.dataset_name, dataset, stored)
    config = align_config(dataset, stored, **data.overrides())
    config.base_model = model_args.model_name_or_path
    identity, folder = run_identity(data, training, model_args, config), None
    # One process of all machines: their output_dir is on storage that they share.
    with training.main_process_first(local=False, desc="holding the output folder"):
        if training.should_save:
            if training.push_to_hub:
                name, use_peft = model_args.model_name_or_path, model_args.use_peft
                training.hub_model_id = open_model_repository(training, name, use_peft)
            folder = hold_run(identity, training.output_dir, training.overwrite)
    return Run(data, training, model_args, dataset, stored.cameras, config, identity, folder)


def train(run: Run, in_simulator: SimulatorCallbacks | None = None) -> None:
    """Fine-tune and save the policy in `output_dir`, from the last whole checkpoint if there is one.

    [`Stopped`] after Ctrl-C or SIGTERM, when there is a checkpoint to go on from.
    """
    try:
        _train(run, in_simulator)
    finally:
        if run.folder is not None:
            run.folder.close()


def _train(run: Run, in_simulator: SimulatorCallbacks | None) -> None:
    training, output_dir = run.training, Path(run.training.output_dir)
    if is_finished(training) and not training.overwrite:
        print(f"already trained: {output_dir} (--overwrite to start again, a larger --max_steps to go on)")
        return push_finished(training)
    if not training.overwrite and finish_from_checkpoint(training):
        print(f"policy saved in {output_dir}: its last step was done already")
        return push_finished(training)
    try:
        trainer = build_trainer(run, in_simulator)
    except (ValueError, OSError, ImportError) as error:  # of settings, files and packages that are not there
        raise SetupError(one_line(error, 2000)) from error
    say = trainer.accelerator.print
    say(describe_run(trainer, trainer.eval_collator))
    run.begin()
    resume = resume_point(output_dir, training.resume_from_checkpoint, say)
    if resume:
        say(f"continuing from {resume}")
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if trainer.stop_signal:
        say(f"stopped at step {trainer.state.global_step}; the same command goes on from there")
        raise Stopped(trainer.stop_signal)
    trainer.save_policy(output_dir, with_state=True)
    say(f"policy saved in {output_dir}")
    push_finished(training)


def build_trainer(run: Run, in_simulator: SimulatorCallbacks | None = None) -> VLATrainer:
    """Backbone, processor and trainer of a run, as its arguments say."""
    train_set, eval_set = hold_out(run.dataset, run.data.num_eval_episodes)
    messages = [message for task in tasks_of(run.dataset) for message in prompt_messages(run.config, task)]
    prompts = [message["content"] for message in messages]
    name = local_adapter(run.model_args.model_name_or_path, run.model_args.model_revision)
    model_args = replace(run.model_args, model_name_or_path=name)
    model, processor = load_backbone(model_args, run.training, run.config, prompts, run.begin)
    trainer = VLATrainer(
        model=model,
        args=run.training,
        vla_config=run.config,
        processing_class=processor,
        train_dataset=train_set,
        eval_dataset=eval_set,
        stored_cameras=run.stored_cameras,
        peft_config=lora_config(model_args, run.training),
    )
    max_tokens = trainer.model.config.get_text_config().max_position_embeddings
    check_tasks(run.data.dataset_name, run.dataset, trainer.eval_collator, max_tokens)
    if isinstance(trainer.model, PeftModel):
        check_named_modules(trainer.model)
        check_tied_targets(trainer.model)
    episodes = np.unique(episode_indices(train_set)).tolist()
    trainer.trained_on = episodes_trained_on(run.data.dataset_name, episodes, run.data.dataset_revision)
    for callback in in_simulator(trainer) if in_simulator else ():
        trainer.add_callback(callback)
    return trainer


def hold_out(dataset: Dataset, num_eval_episodes: int) -> tuple[Dataset, Dataset | None]:
    """Split off the last episodes; the rest is for training."""
    if not num_eval_episodes:
        return dataset, None
    episodes = episode_indices(dataset)
    known = np.unique(episodes)
    if num_eval_episodes >= len(known):
        raise ValueError(f"num_eval_episodes={num_eval_episodes}, but the dataset has {len(known)} episodes")
    held_out = np.isin(episodes, known[-num_eval_episodes:])
    return dataset.select(np.flatnonzero(~held_out)), dataset.select(np.flatnonzero(held_out))


def load_backbone(
    model_args: ModelConfig,
    training: VLASFTConfig,
    config: VLAConfig,
    prompts: Sequence[str] = (),
    begin: Callable[[], None] = lambda: None,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model to train and its processor, as `model_name_or_path` names it; `nano` is built on the spot.

    Args:
        prompts: texts whose words may get tokens of their own in a nano backbone.
        begin: called before anything is written into `output_dir`.
    """
    name, revision = model_args.model_name_or_path, model_args.model_revision
    if name == NANO:
        with _built_whole(training):
            nano = nano_from_dict(training.nano)
            model, processor = build_nano(nano, training.seed, config.num_bins, prompts)
            if model_args.dtype != "auto":  # as it is built
                model = model.to(getattr(torch, model_args.dtype))
            if model_args.attn_implementation is not None:
                model.set_attn_implementation(model_args.attn_implementation)
        set_image_size(processor, model.config, config)
        if not model_args.use_peft:
            if training.freeze_vision:
                freeze_vision(model)
            return model, processor
        # An adapter names its base model, so that must exist somewhere: beside the run.
        name, revision = str((Path(training.output_dir) / BASE_MODEL).resolve()), None
        config.base_model = name
        begin()
        with training.main_process_first(local=False, desc="saving the nano backbone"):
            if training.should_save:
                model.save_pretrained(name)
                processor.save_pretrained(name)
    if is_adapter(name):
        config.base_model = base_model_of(name)
    elif model_args.use_peft and Path(name).is_dir():
        name = config.base_model = str(Path(name).resolve())  # its adapter is loaded from any directory
    model = load_model(
        name,
        revision=revision,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        quantization_config=get_quantization_config(model_args),
        trainable=True,
    )
    if training.freeze_vision:
        freeze_vision(model)
    return model, load_processor(name, config, revision)


@contextmanager
def _built_whole(training: VLASFTConfig) -> Iterator[None]:
    """ZeRO-3 shards every model as it is constructed, before random weights are there; this one is sharded later."""
    unset_hf_deepspeed_config()
    yield
    if training.deepspeed_plugin is not None:
        training.deepspeed_plugin.set_deepspeed_weakref()


def lora_config(model_args: ModelConfig, training: VLASFTConfig) -> PeftConfig | None:
    """PEFT's config for `use_peft`, with a frozen image encoder left out; None for a model that is an adapter already.

    Without `lora_target_modules`, it is on all linear layers of language model, connector and image encoder.
    `ValueError` if that adapter, which is trained further, has other settings.
    """
    peft_config, name = get_peft_config(model_args), model_args.model_name_or_path
    if is_adapter(name):
        if peft_config is not None:
            check_same_adapter(peft_config, name)
        return None
    if peft_config is not None:
        if not (model_args.lora_target_modules or model_args.lora_target_parameters):
            peft_config.target_modules = "all-linear"  # without the head; PEFT's own choice differs by architecture
        if not Path(name).is_dir() and name != NANO:
            peft_config.revision = model_args.model_revision
        if training.freeze_vision:
            peft_config.exclude_modules = IMAGE_ENCODER
    return peft_config


def check_same_adapter(asked: PeftConfig, adapter: str) -> None:
    """`ValueError` if a recipe asks for another adapter than the one that it goes on from."""
    with sound(adapter):  # it may be of another kind
        there = vars(PeftConfig.from_pretrained(adapter))
        settings = {name: there[name] for name in ("r", "lora_alpha", "use_rslora", "use_dora")}
    for name, has in settings.items():
        if (wanted := getattr(asked, name)) != has:
            raise ValueError(
                f"{adapter} is an adapter with {name}={has}, which is trained further, so {name}={wanted} would do "
                "nothing: leave it out, or merge the adapter first (recipes/merge_adapter.py) and train a new one"
            )
