"""What a recipe can set: TRL's own fields, and the few that a policy needs besides."""

import sys
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers.training_args import OptimizerNames
from transformers.utils import is_torch_bf16_gpu_available
from trl import ModelConfig, SFTConfig, TrlParser

from vla0_trl.command_line import option, separated
from vla0_trl.config import VLAConfig
from vla0_trl.execution_arguments import ExecutionArguments
from vla0_trl.training.muon import MUON
from vla0_trl.training.settings import (
    CPU_RECIPES,
    NEEDS,
    PRECISION_ADVICE,
    check_cotraining,
    check_settings,
    without_bfloat16,
)


@dataclass
class DataArguments(ExecutionArguments):
    """The chat dataset, and how its rows become text. A field that is not set keeps the dataset's own value."""

    dataset_name: str | None = option(None, "Chat dataset made by data_prep/: a local folder or a Hub id.")
    dataset_revision: str | None = option(None, "Revision of a dataset on the Hub.")
    num_eval_episodes: int = option(0, "Hold out this many episodes, the last ones; see eval_strategy.")
    cameras: list[str] | None = option(None, "Cameras to use, in this order.")
    chunk_size: int | None = option(None, "Steps predicted at once; at most the stored ones.")
    waypoints: list[int] | None = option(
        None, "Steps of the chunk that are written, such as 0 3 7; those between are interpolated."
    )
    image_size: int | None = option(None, "Side of the square that the model sees, in pixels.")
    crop_ratio: float | None = option(
        None, "Side of the crop over side of the image: random in training, else central."
    )
    image_jitter: list[float] | None = option(
        None, "Strengths of random brightness, contrast, saturation, hue in training."
    )
    tile_images: bool | None = option(None, "Show all cameras side by side as one image (VLA-0).")
    num_bins: int | None = option(None, "Integers run from 0 to this, inclusive.")
    use_state: bool | None = option(None, "Write the state into the prompt.")
    relative_actions: bool | None = option(None, "Write actions as action − state.")
    use_system_prompt: bool | None = option(None, "Prepend VLA-0's description of the output format.")
    normalization: str | None = option(None, "min_max, quantile, or a range such as -1,1.")

    def __post_init__(self):
        if not self.dataset_name:
            raise ValueError(
                "dataset_name is missing: --dataset_name FOLDER_OR_HUB_ID of a dataset made by data_prep/"
            )

    def overrides(self) -> dict[str, Any]:
        """The [`VLAConfig`] fields that the recipe sets."""
        names = {f.name for f in fields(VLAConfig)} & {f.name for f in fields(self)}
        changes = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if "," in changes.get("normalization", ""):
            changes["normalization"] = [float(bound) for bound in changes["normalization"].split(",")]
        return changes | self.execution_changes()


@dataclass
class VLASFTConfig(SFTConfig):
    """TRL's `SFTConfig`, and what is special in training a policy."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*SFTConfig._VALID_DICT_FIELDS, "nano"]

    # The collator needs the raw columns, which TRL would remove.
    remove_unused_columns: bool = option(False, "Must stay false.")
    gradient_checkpointing: bool = option(False, "Recompute activations: a third slower, for when memory is short.")
    ddp_find_unused_parameters: bool | None = option(
        False, "All parameters get gradients here: looking for others costs time."
    )
    logging_nan_inf_filter: bool = option(
        False, "Hide NaN in the log. Not needed, because NaN ends the run; the check costs time."
    )
    bf16: bool | None = option(None, "Autocast to bfloat16; default: on GPUs, and on CPUs with instructions for it.")
    hub_private_repo: bool | None = option(True, "Make a new repository on the Hub private; false: public.")
    report_to: str = option("tensorboard", "tensorboard, wandb, trackio, none, or a list.")
    optim: str = option(
        str(SFTConfig.default_optim),
        "One of transformers' OptimizerNames, or muon: Muon for matrices, AdamW for the rest.",
    )
    muon_adamw_learning_rate: float | None = option(
        None, "With optim=muon, AdamW's own learning rate; default: learning_rate."
    )
    mask_max: float = option(0.4, "Hide up to this fraction of a sample's action values in the input.")
    mask_skip: float = option(0.1, "Share of samples of which nothing is hidden.")
    mask_full: float = option(0.0, "Share of those that are not skipped of which all values are hidden.")
    mask_branches: float = option(
        0.0,
        "Share of samples that train parallel decoding: all values hidden, and each one's digits a branch of its own; "
        "needs digits, SmolVLM's classes and sdpa.",
    )
    mask_labels: str = option(
        "ignore",
        "Hidden values are not targets (VLA-0), or stay targets: needs one token per number.",
        choices=["ignore", "keep"],
    )
    mask_unit: str = option("value", "Hide whole values, or single digits as VLA-0.", choices=["value", "character"])
    rows_in_memory: bool = option(
        False, "Read and decode each row once, and keep it: for small datasets and dataloader_num_workers 0."
    )
    freeze_vision: bool = option(False, "Do not train the image encoder.")
    nano: dict | str | None = option(None, "Sizes of the nano backbone (model_name_or_path: nano), as JSON.")
    save_initial: bool = option(False, "Save the untrained policy as output_dir/initial, to compare with.")
    stop_at_token_accuracy: float | None = option(None, "Stop once the logged mean_token_accuracy reaches this.")
    rollout_steps: int = option(0, "Run episodes in the simulator every this many steps; 0: never.")
    rollout_episodes: int = option(16, "Episodes of such an evaluation, on fixed seeds.")
    dagger_steps: int = option(
        0,
        "Every this many steps, the policy drives dagger_episodes new episodes; what it saw, "
        "labelled by dagger_teacher, joins the training rows (DAgger); 0: never.",
    )
    dagger_episodes: int = option(40, "Episodes per DAgger round.")
    dagger_fraction: float = option(0.4, "Share of the rows drawn from what DAgger added, once there is any.")
    dagger_teacher: str | None = option(
        None, "The teacher that labels: a file made by data_prep/teach_pusht.py, or LIBERO's tasks: libero_object/0,3."
    )
    cotrain_dataset_name: str | None = option(
        None,
        "A vision chat dataset in TRL's format (questions about images, pointing), a folder or a Hub id: its rows "
        "join every step, so that the model does not forget what it was trained for.",
    )
    cotrain_fraction: float = option(0.2, "Their share of every step's rows, rounded; at most a half.")
    probe_steps: int = option(
        0,
        "Every this many steps, log the loss on the first action, by how much the loss rises when images "
        "and states are another sample's (observation_gap: near 0, the policy does not look), and the error of "
        "the policy's answers, with that of staying in place; 0: never.",
    )
    log_energy: bool = option(False, "Measure the energy of the run with codecarbon, into output_dir/energy.json.")
    overwrite: bool = option(False, "Start again in an output_dir that another run has used.")

    def __post_init__(self):
        if not (self.pad_to_multiple_of in (None, "auto") or str(self.pad_to_multiple_of).isdecimal()):
            raise ValueError(f"pad_to_multiple_of={self.pad_to_multiple_of} must be a whole number, or auto")
        check_settings(self)
        card = None if self.use_cpu else without_bfloat16()
        if card and self.bf16:
            raise ValueError(f"bf16=True, but {card} can't multiply in bfloat16: {PRECISION_ADVICE}")
        if self.bf16 and not self.use_cpu and not is_torch_bf16_gpu_available():
            raise ValueError(
                "bf16=True, and torch finds no GPU here (python -m vla0_trl.check says why): of the recipes, "
                f"{CPU_RECIPES} are for a CPU; use_cpu=true runs any other on it, too slowly to learn"
            )
        if self.fp16:
            print(f"warning: fp16=True: {PRECISION_ADVICE}")
        if self.bf16 is None and not self.fp16:
            self.bf16 = _cpu_has_bfloat16() if self.use_cpu else is_torch_bf16_gpu_available() and not card
        if self.rows_in_memory and self.dataloader_num_workers:
            raise ValueError(
                f"rows_in_memory=True with dataloader_num_workers={self.dataloader_num_workers} would keep the rows "
                "once in every worker: set one of the two to 0"
            )
        muon = self.optim == MUON
        if not muon and self.optim not in list(OptimizerNames):
            raise ValueError(f"optim={self.optim} must be one of {MUON}, {', '.join(OptimizerNames)}")
        if muon:
            self.optim = SFTConfig.default_optim  # transformers checks against the names that it knows
        if "activation_checkpointing" in self.__dataclass_fields__ and self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing  # the newer name; the older one alone warns
        super().__post_init__()
        if muon:
            self.optim = MUON
        if self.cotrain_dataset_name:
            check_cotraining(self)
        if self.dagger_steps and not self.dagger_teacher:
            raise ValueError("dagger_steps is set, but no dagger_teacher labels what the policy sees: name its file")
        if self.dagger_steps and self.dataloader_num_workers:
            raise ValueError(
                "dagger_steps adds rows during training, which dataloader workers would not see: set "
                "dataloader_num_workers=0"
            )


def _cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies in bfloat16; those that don't emulate it, slower than float32."""
    known = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
    return known.get("avx512_bf16", False) or known.get("amx_bf16", False)


class _RecipeParser(TrlParser):
    """`TrlParser` for recipes: a switch that the command line turns off takes along what the YAML sets for it."""

    def parse_args_and_config(self, args: list[str]) -> tuple[Any, ...]:
        pairs = set(pairwise(" ".join(args).replace("=", " ").lower().split()))
        off = [switch for switch in NEEDS for value in ("false", "0") if (f"--{switch}", value) in pairs]
        self._unused = {name for switch in off for name in NEEDS[switch].split()}
        if any(word == "--optim" and value != MUON for word, value in pairs):
            self._unused.add("muon_adamw_learning_rate")
        return super().parse_args_and_config(args)

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        return super().set_defaults_with_config(**{k: v for k, v in config.items() if k not in self._unused})

    def error(self, message: str) -> None:
        """One line: argparse would write all flags before it."""
        sys.exit(f"error: {message}")


def parse_recipe(
    default_config: Path, description: str, arguments: list[str] | None = None
) -> tuple[DataArguments, VLASFTConfig, ModelConfig]:
    """Arguments from `--config YAML` (`default_config` if there is none) and the command line, which wins.

    An unknown key, in either, is an error.
    """
    arguments = separated(sys.argv[1:] if arguments is None else arguments)
    if "--config" not in arguments:
        arguments = ["--config", str(default_config), *arguments]
    parser = _RecipeParser((DataArguments, VLASFTConfig, ModelConfig), description=description)
    return parser.parse_args_and_config(arguments)
