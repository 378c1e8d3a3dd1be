"""A recipe's whole way at true size, without its weights and data: train, save, resume, merge, predict.

The architecture is the recipe's, with random weights; processor, optimizer, adapter and checkpoints are the real ones;
rows are synthetic, of true shape. It shows that every part works and what it needs, not that anything is learnt.
"""

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from vla0_trl.benchmarks.memory import random_checkpoint
from vla0_trl.benchmarks.memory_table import GIB
from vla0_trl.benchmarks.plan import Plan
from vla0_trl.benchmarks.synthetic import save_synthetic, synthetic_dataset
from vla0_trl.files import write_whole
from vla0_trl.manifest import read_json
from vla0_trl.models.fingerprint import is_adapter
from vla0_trl.policy.merging import merge
from vla0_trl.policy.policy import VLAPolicy
from vla0_trl.run_folder import STATE_FILE
from vla0_trl.training.run import prepare, train

_FIRST, _STEPS = 2, 3  # optimizer steps: before the training ends and is resumed, and in all
_REPORT = "rehearsal.json"


class Rehearsal:
    """The parts of a recipe's way, in order; those that an earlier call has finished in this folder are not repeated.

    Args:
        plan (`Callable`): gives the recipe's arguments, with further settings by name.
        kind, source (`str`): of rows and model, see [`recipe_cost`].
    """

    def __init__(self, plan: Callable[..., Plan], kind: str, source: str, folder: Path):
        self.plan, self.kind, self.source, self.folder = plan, kind, source, folder
        self.run, self.merged, self.chunk = folder / "run", folder / "merged", folder / "chunk.npy"
        self.settings = {"model_name_or_path": folder / "model", "dataset_name": folder / "rows"}
        self.settings |= {"output_dir": self.run, "save_steps": 1}

    def __call__(self) -> dict[str, dict[str, float]]:
        """Seconds and peak memory in GiB of each part, of the GPU if there is one."""
        parts = {
            "random weights": self.write_weights,
            f"train {_FIRST} steps, save": lambda: train(prepare(*self.plan(max_steps=_FIRST, **self.settings))),
            f"resume, train to step {_STEPS}, save": self.resume,
            "load, predict a chunk": self.predict,
            "merge, predict with the merged model": self.merge,
        }
        report = read_json(self.folder / _REPORT) or {}
        for name, part in parts.items():
            if name not in report:
                began = time.perf_counter()
                part()
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
                if torch.cuda.is_available():
                    peak = torch.cuda.max_memory_allocated()
                    torch.cuda.reset_peak_memory_stats()
                report[name] = {"seconds": time.perf_counter() - began, "peak_gib": peak / GIB}
                write_whole(self.folder / _REPORT, json.dumps(report, indent=1) + "\n")
            print(f"{report[name]['seconds']:6.0f} s  {report[name]['peak_gib']:5.1f} GiB  {name}", flush=True)
        return report

    def write_weights(self) -> None:
        model_args = self.plan(max_steps=_FIRST, **self.settings)[2]
        random_checkpoint(self.source, self.settings["model_name_or_path"], getattr(torch, str(model_args.dtype)))
        save_synthetic(self.kind, 8, self.settings["dataset_name"])

    def resume(self) -> None:
        train(prepare(*self.plan(max_steps=_STEPS, **self.settings)))
        state = read_json(self.run / STATE_FILE)
        losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
        if state["global_step"] != _STEPS or len(losses) != _STEPS or not np.isfinite(losses).all():
            raise RuntimeError(f"step {state['global_step']} of {_STEPS} with the losses {losses}: it was not resumed")

    def predict(self) -> None:
        np.save(self.chunk, self.answer(self.run))

    def merge(self) -> None:
        if is_adapter(self.run):
            merge(str(self.run), self.merged, torch.float32)
            if not np.allclose(self.answer(self.merged), np.load(self.chunk), atol=1e-3):
                raise RuntimeError("the merged model's actions are not the adapter's")

    def answer(self, checkpoint: Path) -> np.ndarray:
        """The chunk (1, chunk_size, action_dim) that a checkpoint answers to the first row."""
        dataset, config = synthetic_dataset(self.kind, 1)
        images = dict(zip(config.cameras, map(np.asarray, dataset[0]["images"]), strict=True))
        observation = {"images": images, "state": np.float32(dataset[0]["raw_state"]), "task": dataset[0]["task"]}
        return VLAPolicy.from_pretrained(checkpoint, dtype=torch.float32).predict_action_chunk([observation])
