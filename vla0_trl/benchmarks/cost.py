"""What a recipe costs before it runs: tokens and FLOPs of a sample, and hours on cards that are known by their peak.

FLOPs are arithmetic over the layers of an architecture that is built without weights: for each weight and position 2
forwards, 2 for the gradient of the input, 2 for that of the weight if it is trained; and the products of attention.
Hours take a fixed share of a card's peak: an estimate. What a card really reaches, only a run on it tells.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText

from vla0_trl.benchmarks.plan import Plan
from vla0_trl.benchmarks.synthetic import synthetic_dataset
from vla0_trl.data.chat_dataset import align_config
from vla0_trl.models.loading import freeze_vision, load_processor
from vla0_trl.processing.chat_tokenizer import IGNORED
from vla0_trl.processing.collator import VLADataCollator
from vla0_trl.training.run import lora_config

# TFLOP/s in bfloat16 without sparsity, of NVIDIA's data sheets; of the RTX 4090 half of it, with sums in float32.
PEAKS = {"RTX 3060": 51.0, "RTX 4070": 117.0, "RTX 3090": 142.0, "RTX 4090": 165.0, "A100": 312.0, "H100": 989.0}
SHARE = 0.2  # of it: an assumption, as everywhere in recipes/README.md
_CONNECTORS = ("connector", "merger")
_ENCODERS = ("vision_model", "visual", "vision_tower")


@dataclass(frozen=True)
class Cost:
    """Of one sample of a recipe, and of its run."""

    tokens: int
    answer_tokens: int
    tflop: float  # to train on one sample
    samples: int  # of the run

    def samples_per_second(self, card: str) -> float:
        """Estimated, for one of `PEAKS`."""
        return PEAKS[card] * SHARE / self.tflop

    def hours(self, card: str) -> float:
        """Estimated, of the whole run."""
        return self.samples / self.samples_per_second(card) / 3600


def recipe_cost(plan: Plan, kind: str, source: str | Path) -> Cost:
    """What a recipe costs, with rows of a kind (see [`synthetic_dataset`]).

    Of `source`, the folder or Hub id of the model, only config and processor are read.
    """
    data, training, model_args = plan
    dataset, stored = synthetic_dataset(kind, 2)
    config = align_config(dataset, stored, **data.overrides())
    processor = load_processor(source, config)
    collator = VLADataCollator(processor, config, train=False, defer_images=True, stored_cameras=stored.cameras)
    batch = collator([dataset[0]])
    tokens = batch["input_ids"].shape[1]
    image_tokens = int((batch["input_ids"] == processor.image_token_id).sum())
    answer_tokens = int((batch["labels"] != IGNORED).sum())
    backbone = AutoConfig.from_pretrained(source)
    per_image = (config.image_size // backbone.vision_config.patch_size) ** 2
    images = len(config.cameras)
    positions = {"text": tokens, "connector": image_tokens, "vision": images * per_image, "head": answer_tokens}
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(backbone)
    if training.freeze_vision:
        freeze_vision(model)
    if (adapter := lora_config(model_args, training)) is not None:
        model = get_peft_model(model, adapter)
    text, vision = backbone.get_text_config(), backbone.vision_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    layers = getattr(vision, "depth", None) or vision.num_hidden_layers  # Qwen's name, and SmolVLM's
    passes = 3 if _trains(model, "vision") else 1
    flop = sum(_linear_flop(model, positions).values())
    flop += 3 * text.num_hidden_layers * 4 * tokens**2 * text.num_attention_heads * head_dim
    flop += passes * images * layers * 4 * per_image**2 * vision.hidden_size
    steps = training.max_steps * training.per_device_train_batch_size * training.gradient_accumulation_steps
    return Cost(tokens, answer_tokens, flop / 1e12, steps)


def _linear_flop(model: torch.nn.Module, positions: dict[str, int]) -> dict[str, float]:
    """By the name of each layer that multiplies."""
    trained = {part: _trains(model, part) for part in positions}
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d | torch.nn.Conv3d):
            part = _part(name)
            weight = module.weight
            passes = 6 if weight.requires_grad else 4 if part != "vision" or trained["vision"] else 2
            found[name] = passes * weight.numel() * positions[part]
    return found


def _trains(model: torch.nn.Module, part: str) -> bool:
    return any(p.requires_grad for name, p in model.named_parameters() if _part(name) == part)


def _part(name: str) -> str:
    if any(word in name for word in _CONNECTORS):
        return "connector"
    if any(word in name for word in _ENCODERS):
        return "vision"
    return "head" if "lm_head" in name else "text"
