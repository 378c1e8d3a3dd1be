"""A LoRA adapter and its base model as one checkpoint, written only if it answers as the adapter does."""

import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vla0_trl.config import VLAConfig
from vla0_trl.models.fingerprint import is_adapter
from vla0_trl.models.loading import checkpoint_folder, load_model, load_processor
from vla0_trl.processing.collator import VLADataCollator

# Largest difference of logits, over the largest logit: of sums in another order, and of weights rounded to 8 bits.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def merge(name_or_path: str, output_dir: Path, dtype: torch.dtype, revision: str | None = None) -> None:
    """Write base model and adapter as one checkpoint into a new folder.

    `ValueError` if it is no adapter, its base model is another one now, or the merged model answers differently.
    """
    folder = checkpoint_folder(name_or_path, revision)
    if not is_adapter(folder):
        raise ValueError(f"{name_or_path} has no adapter to merge: it is a whole model already")
    if output_dir.is_dir() and any(output_dir.iterdir()):
        raise FileExistsError(f"{output_dir} is not empty: choose another --output_dir")
    from vla0_trl.models.adapters import check_tied_targets, merge_adapter  # PEFT takes seconds to import

    config = VLAConfig.from_pretrained(folder)
    processor = load_processor(folder, config)
    prompt = example(processor, config)
    # Summed in float32, whatever is written: bfloat16 would swallow most of a small change.
    adapter = load_model(folder, dtype=torch.float32)
    check_tied_targets(adapter)
    expected = logits(adapter, prompt)
    model = merge_adapter(adapter)
    check_same(logits(model, prompt), expected, TOLERANCE[torch.float32])

    written = output_dir.with_name(f"{output_dir.name}.partial")
    shutil.rmtree(written, ignore_errors=True)  # of a merge that was stopped
    for part in (model.to(dtype), processor, config):
        part.save_pretrained(written)
    del adapter, model
    try:
        check_same(logits(load_model(written), prompt), expected, TOLERANCE[dtype])
    except ValueError:
        shutil.rmtree(written)
        raise
    if output_dir.is_dir():
        output_dir.rmdir()  # empty
    written.rename(output_dir)


def example(processor, config: VLAConfig) -> dict[str, torch.Tensor]:
    """One row of noise as the model takes it: pictures, the statistics' mean as state and as every action."""
    noise = np.random.default_rng(0).integers(0, 256, (config.image_size, config.image_size, 3), np.uint8)
    row = {
        "images": [Image.fromarray(noise)] * len(config.cameras),
        "task": "merge",
        "raw_state": np.array(config.state_stats.mean if config.state_stats else []),
        "raw_action": np.tile(config.action_stats.mean, config.chunk_size),
    }
    batch = VLADataCollator(processor, config, train=False)([row])
    batch.pop("labels")
    return batch


@torch.no_grad()
def logits(model: torch.nn.Module, prompt: dict[str, torch.Tensor]) -> torch.Tensor:
    """float32 (1, length, vocabulary)."""
    return model.eval()(**prompt).logits.float()


def check_same(merged: torch.Tensor, adapter: torch.Tensor, tolerance: float) -> None:
    """`ValueError` if the largest difference of logits is more than this part of the largest logit."""
    difference = float((merged - adapter).abs().max() / adapter.abs().max())
    if not difference <= tolerance:  # so written that NaN is one, too
        raise ValueError(
            f"the merged model does not answer as the adapter does: logits differ by {difference:.2g} of the largest, "
            f"and {tolerance:g} is rounding. Use the adapter as it is"
        )
