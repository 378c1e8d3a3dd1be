"""Which run an output folder belongs to: its identity, how it is claimed, and what may be deleted of it."""

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from trl import ModelConfig

from vla0_trl.config import CONFIG_NAME, VLAConfig
from vla0_trl.data.chat_dataset import conversion_record
from vla0_trl.data.vision_chat import VisionChats
from vla0_trl.files import delete_leftovers, write_whole
from vla0_trl.manifest import delete_claimed, read_json, restore_replaced
from vla0_trl.run_folder import (
    BEST,
    ENERGY_FILE,
    RUN_FILE,
    STATE_FILE,
    FolderError,
    RunFolder,
    belongs_to_another,
    checkpoints,
    is_free,
)
from vla0_trl.training.arguments import DataArguments, VLASFTConfig
from vla0_trl.training.callbacks import INITIAL
from vla0_trl.training.settings import global_batch_size

BASE_MODEL = "base_model"
# What may change within a run: how long it goes on, what is logged, evaluated and saved, and which devices compute it.
# All other fields are its identity, those that a later TRL adds too.
_FAMILIES = ("log_", "logging_", "save_", "hub_", "trackio_", "eval_", "include_", "ddp_", "fsdp", "dataloader_")
_FAMILIES += ("torch_compile", "gradient_checkpointing", "activation_", "rollout_", "do_")
_MAY_CHANGE = {
    *("output_dir", "overwrite", "resume_from_checkpoint", "max_steps", "num_train_epochs"),
    *("stop_at_token_accuracy", "probe_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("auto_find_batch_size", "per_device_eval_batch_size", "disable_tqdm", "report_to", "run_name", "project"),
    *("push_to_hub", "prediction_loss_only", "batch_eval_metrics", "debug", "skip_memory_metrics", "bf16_full_eval"),
    *("fp16_full_eval", "use_cpu", "local_rank", "accelerator_config", "deepspeed", "parallelism_config"),
    *("full_determinism", "use_cache", "use_liger_kernel", "liger_kernel_config", "enable_jit_checkpoint"),
    *("torch_empty_cache_steps", "pad_to_multiple_of", "dataset_num_proc", "trust_remote_code"),
    *("attn_implementation", "restore_callback_states_from_checkpoint", "remove_unused_columns"),
}
_COUNTS = {"dataloader_drop_last"}  # of a family, and yet it changes which rows are learnt from


def run_identity(
    data: DataArguments, training: VLASFTConfig, model_args: ModelConfig, config: VLAConfig
) -> dict[str, Any]:
    """Every setting that changes what is learnt, as JSON gives it back."""
    names = [(arguments, f.name) for arguments in (data, model_args, training) for f in fields(arguments)]
    settings = {
        name: getattr(arguments, name)
        for arguments, name in names
        if name in _COUNTS or (name not in _MAY_CHANGE and not name.startswith(_FAMILIES))
    }
    settings |= {"global_batch": global_batch_size(training), "vla_config": config.to_dict()}
    if training.cotrain_dataset_name:
        settings["cotrain_rows"] = len(VisionChats(training.cotrain_dataset_name))
    conversion = conversion_record(data.dataset_name, data.dataset_revision)
    if conversion is not None:  # a folder may hold another dataset than yesterday
        content = json.dumps(conversion | {"files": None}, sort_keys=True)
        settings["dataset_conversion"] = hashlib.sha256(content.encode()).hexdigest()[:16]
    return json.loads(json.dumps(settings, default=str))


def hold_run(identity: dict[str, Any], output_dir: str, overwrite: bool) -> RunFolder:
    """Lock `output_dir` if this run may have it, else `FolderError`; nothing is written yet."""
    folder = RunFolder(output_dir)
    try:
        if Path(output_dir).is_symlink():  # transformers makes no folder where a link leads to
            folder.path.mkdir(parents=True, exist_ok=True)
        restore_replaced(folder.path / BEST)
        found = read_json(folder.path / RUN_FILE)
        if found is None and not is_free(folder.path):
            damaged = (folder.path / RUN_FILE).exists()
            problem = f"has a damaged {RUN_FILE}" if damaged else "is not empty and was not made by a recipe"
            raise FolderError(f"{output_dir} {problem}: choose another --output_dir")
        if found is not None and not overwrite and _has_learnt(folder.path):
            there, here = _in_both(found, identity), _in_both(identity, found)
            if there != here:
                raise belongs_to_another(Path(output_dir), "run", there, here)
            if unknown := sorted(identity.keys() - found.keys()):
                print(f"{output_dir}/{RUN_FILE} is another version's and does not say: {', '.join(unknown)}")
    except BaseException:  # Ctrl-C, too, must not leave the folder locked while this process lives
        folder.close()
        raise
    return folder


def begin_run(folder: RunFolder, identity: dict[str, Any], overwrite: bool) -> None:
    """Write `run.json`, by which the folder is this run's; what another one made is deleted first."""
    record = read_json(folder.path / RUN_FILE) or {}
    if record and (overwrite or not _has_learnt(folder.path)):
        delete_run(folder.path)
        record = {}
    folder.path.mkdir(parents=True, exist_ok=True)
    delete_leftovers(folder.path)
    write_whole(folder.path / RUN_FILE, json.dumps(record | identity, indent=2) + "\n")


def delete_run(output_dir: Path) -> None:
    """Delete a run that `run.json` claims, file by file: notes and evaluations stay."""
    beside = [f"{BEST}{suffix}" for suffix in ("", ".partial", ".old")]
    for folder in (*checkpoints(output_dir), *(output_dir / name for name in (INITIAL, BASE_MODEL, *beside))):
        delete_claimed(folder, unfinished=True)
    delete_claimed(output_dir, unfinished=True)
    for pattern in (
        "runs/*/events.out.tfevents.*",
        "dagger/round-*",
        "dagger/.round-*",
        "not_finite_step*_process*.json",
        ENERGY_FILE,
    ):
        for path in output_dir.glob(pattern):
            path.unlink()
    (output_dir / STATE_FILE).unlink(missing_ok=True)
    (output_dir / RUN_FILE).unlink()


def episodes_trained_on(dataset_name: str, episodes: list[int], revision: str | None = None) -> dict[str, Any]:
    """The episodes of a training, and the seeds of the simulator that they were recorded on, if we did that."""
    conversion = conversion_record(dataset_name, revision) or {}
    options = conversion.get("staging", {}).get("source", {}).get("options", {})
    seeds: list[Any] = []
    if options.keys() >= {"seed", "expert_mix"}:  # record_pusht.py
        seeds = [options["seed"] + episode for episode in episodes]
    elif "episodes" in options:  # record_libero.py
        seeds = [options["episodes"][episode] for episode in episodes]
    return {"dataset": dataset_name, "episodes": episodes, "seeds": seeds}


def _has_learnt(output_dir: Path) -> bool:
    """Whether the run has made anything that took time; until then any of its settings may still change."""
    return bool(checkpoints(output_dir)) or any((output_dir / name).exists() for name in (BEST, CONFIG_NAME))


def _in_both(record: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The part of a record that the other has too: another version may know more fields, or fewer."""
    return {
        name: _in_both(value, other[name]) if isinstance(value, dict) and isinstance(other[name], dict) else value
        for name, value in record.items()
        if name in other
    }
