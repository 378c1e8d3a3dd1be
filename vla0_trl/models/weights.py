"""Checks of stored weights, before anything is computed with them: all there, of the right shape, finite."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from vla0_trl.config import CONFIG_NAME
from vla0_trl.models.fingerprint import weight_files
from vla0_trl.schema import is_number, one_line

_LAYERS, _MOST_LAYERS = {"num_hidden_layers", "depth"}, 1000  # a config of 100,000 takes minutes to read
_NUMBERS_PER_BYTE = 8  # four times what 4-bit weights have


def load_whole(name_or_path: str | Path, revision: str | None, **options: Any) -> PreTrainedModel:
    """A backbone or a whole checkpoint. transformers itself fills gaps with random numbers and a warning.

    `ValueError` if weights are missing, of another shape or not finite; or, in a checkpoint of ours, unexpected.
    """
    check_config(name_or_path, revision)
    _check_size(name_or_path)
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
    except OSError as error:  # says which file is absent
        raise OSError(f"{name_or_path}: {one_line(error)}") from error
    except Exception as error:  # tokenizers raises this class itself, and others whatever a wrong value leads to
        raise not_loaded(name_or_path, error) from error


def not_loaded(name_or_path: str | Path, error: Exception) -> ValueError:
    """What to say of a model that a library can't load."""
    said = f"{type(error).__name__}: {one_line(error, 200)}"
    return ValueError(
        f"{name_or_path}: transformers can't load it ({said}): if one of its files is damaged, take the model from "
        "where it was saved again"
    )


def check_config(name_or_path: str | Path, revision: str | None = None) -> None:
    """`ValueError` for a config.json that transformers would read for minutes before it finds the mistake."""
    with sound(name_or_path):
        found, _ = PreTrainedConfig.get_config_dict(name_or_path, revision=revision)
        parts = [found, *(value for value in found.values() if isinstance(value, dict))]
    for part in parts:
        for field in _LAYERS & part.keys():
            if is_number(part[field]) and part[field] > _MOST_LAYERS:
                raise ValueError(f"{name_or_path}: config.json: {field} is {part[field]}, wanted up to {_MOST_LAYERS}")


def _check_size(name_or_path: str | Path) -> None:
    """`ValueError` for a folder whose config.json is of a model that its weight files are far too small for.

    transformers would fill memory with what is missing.
    """
    stored = sum(file.stat().st_size for file in weight_files(name_or_path)) if Path(name_or_path).is_dir() else 0
    if not stored or is_deepspeed_zero3_enabled():  # ZeRO-3 fills every model that is built, also one on "meta"
        return
    with sound(name_or_path), torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(name_or_path))
    if (numbers := model.num_parameters()) > _NUMBERS_PER_BYTE * stored:
        raise ValueError(
            f"{name_or_path}: config.json is of a model of {numbers} numbers, and its weight files have {stored} "
            "bytes: take both from where they were saved again"
        )


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
