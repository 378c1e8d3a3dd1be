"""The chat dataset: its columns, its text, loading it, and fitting its config to what a recipe asks for.

`convert` and `shards` write such datasets.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Image, List, Value, load_dataset
from datasets import config as datasets_config
from datasets.exceptions import DatasetsError
from datasets.utils.logging import CRITICAL, set_verbosity
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from yaml import YAMLError

from vla0_trl.actions import NormStats, Quantizer, join_integers
from vla0_trl.config import VLAConfig
from vla0_trl.manifest import CONVERSION_NAME, read_json
from vla0_trl.processing.chat import completion_messages, prompt_messages
from vla0_trl.schema import one_line

_MESSAGES = List({"role": Value("string"), "content": Value("string")})
# One row per frame. `prompt` and `completion` are TRL's own form of the text columns, for training with plain TRL. Our
# collator writes its text from the raw columns, which are in environment units: bins and the like can still change.
FEATURES = Features(
    {
        "images": List(Image()),
        "task": Value("string"),
        "state": Value("string"),
        "action": Value("string"),
        "prompt": _MESSAGES,
        "completion": _MESSAGES,
        "episode_index": Value("int64"),
        "frame_index": Value("int64"),
        "raw_state": List(Value("float32")),
        "raw_action": List(Value("float32")),
    }
)
_TEXT = ("state", "action", "prompt", "completion")
SCHEMA = FEATURES.arrow_schema  # its metadata tells load_dataset that images are images
RAW_SCHEMA = Features({name: feature for name, feature in FEATURES.items() if name not in _TEXT}).arrow_schema
_STATS_BATCH = 10_000  # rows of the raw columns in memory at once: 2 MB at 10 × 5 values


def with_statistics(config: VLAConfig, batches: Callable[[], Iterable[pa.Table]]) -> VLAConfig:
    """The config with the statistics of what its text will hold, in constant memory.

    Args:
        batches (`Callable`): each call gives all rows, some at a time; only their raw columns are needed.
    """
    states = None
    if config.state_dim:
        states = NormStats.from_batches(lambda: (_vectors(rows, "raw_state") for rows in batches()))
    return config.replace(action_stats=_action_stats(config, batches), state_stats=states)


def chat_rows(raw: pa.Table, config: VLAConfig) -> pa.Table:
    """Rows as `RAW_SCHEMA` has them, with their text; the config has statistics."""
    states = _vectors(raw, "raw_state")
    windows = _vectors(raw, "raw_action").reshape(len(raw), config.chunk_size, config.action_dim)
    tokenizer, state = config.action_tokenizer(), [""] * len(raw)
    action = [tokenizer.encode(window, now) for window, now in zip(windows, states, strict=True)]
    if config.state_dim:  # also where the prompt does not show it
        quantizer = Quantizer(config.state_stats, config.num_bins, config.normalization)
        state = [join_integers(row) for row in quantizer.encode(states)]
    columns = dict(zip(raw.column_names, raw.columns, strict=True)) | {
        "state": state,
        "action": action,
        "prompt": [prompt_messages(config, *row) for row in zip(raw["task"].to_pylist(), state, strict=True)],
        "completion": [completion_messages(text) for text in action],
    }
    return pa.table(columns, SCHEMA)


def load_chat_dataset(name_or_path: str | Path, revision: str | None = None) -> tuple[Dataset, VLAConfig]:
    """A chat dataset and its config, from a local folder or the Hub; all columns of the contract are there."""
    config = VLAConfig.from_pretrained(name_or_path, repo_type="dataset", revision=revision)
    dataset = load_rows(str(name_or_path), revision)
    missing = FEATURES.keys() - set(dataset.column_names)
    if missing:
        raise ValueError(
            f"{name_or_path}: columns {sorted(missing)} are missing, it has {sorted(dataset.column_names)}: convert "
            "the episodes again with data_prep/"
        )
    return dataset, config


def load_rows(name: str, revision: str | None = None) -> Dataset:
    """The split `train` of a local folder or a Hub repository; `ValueError` for files that can't be read.

    Of a folder in our layout its own files are read, whatever its card names as data files: others, or addresses.
    """
    check_loadable(name)
    _check_cache(Path(datasets_config.HF_DATASETS_CACHE))
    set_verbosity(CRITICAL)  # pages about a damaged file
    files = [str(path) for path in sorted(Path(name).glob("data/train-*.parquet")) if path.is_file()]
    try:
        if files:
            dataset = load_dataset("parquet", data_files=files, split="train")
        else:
            dataset = load_dataset(name, split="train", revision=revision)
    except FileNotFoundError:
        raise
    # What `datasets` raises for damaged files, and for cards that are no YAML, or not what it expects.
    except (DatasetsError, ValueError, RuntimeError, AttributeError, ImportError, YAMLError) as error:
        why = one_line(error.__cause__ or error, 200)
        raise ValueError(f"{name}: its files can't be read ({why}): get or convert it again") from error
    if not len(dataset):
        raise ValueError(f"{name}: has no rows: convert the episodes again")
    return dataset


def conversion_record(name_or_path: str | Path, revision: str | None = None) -> dict[str, Any] | None:
    """What a dataset's conversion.json says of its making, from a folder or the Hub; None where there is none."""
    if Path(name_or_path).is_dir():
        return read_json(Path(name_or_path) / CONVERSION_NAME)
    try:
        file = hf_hub_download(str(name_or_path), CONVERSION_NAME, repo_type="dataset", revision=revision)
    except (EntryNotFoundError, HFValidationError):
        return None
    return read_json(Path(file))


def check_loadable(path: str | Path) -> None:
    """`ValueError` for a folder that `load_dataset` would read as a pattern, or as a chain of URLs."""
    name = str(path)
    if "::" in name or not name.isprintable() or set("*?[]") & set(name):
        raise ValueError(f"the dataset's folder {name!r} has one of * ? [ ] :: or a line's end in its name: rename it")


def _check_cache(folder: Path) -> None:
    """`OSError` where `load_dataset` could not keep what it reads, as with a home that is absent or read-only."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise OSError(f"{folder}, the datasets' cache, can't be written: set HF_HOME to a folder that can")


def episode_indices(dataset: Dataset) -> np.ndarray:
    """int64 (rows,): which episode each row is of."""
    return np.asarray(dataset.with_format("numpy")["episode_index"][:])


def tasks_of(*datasets: Dataset | None) -> list[str]:
    """The tasks of some datasets, without reading their images."""
    return sorted({task for d in datasets if d is not None for task in d.select_columns("task").unique("task")})


def align_config(dataset: Dataset, dataset_config: VLAConfig, **overrides: Any) -> VLAConfig:
    """The config of a training run: the dataset's with a recipe's changes, with statistics that fit them.

    What is written as text may change freely, because the raw columns are still there: num_bins, normalization,
    use_state, relative_actions, use_system_prompt, a smaller chunk_size, waypoints, a subset or another order of the
    cameras, and all that concerns only the images' way into the model or the execution. The statistics are taken
    again, in constant memory, when `relative_actions`, `chunk_size` or `waypoints` changes.

    Args:
        dataset ([`~datasets.Dataset`]): all rows that the statistics should cover, with the raw columns.
        overrides: [`VLAConfig`] fields.

    `ValueError`: the stored data can't give what is asked for; names the field, both values and the fix.
    """
    for field in ("action_dim", "state_dim", "fps"):
        stored, asked = getattr(dataset_config, field), overrides.get(field, getattr(dataset_config, field))
        if asked != stored:
            raise ValueError(
                f"{field}={asked}, but the dataset was recorded with {field}={stored}: leave {field} out, or use "
                "another dataset"
            )
    chunk_size = overrides.get("chunk_size", dataset_config.chunk_size)
    if chunk_size > dataset_config.chunk_size:
        raise ValueError(
            f"chunk_size={chunk_size}, but the dataset stores chunks of {dataset_config.chunk_size}: convert it again "
            f"with --chunk_size {chunk_size}, or train with chunk_size={dataset_config.chunk_size}"
        )
    unknown = [camera for camera in overrides.get("cameras", []) if camera not in dataset_config.cameras]
    if unknown:
        raise ValueError(
            f"cameras={overrides['cameras']}, but the dataset has {dataset_config.cameras}: leave out {unknown}, or "
            "convert it again with --cameras"
        )
    config = dataset_config.replace(**overrides)
    if any(getattr(config, n) != getattr(dataset_config, n) for n in ("relative_actions", "written_steps")):
        raw = dataset.select_columns(["raw_action", "raw_state"]).with_format("arrow")
        config = config.replace(action_stats=_action_stats(config, lambda: raw.iter(batch_size=_STATS_BATCH)))
    return config


def clipped_shares(config: VLAConfig, batches: Callable[[], Iterable[pa.Table]]) -> dict[str, np.ndarray]:
    """The share of the values that the text clips, per dimension (D,), of the action and of a state in the prompt.

    Args:
        config (`VLAConfig`), batches (`Callable`): with the statistics of these rows; see [`with_statistics`].
    """
    if config.normalization == "min_max":
        return {}
    codecs = {"action": (config.action_tokenizer().quantizer, lambda rows: _written(config, rows))}
    if config.use_state:
        codecs["state"] = (config.state_quantizer(), lambda rows: _vectors(rows, "raw_state"))
    shares = {}
    for name, (quantizer, values) in codecs.items():
        counts = [(quantizer.clipped(written), len(written)) for written in map(values, batches())]
        shares[name] = sum(clipped for clipped, _ in counts) / sum(count for _, count in counts)
    return shares


def _action_stats(config: VLAConfig, batches: Callable[[], Iterable[pa.Table]]) -> NormStats:
    return NormStats.from_batches(lambda: (_written(config, rows) for rows in batches()))


def _written(config: VLAConfig, rows: pa.Table) -> np.ndarray:
    """What the action text will hold, (rows · written steps, action_dim)."""
    windows = _vectors(rows, "raw_action").reshape(len(rows), -1, config.action_dim)[:, config.written_steps]
    if config.relative_actions:
        windows = windows - _vectors(rows, "raw_state")[:, None, : config.action_dim].astype(np.float64)
    return windows.reshape(-1, config.action_dim)


def _vectors(rows: pa.Table, column: str) -> np.ndarray:
    """float32 (rows, D)."""
    return rows[column].combine_chunks().flatten().to_numpy().reshape(len(rows), -1)
