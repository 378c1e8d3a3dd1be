"""GPUs without bfloat16, and what to do with them."""

from __future__ import annotations

import torch

_FIRST_WITH_BFLOAT16 = (8, 0)  # compute capability: Ampere (A100, RTX 30) and later; T4 and RTX 20 have 7.5
PRECISION_ADVICE = (
    "float16 does not help: in it, VLA-0-Smol's training diverged. Train in float32 with LoRA (use_peft=true, "
    "dtype=float32, bf16=false), slower and with more memory, or take a card that has "
    "bfloat16: RTX 30 or newer, A10, L4, A100"
)


def without_bfloat16() -> str | None:
    """The GPU's name if it has no units for bfloat16; torch's own question says yes, since it emulates it, slowly."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() >= _FIRST_WITH_BFLOAT16:
        return None
    return torch.cuda.get_device_name()
