"""A recipe's arguments as benchmarks run them: in one process, without checkpoints, reports and rollouts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl import ModelConfig

from vla0_trl.benchmarks.ablation import flags
from vla0_trl.training.arguments import DataArguments, VLASFTConfig, parse_recipe

Plan = tuple[DataArguments, VLASFTConfig, ModelConfig]
_PLAIN = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "rollout_steps": 0}
_PLAIN |= {"dataloader_num_workers": 0, "dataloader_persistent_workers": False}
A_FEW_STEPS = {"max_steps": 2, "gradient_accumulation_steps": 1}  # enough where memory is estimated on a CPU


def plan_of(recipe: Path, settings: dict[str, Any], options: Sequence[str] = ()) -> Plan:
    """The recipe's arguments with these settings; `options`, a command line, win."""
    words = flags({name: str(value) if isinstance(value, Path) else value for name, value in settings.items()})
    return parse_recipe(recipe, "", ["--config", str(recipe), *flags(_PLAIN), *words, *options])


def source_of(plan: Plan, model_configs: Path | None) -> str:
    """Where the model's config and processor are: a folder among `model_configs`, or what the recipe names."""
    name = plan[2].model_name_or_path
    return str(model_configs / Path(name).name) if model_configs else name


def kind_of(recipe: Path) -> str:
    """Whose rows a recipe learns from, `libero` or `pusht`: the folder that it is in."""
    return recipe.resolve().parent.name
