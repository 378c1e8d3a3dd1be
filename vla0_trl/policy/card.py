"""The model card: what a checkpoint's files and its run's settings tell, in the Hub's format."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from vla0_trl import __version__
from vla0_trl.config import NANO, VLAConfig
from vla0_trl.hub import is_hub_id
from vla0_trl.models.fingerprint import is_adapter
from vla0_trl.templating import CARD, render

CARD_NAME = "README.md"
_TAGS = ["vla0_trl", "VLA", "robotics", "trl"]
_PACKAGES = ("torch", "transformers", "trl", "peft")


def write_model_card(
    folder: Path,
    name: str,
    run: dict[str, Any],
    trained_on: dict[str, Any],
    step: int | None = None,
    results: list[EvalResult] | None = None,
) -> None:
    """Write the README.md of a checkpoint.

    Args:
        name (`str`): "USER/NAME" on the Hub, or a folder's name.
        run (`dict`): the settings of its training, as `run.json` has them; may be empty.
        trained_on (`dict`): see [`manifest.trained_on`].
        results (`list[EvalResult]`, *optional*): what it scored; `metric_args` and `dataset_args` as
            [`evaluation.model_index`] fills them.
    """
    config, adapter, results = VLAConfig.from_pretrained(folder), is_adapter(folder), results or []
    dataset = trained_on.get("dataset") or run.get("dataset_name") or "not recorded"
    sources = dict.fromkeys([dataset, config.source, run.get("cotrain_dataset_name")])
    data = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="robotics",
        base_model=config.base_model if is_hub_id(config.base_model) else None,
        base_model_relation=("adapter" if adapter else "finetune") if is_hub_id(config.base_model) else None,
        datasets=[name for name in sources if is_hub_id(name)] or None,
        tags=_TAGS,
        model_name=name.split("/")[-1] if results else None,
        eval_results=results or None,
    )
    body = render(
        "model_card.md",
        name=name.split("/")[-1],
        repo_id=name,
        base=_base_in_words(config.base_model),
        adapter=adapter,
        version=__version__,
        step=step,
        config=config,
        dataset=_shown(dataset),
        episodes=len(trained_on.get("episodes", ())),
        training=_training(run, step),
        versions=", ".join(f"{package} {version(package)}" for package in _PACKAGES),
        results=[_result_row(result) for result in results if result.metric_type == "success_rate"],
        evaluate=_evaluation(config, name, dataset),
    )
    ModelCard.from_template(data, template_str=CARD, body=body).save(folder / CARD_NAME)


def _base_in_words(base_model: str | None) -> str:
    if base_model == NANO:
        return "a nano model with random weights"
    return _shown(base_model) if base_model else "a vision-language model"


def _shown(name: str) -> str:
    """A Hub id as it is; of a folder only its name, which is all that means something elsewhere."""
    return name if is_hub_id(name) else Path(name).name


def _training(run: dict[str, Any], step: int | None) -> list[tuple[str, Any]]:
    """Rows about a training, of the settings that there are."""
    if not run:
        return [("settings", "not recorded")]
    lora = f"rank {run['lora_r']}, alpha {run['lora_alpha']}" if run.get("use_peft") else None
    hidden = f"up to {run['mask_max']} of an answer's values, none in {run['mask_skip']} of the samples"
    chats = run.get("cotrain_dataset_name")
    rows = [
        ("steps", step),
        ("samples per step", run["global_batch"]),
        ("co-training", f"{run['cotrain_fraction']:g} of each step from {_shown(chats)}" if chats else None),
        ("LoRA", lora),
        ("optimizer", f"{run['optim']}, weight decay {run['weight_decay']:g}, clipped at {run['max_grad_norm']:g}"),
        ("learning rate", f"{run['learning_rate']:g}, {run['lr_scheduler_type']}, warmup {run['warmup_steps']}"),
        ("precision", f"weights {run['dtype']}{', autocast to bfloat16' if run['bf16'] else ''}"),
        ("hidden in the input", hidden),
        ("image encoder", "frozen" if run["freeze_vision"] else "trained"),
        ("seed", run["seed"]),
    ]
    return [(label, value) for label, value in rows if value is not None]


def _result_row(result: EvalResult) -> list[str]:
    low, high = result.metric_args["interval_95"]
    seeds, execution = result.dataset_args["seeds"], result.dataset_args["execution"]
    interval, n = f"{low:.1f} to {high:.1f} %", str(result.metric_args["n"])
    return [result.dataset_name, f"{result.metric_value:.1f} %", interval, n, seeds, execution]


def _evaluation(config: VLAConfig, name: str, dataset: str) -> str:
    """The command that evaluates such a policy."""
    told = f"{config.robot} {config.source} {dataset}".lower()
    if "pusht" in told:
        return f"python eval/eval_pusht.py --model_name_or_path {name} --num_episodes 500"
    if "libero" in told:
        return f"python eval/eval_libero.py --model_name_or_path {name} --num_envs 8"
    return f"python eval/eval_offline.py --model_name_or_path {name} --dataset_name {_shown(dataset)}"
