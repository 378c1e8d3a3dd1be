"""What a training tells of itself in its folder, read back by evaluations, reports and the next call."""

from pathlib import Path
from typing import Any

from vla0_trl.run_folder import ENERGY_FILE, RUN_FILE, STATE_FILE
from vla0_trl.schema import (
    Kinds,
    between,
    is_number,
    items,
    mistakes,
    not_negative,
    optional,
    read_if_whole,
    read_record,
    text,
    warn_once,
)

_MOST = 10**12  # steps, samples
_STATE: Kinds = {
    "global_step": optional(between(0, _MOST), 0),
    "epoch": optional(not_negative, 0),
    "best_model_checkpoint": optional(text),
    "log_history": items(lambda entry: entry),
}
_ENERGY: Kinds = {**dict.fromkeys(("kwh", "seconds"), not_negative), "samples": between(0, _MOST)}


def read_state(folder: Path) -> dict[str, Any] | None:
    """trainer_state.json of a run or checkpoint, or None; of its log what can be drawn.

    A log entry that has no step is left out, and so is what is not a number of the others.
    """
    path = folder / STATE_FILE
    state = read_if_whole(path, _STATE, "the training's log is not shown, and how far it came is not known")
    if state is None:
        return None
    entries = [entry for entry in state["log_history"] if isinstance(entry, dict)]
    entries = [entry for entry in entries if not mistakes(entry, {"step": between(0, _MOST)})]
    if len(entries) < len(state["log_history"]):
        warn_once(f"{path}: {len(state['log_history']) - len(entries)} log entries are damaged and left out")
    numbers = [{name: value for name, value in entry.items() if is_number(value)} for entry in entries]
    return state | {"log_history": numbers}


def read_energy(folder: Path) -> dict[str, Any] | None:
    """energy.json of a run that was trained with `--log_energy`."""
    return read_if_whole(folder / ENERGY_FILE, _ENERGY, "the energy that was measured is not known any more")


def global_batch(folder: Path) -> int:
    """Samples that each optimizer step of a run learns from. `ValueError` for a damaged run.json."""
    return read_record(folder / RUN_FILE, {"global_batch": between(1, _MOST)})["global_batch"]
