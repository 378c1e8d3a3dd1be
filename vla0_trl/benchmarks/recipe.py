"""How fast a recipe trains, compared with a bare loop of the same model, optimizer and batch."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import PrinterCallback

from vla0_trl.benchmarks.ablation import flags
from vla0_trl.benchmarks.training import WARM_UP, Timed
from vla0_trl.processing.chat_tokenizer import IGNORED
from vla0_trl.training.arguments import parse_recipe
from vla0_trl.training.run import build_trainer, prepare
from vla0_trl.training.trainer import VLATrainer

# A run without what comes at intervals: episodes, probes, logs and checkpoints.
_PLAIN = dict.fromkeys(("save_strategy", "eval_strategy", "logging_strategy"), "no")
_PLAIN |= dict.fromkeys(("dagger_steps", "rollout_steps", "probe_steps"), 0)
_PLAIN |= {"report_to": "none", "disable_tqdm": True}


def recipe_speed(recipe: Path, dataset: str | None, steps: int) -> dict[str, float]:
    """Rows/s of a recipe's training steps, and of their parts.

    Args:
        recipe (`Path`): a YAML; dataset (`str`, *optional*): a folder or Hub id instead of the one that it names.
        steps (`int`): timed optimizer steps.

    Returns:
        `dict`: `"recipe"`: steps as users run them; `"bare loop"`: forward pass, loss on the answer's tokens, backward
        pass and optimizer on one batch that is there already, the floor; `"collator"`: rows to batches alone.
    """
    with tempfile.TemporaryDirectory() as folder:
        changes = _PLAIN | {"max_steps": WARM_UP + steps, "output_dir": f"{folder}/run"}
        changes |= {"dataset_name": dataset} if dataset else {}
        run = prepare(*parse_recipe(recipe, "", ["--config", str(recipe), *flags(changes)]))
        try:
            trainer, clock = build_trainer(run, None), Timed()
            trainer.add_callback(clock)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        finally:
            run.folder.close()
    batches = iter(trainer.get_train_dataloader())
    inputs = trainer._prepare_inputs(next(batches))
    rows = len(inputs["input_ids"])
    return {
        "recipe": steps * rows / clock.seconds,
        "bare loop": rows / _seconds(lambda: _bare_step(trainer, inputs), steps),
        "collator": rows / _seconds(lambda: next(batches), steps),
    }


def _bare_step(trainer: VLATrainer, inputs: dict[str, torch.Tensor]) -> None:
    """One optimizer step without a trainer around it, without metrics, scoring the answers' positions alone."""
    targets = inputs["labels"][:, 1:]
    answers = targets.shape[1] - (targets != IGNORED).any(0).int().argmax()
    given = {name: value for name, value in inputs.items() if name not in ("labels", "row_indices")}
    logits = trainer.model(**given, use_cache=False, logits_to_keep=int(answers) + 1).logits[:, :-1]
    answer = targets[:, -answers:].flatten()
    nn.functional.cross_entropy(logits.flatten(0, 1).float(), answer, ignore_index=IGNORED).backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


def _seconds(work: Callable[[], object], times: int) -> float:
    """Of one call, after a few that warm up."""
    for _ in range(WARM_UP):
        work()
    began = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - began) / times
