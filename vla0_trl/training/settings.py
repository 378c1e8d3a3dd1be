"""Which of TRL's settings a recipe honours: a setting that would do nothing raises, and says what to use instead.

Here are the fields of TRL's `SFTConfig` and `ModelConfig`, and of [`VLASFTConfig`], that may do nothing. The test of
this module lists all others, and so notices a new field of TRL's.
"""

from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.optim import SGD
from transformers import get_scheduler

from vla0_trl import pip_install

_FIRST_WITH_BFLOAT16 = (8, 0)  # compute capability: Ampere (A100, RTX 30) and later; T4 and RTX 20 have 7.5
PRECISION_ADVICE = (
    "float16 does not help: in it, VLA-0-Smol's training diverged. Train in float32 with LoRA (use_peft=true, "
    "dtype=float32, bf16=false), slower and with more memory, or take a card that has "
    "bfloat16: RTX 30 or newer, A10, L4, A100"
)
CPU_RECIPES = "pusht/policy.yaml, pusht/nano.yaml, libero/nano.yaml and libero/debug.yaml"

# By the switch without which they do nothing.
NEEDS = {
    "use_peft": "lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save "
    "lora_task_type use_rslora use_dora",
    "load_in_4bit": "bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage",
    "gradient_checkpointing": "gradient_checkpointing_kwargs activation_checkpointing_kwargs",
    "use_liger_kernel": "liger_kernel_config",
    "push_to_hub": "hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision",
    "dagger_steps": "dagger_episodes dagger_fraction dagger_teacher",
    "cotrain_dataset_name": "cotrain_fraction",
}

# By what to do instead.
REFUSED = {
    "rows are never cut: the answer is at their end. A shorter chunk_size, fewer waypoints or a smaller image_size "
    "make them shorter": "max_length truncation_mode",
    "each row is a batch entry of its own, padded on the right": "packing packing_strategy eval_packing padding_free",
    "the loss is always taken on the answer alone": "assistant_only_loss",
    "rows are drawn in another order in every epoch; train_sampling_strategy=sequential keeps the stored one": (
        "shuffle_dataset"
    ),
    "chat datasets have columns of their own, and the collator reads them as they are": (
        "dataset_text_field dataset_kwargs dataset_num_proc label_names length_column_name"
    ),
    "template and special tokens are the processor's own, which the policy uses as well: change them in the model's "
    "folder": "chat_template_path eos_token pad_token",
    "set dtype, attn_implementation and model_revision": "model_init_kwargs",
    "code from a model's repository is never run": "trust_remote_code",
    "there is no compute_metrics whose predictions it would concern": (
        "prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps "
        "include_for_metrics batch_eval_metrics"
    ),
    "SIGTERM saves a checkpoint as it is": "enable_jit_checkpoint",
    "training keeps no keys and values; generation always does": "use_cache",
    "the columns that the collator reads would be gone": "remove_unused_columns",
    "a recipe trains; eval/ evaluates": "do_predict",
}

_WITHOUT_ADAM = ("sgd", "adafactor", "adagrad", "rmsprop")
_LOW_RANK = ("galore", "apollo")


def check_settings(settings: Any) -> None:
    """`ValueError` for the first setting that is not its default, and would do nothing; says what to use instead.

    The settings are as they were given: before `__post_init__` fills some of them in.
    """
    values = {f.name: _plain(getattr(settings, f.name)) for f in fields(settings)}
    for f in fields(settings):
        if values[f.name] == _plain(default(f)):
            continue
        for names, reason in _silenced(values):
            if f.name in names.split():
                raise ValueError(
                    f"{f.name}={values[f.name]} can't be honoured: {reason} (its default: {_plain(default(f))})"
                )


def _silenced(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Names of fields that do nothing with these values, and why."""
    for instead, names in REFUSED.items():
        yield names, f"{instead}; leave it out"
    for switch, names in NEEDS.items():
        if not (values.get(switch) or (switch == "gradient_checkpointing" and values.get("activation_checkpointing"))):
            yield names, f"{switch} is not set; set it, or leave this out"
    if "optim" not in values:
        return
    optim = values["optim"]
    if values["completion_only_loss"] is False:
        yield "completion_only_loss", "the loss is always taken on the answer alone; leave it out"
    if values["max_steps"] > 0:
        yield "num_train_epochs", f"max_steps={values['max_steps']} ends the run; set max_steps=-1, or leave this out"
    if values["lr_scheduler_type"] == "constant":
        yield "warmup_steps", "lr_scheduler_type=constant has no warmup; use constant_with_warmup"
    if values["lr_scheduler_type"].startswith("constant") and values["lr_scheduler_kwargs"] not in ({}, "{}"):
        reason = f"lr_scheduler_type={values['lr_scheduler_type']} takes none; leave it out, or {{}}"
        yield "lr_scheduler_kwargs", reason
    if values["loss_type"] == "dft":
        yield "label_smoothing_factor", "only loss_type=nll is smoothed; leave one out"
    if optim.startswith(_WITHOUT_ADAM):
        yield "adam_beta1 adam_beta2 adam_epsilon", f"optim={optim} is not Adam; leave it out"
    if optim == "muon":
        yield "optim_args", "optim=muon takes adam_beta1, adam_beta2, adam_epsilon and weight_decay; leave it out"
    else:
        yield "muon_adamw_learning_rate", f"optim={optim} is not muon; leave it out"
    if not optim.startswith(_LOW_RANK):
        yield "optim_target_modules", f"optim={optim} is neither GaLore nor APOLLO; leave it out"
    if values["train_sampling_strategy"] != "random":
        if values["train_sampling_strategy"] != "sequential":
            yield "train_sampling_strategy", "rows are about equally long, and store no length; use random"
        if values["dagger_steps"]:
            yield "train_sampling_strategy", "dagger_steps draws rows at random; leave one out"
    if values["mask_branches"] == 1:
        yield "mask_max mask_skip mask_full mask_labels mask_unit", "mask_branches=1 hides all values; leave it out"
    if values["mask_skip"] == 1 or values["mask_max"] == values["mask_full"] == 0:
        names = "mask_max mask_full mask_labels mask_unit" if values["mask_skip"] == 1 else "mask_labels mask_unit"
        yield names, "no value is ever hidden (mask_skip=1, or mask_max=0 and mask_full=0); leave it out"


def without_bfloat16() -> str | None:
    """The GPU's name if it has no units for bfloat16; torch's own question says yes, since it emulates it, slowly."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() >= _FIRST_WITH_BFLOAT16:
        return None
    return torch.cuda.get_device_name()


def check_cotraining(training: Any) -> None:
    """`ValueError` where a vision chat dataset can't be mixed in as asked."""
    fraction, batch = training.cotrain_fraction, training.per_device_train_batch_size
    size = global_batch_size(training)
    if not 0 < fraction <= 0.5 or not round(fraction * size):
        raise ValueError(
            f"cotrain_fraction={fraction} must be in (0, 0.5], and at least one of the {size} rows of a step: raise "
            "it, or leave cotrain_dataset_name out"
        )
    if batch < 2:
        raise ValueError(
            f"per_device_train_batch_size={batch} with cotrain_dataset_name: every batch needs one of the policy's "
            "rows, too: use 2 or more"
        )
    if training.torch_compile:
        raise ValueError("torch_compile wants batches of one length, which chats don't have: leave one out")


def global_batch_size(training: Any) -> int:
    """Samples that one optimizer step learns from."""
    return training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size


def check_together(data: Any, training: Any, model_args: Any) -> None:
    """[`check_settings`] of a model, and of what depends on model, dataset, machine and installed packages."""
    check_settings(model_args)
    name = model_args.model_name_or_path
    nano, local = name == "nano", Path(str(name)).is_dir()
    if (nano or local) and model_args.model_revision != "main":
        where = "is built on the spot" if nano else "is a folder"
        raise ValueError(f"model_revision={model_args.model_revision} can't be honoured: {name} {where}; leave it out")
    if data.dataset_revision is not None and Path(data.dataset_name).is_dir():
        raise ValueError(
            f"dataset_revision={data.dataset_revision} can't be honoured: {data.dataset_name} is a folder; leave it "
            "out"
        )
    card = None if training.use_cpu else without_bfloat16()
    if card and model_args.dtype == "bfloat16":
        raise ValueError(f"dtype=bfloat16, but {card} can't multiply in bfloat16: {PRECISION_ADVICE}")
    bits = next((field for field in ("load_in_4bit", "load_in_8bit") if getattr(model_args, field)), None)
    if bits and nano and not model_args.use_peft:
        raise ValueError(
            f"{bits}=True can't be honoured: quantized weights are not trained; set use_peft, or leave it out"
        )
    by_bnb = any(word in training.optim for word in ("bnb", "8bit", "32bit")) and "torch" not in training.optim
    if (bits or by_bnb) and find_spec("bitsandbytes") is None:
        wanted = f"{bits}=True" if bits else f"optim={training.optim}"
        raise ValueError(f"{wanted} needs bitsandbytes: {pip_install('train8bit')}")
    pairs = training.optim_args.split(",") if training.optim_args else ()
    if any(pair.count("=") != 1 for pair in pairs):
        raise ValueError(f"optim_args={training.optim_args} must be NAME=VALUE,NAME=VALUE")
    kind, kwargs = _plain(training.lr_scheduler_type), training.lr_scheduler_kwargs
    try:
        get_scheduler(kind, SGD([torch.zeros(1)], lr=1.0), 0, 1, kwargs)
    except (TypeError, ValueError) as error:  # where training would begin
        raise ValueError(f"lr_scheduler_kwargs={kwargs} do not fit lr_scheduler_type={kind}: {error}") from error


def default(field: Field) -> Any:
    """A field's default, made if it has to be."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value
