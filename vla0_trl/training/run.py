"""Supervised fine-tuning, from parsed arguments to a saved policy: what all recipes/sft_*.py share."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import ModelConfig, get_peft_config, get_quantization_config

from vla0_trl.config import CONFIG_NAME, VLAConfig
from vla0_trl.data.chat_dataset import align_config, episode_indices, load_chat_dataset, tasks_of
from vla0_trl.files import write_whole
from vla0_trl.models.adapters import check_tied_targets
from vla0_trl.models.fingerprint import base_model_of, is_adapter
from vla0_trl.models.loading import IMAGE_ENCODER, freeze_vision, load_model, load_processor, set_image_size
from vla0_trl.models.nano import NANO, build_nano, nano_from_dict
from vla0_trl.processing.chat import prompt_messages
from vla0_trl.run_folder import RUN_FILE, STATE_FILE, last_checkpoint
from vla0_trl.training.arguments import DataArguments, VLASFTConfig, parse_recipe
from vla0_trl.training.not_finite import NotFiniteError
from vla0_trl.training.progress import describe_run, global_batch_size
from vla0_trl.training.trainer import VLATrainer

BASE_MODEL = "base_model"
# What a run is: change one of these, and it is another run. How long it goes on, what is logged, and on how many GPUs
# the same batch is spread may change.
_IDENTITY = {
    DataArguments: "dataset_name dataset_revision num_eval_episodes",
    ModelConfig: "model_name_or_path model_revision dtype load_in_4bit load_in_8bit use_peft lora_r lora_alpha "
    "lora_dropout lora_target_modules use_rslora use_dora",
    VLASFTConfig: "learning_rate lr_scheduler_type warmup_steps weight_decay optim max_grad_norm adam_beta1 "
    "adam_beta2 adam_epsilon bf16 seed nano freeze_vision mask_max mask_skip mask_full mask_labels mask_unit "
    "label_smoothing_bins muon_adamw_learning_rate",
}


@dataclass
class Run:
    """A run that may begin: arguments that fit the dataset, and an output folder that is ours."""

    data: DataArguments
    training: VLASFTConfig
    model_args: ModelConfig
    dataset: Dataset
    stored_cameras: list[str]
    config: VLAConfig


RolloutFactory = Callable[[VLATrainer], TrainerCallback]


def main(default_config: Path, description: str, rollouts: RolloutFactory | None = None) -> None:
    """A recipe's command line; what a user can mend is one line, without a traceback.

    Args:
        rollouts: makes the callback that runs episodes in a simulator during training (`rollout_steps`).
    """
    try:
        run = prepare(*parse_recipe(default_config, description))
        if run.training.rollout_steps and rollouts is None:
            raise ValueError("rollout_steps is set, but this recipe has no simulator: set rollout_steps=0")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    try:
        finished = train(run, rollouts)
    except NotFiniteError as error:
        sys.exit(f"error: {error}")
    if not finished:
        sys.exit(130)


def prepare(data: DataArguments, training: VLASFTConfig, model_args: ModelConfig) -> Run:
    """Read the dataset, fit its config to the recipe's changes, and claim the output folder.

    Raises:
        ValueError: the dataset can't give what the recipe asks for, or the folder belongs to another run.
        FileNotFoundError: there is no such dataset.
    """
    dataset, stored = load_chat_dataset(data.dataset_name, revision=data.dataset_revision)
    config = align_config(dataset, stored, **data.overrides())
    config.base_model = model_args.model_name_or_path
    # One process of all machines: their output_dir is on storage that they share.
    with training.main_process_first(local=False, desc="claiming the output folder"):
        if training.should_save:
            claim_run(data, training, model_args, config)
    return Run(data, training, model_args, dataset, stored.cameras, config)


def train(run: Run, rollouts: RolloutFactory | None = None) -> bool:
    """Fine-tune and save the policy in `output_dir`, from the last whole checkpoint if there is one.

    Returns:
        Whether the run is finished; False after Ctrl-C, with a checkpoint to go on from.
    """
    training, output_dir = run.training, Path(run.training.output_dir)
    if is_finished(training):
        print(f"already trained: {output_dir} (--overwrite to start again, a larger --max_steps to go on)")
        return True
    train_set, eval_set = hold_out(run.dataset, run.data.num_eval_episodes)
    messages = [message for task in tasks_of(run.dataset) for message in prompt_messages(run.config, task)]
    prompts = [message["content"] for message in messages]
    model, processor = load_backbone(run.model_args, training, run.config, prompts)
    trainer = VLATrainer(
        model=model,
        args=training,
        vla_config=run.config,
        processing_class=processor,
        train_dataset=train_set,
        eval_dataset=eval_set,
        stored_cameras=run.stored_cameras,
        peft_config=lora_config(run.model_args, training),
    )
    if isinstance(trainer.model, PeftModel):
        check_tied_targets(trainer.model)
    if training.rollout_steps:
        trainer.add_callback(rollouts(trainer))
    trainer.accelerator.print(describe_run(trainer, trainer.eval_collator))
    resume = training.resume_from_checkpoint or last_checkpoint(output_dir)
    if resume:
        trainer.accelerator.print(f"continuing from {resume}")
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if trainer.interrupted:
        trainer.accelerator.print(f"stopped at step {trainer.state.global_step}; the same command goes on from there")
        return False
    trainer.save_policy(output_dir)
    trainer.save_state()
    trainer.accelerator.print(f"policy saved in {output_dir}")
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=run.data.dataset_name)
    return True


def is_finished(training: VLASFTConfig) -> bool:
    """Whether `output_dir` holds the final policy of a run at least as long as this one."""
    state = Path(training.output_dir) / STATE_FILE
    if not (state.is_file() and (state.parent / CONFIG_NAME).is_file()):
        return False
    done = json.loads(state.read_text())
    if training.max_steps > 0:
        return done["max_steps"] >= training.max_steps
    return done["num_train_epochs"] >= training.num_train_epochs


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
    model_args: ModelConfig, training: VLASFTConfig, config: VLAConfig, prompts: Sequence[str] = ()
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model to train and its processor, as `model_name_or_path` names it; `nano` is built on the spot.

    Args:
        prompts: texts whose words may get tokens of their own in a nano backbone.
    """
    name, revision = model_args.model_name_or_path, model_args.model_revision
    if name == NANO:
        with _built_whole(training):
            nano = nano_from_dict(training.nano)
            model, processor = build_nano(nano, training.seed, config.num_bins, prompts)
            model = model.to(getattr(torch, model_args.dtype))
        if not model_args.use_peft:
            set_image_size(processor, model.config, config)
            if training.freeze_vision:
                freeze_vision(model)
            return model, processor
        # An adapter names its base model, so that must exist somewhere: beside the run.
        name, revision = str((Path(training.output_dir) / BASE_MODEL).resolve()), None
        config.base_model = name
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

    Raises:
        ValueError: `model_name_or_path` is an adapter, which is trained further, and the settings are of another one.
    """
    peft_config, name = get_peft_config(model_args), model_args.model_name_or_path
    if is_adapter(name):
        if peft_config is not None:
            check_same_adapter(peft_config, name)
        return None
    if peft_config is not None:
        if not Path(name).is_dir() and name != NANO:
            peft_config.revision = model_args.model_revision
        if training.freeze_vision:
            peft_config.exclude_modules = IMAGE_ENCODER
    return peft_config


def check_same_adapter(asked: PeftConfig, adapter: str) -> None:
    """`ValueError` if a recipe asks for another adapter than the one that it goes on from."""
    there = PeftConfig.from_pretrained(adapter)
    for name in ("r", "lora_alpha", "use_rslora", "use_dora"):
        wanted, has = getattr(asked, name), getattr(there, name)
        if wanted != has:
            raise ValueError(
                f"{adapter} is an adapter with {name}={has}, which is trained further, so {name}={wanted} would do "
                "nothing: leave it out, or merge the adapter first (recipes/merge_adapter.py) and train a new one"
            )


def claim_run(data: DataArguments, training: VLASFTConfig, model_args: ModelConfig, config: VLAConfig) -> None:
    """Mark `output_dir` as this run's, by a file with every setting that changes what is learnt.

    Raises:
        ValueError: something else is there; names the settings that differ.
    """
    output_dir = Path(training.output_dir)
    settings = {name: getattr(a, name) for a in (data, model_args, training) for name in _IDENTITY[type(a)].split()}
    settings |= {"global_batch": global_batch_size(training), "vla_config": config.to_dict()}
    identity = json.loads(json.dumps(settings, default=str))
    file = output_dir / RUN_FILE
    if file.exists() and training.overwrite:
        shutil.rmtree(output_dir)
    elif file.exists():
        other = json.loads(file.read_text())
        changed = sorted(key for key in identity.keys() | other.keys() if identity.get(key) != other.get(key))
        if changed:
            shown = ", ".join(f"{key}: {other.get(key)!r} there, {identity.get(key)!r} here" for key in changed[:3])
            raise ValueError(
                f"{output_dir} belongs to another run ({shown}{' …' if len(changed) > 3 else ''}): choose another "
                "--output_dir, or --overwrite to start again"
            )
    elif output_dir.is_dir() and any(output_dir.iterdir()):
        raise ValueError(f"{output_dir} is not empty and was not made by a recipe: choose another --output_dir")
    output_dir.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(identity, indent=2) + "\n")
