"""The folder of a training run: what is in it, and its newest whole checkpoint."""

from __future__ import annotations

from pathlib import Path

from vla0_trl.config import CONFIG_NAME

RUN_FILE = "run.json"  # every setting that changes what is learnt; `recipe` writes it
STATE_FILE = "trainer_state.json"  # steps and logs: transformers' TRAINER_STATE_NAME, without importing its trainer
ENERGY_FILE = "energy.json"  # what the training took; `run_report` writes it, `report` reads it


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest whole checkpoint-N of a run."""
    whole = [path.parent for path in output_dir.glob(f"checkpoint-*/{CONFIG_NAME}")]
    return max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)
