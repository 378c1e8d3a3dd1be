"""Checks of stored weights, before anything is computed with them: all there, of the right shape, finite."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForImageTextToText, PreTrainedModel

from vla0_trl.config import CONFIG_NAME
from vla0_trl.models.fingerprint import weight_files


def load_whole(name_or_path: str | Path, revision: str | None, **options: Any) -> PreTrainedModel:
    """A backbone or a whole checkpoint; transformers itself fills gaps with random numbers and a warning.

    Raises:
        ValueError: weights are missing, of another shape or not finite; or, in a checkpoint of ours, unexpected.
    """
    with sound(name_or_path):
        model, info = AutoModelForImageTextToText.from_pretrained(
            name_or_path, revision=revision, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    refuse_weights(name_or_path, "missing", info["missing_keys"])
    refuse_weights(name_or_path, "of another shape than the config says", [key[0] for key in info["mismatched_keys"]])
    if (Path(name_or_path) / CONFIG_NAME).is_file():  # others' backbones may carry more than a policy needs
        refuse_weights(name_or_path, "unexpected", info["unexpected_keys"])
    check_finite(name_or_path, revision)
    return model


@contextmanager
def sound(name_or_path: str | Path) -> Iterator[None]:
    """What transformers raises while it reads a damaged model, as one `ValueError` that names it."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{name_or_path}: a weight file is damaged or cut off: {error}") from error
    except (TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(
            f"{name_or_path}: one of its files is damaged, or of a model that transformers can't load ({said}): take "
            "the model from where it was saved again"
        ) from error


def check_finite(name_or_path: str | Path, revision: str | None = None) -> None:
    """`ValueError` if a stored weight holds NaN or infinity. Of the files: 4-bit weights don't show it any more."""
    for path in weight_files(name_or_path, revision):
        with safe_open(path, "pt") as file:
            bad = [name for name in file.keys() if not _is_finite(file.get_tensor(name))]  # noqa: SIM118
        refuse_weights(path, "not finite (NaN or infinity)", bad)


def _is_finite(tensor: torch.Tensor) -> bool:
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return True
    # A sum is the cheapest look at all values; it may overflow where each of them is finite.
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(total.isfinite()) or bool(tensor.isfinite().all())


def refuse_weights(name_or_path: str | Path, fault: str, names: Collection[str]) -> None:
    """`ValueError` that names the first weights with this fault, if there are any."""
    if names:
        shown = ", ".join(sorted(names)[:3])
        raise ValueError(
            f"{name_or_path}: {len(names)} weights are {fault}: {shown}{', …' if len(names) > 3 else ''}. Take the "
            "checkpoint from where it was saved again, or an earlier one"
        )
