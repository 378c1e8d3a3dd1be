"""Which weights a folder holds: hashes of checkpoints, and adapters with the base model they belong to."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from transformers.utils import cached_file

from vla0_trl.config import CONFIG_NAME

ADAPTER_CONFIG = "adapter_config.json"
BASE_FINGERPRINT = "base_model.json"  # beside an adapter: of which weights it is a change
_PROBES, _PROBE_BYTES = 64, 4096


def is_adapter(name_or_path: str | Path) -> bool:
    """Whether this is a folder with a PEFT adapter instead of a whole model."""
    return (Path(name_or_path) / ADAPTER_CONFIG).is_file()


def base_model_of(adapter: str | Path) -> str:
    """The base model that an adapter names; if that was a folder and the run has moved, the one beside the adapter."""
    named = json.loads((Path(adapter) / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
    if not Path(named).is_absolute() or Path(named).is_dir():
        return named
    for folder in (Path(adapter), *Path(adapter).resolve().parents[:2]):
        if (folder / Path(named).name).is_dir():
            return str(folder / Path(named).name)
    raise FileNotFoundError(f"{adapter}: its base model {named} is gone; put the folder back, or beside the adapter")


def checkpoint_hash(folder: Path) -> str:
    """sha256 over what decides a checkpoint's answers: its configs and weights, in the order of their names."""
    names = {CONFIG_NAME, "config.json", "adapter_config.json"}
    paths = sorted(path for path in folder.iterdir() if path.name in names or path.suffix == ".safetensors")
    if not any(path.suffix == ".safetensors" for path in paths):
        raise FileNotFoundError(f"{folder} has no *.safetensors: not a whole checkpoint")
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def fingerprint(name_or_path: str | Path) -> str:
    """Tells one model's weights from another's: a hash of names, shapes and a few thousand values, in milliseconds.

    Args:
        name_or_path: a folder, or a Hub id that has been downloaded.
    """
    config = Path(cached_file(str(name_or_path), "config.json", local_files_only=True))
    digest = hashlib.sha256()
    for file in sorted(config.parent.glob("*.safetensors")):
        with file.open("rb") as data:
            header = int.from_bytes(data.read(8), "little")
            digest.update(data.read(header))
            size = file.stat().st_size - header - 8
            for part in range(_PROBES):
                data.seek(header + 8 + size * part // _PROBES)
                digest.update(data.read(_PROBE_BYTES))
    return digest.hexdigest()


def save_base_fingerprint(adapter: Path) -> None:
    """Write beside an adapter which weights it is a change of; it would load on others of that shape, and be noise."""
    name = base_model_of(adapter)
    (adapter / BASE_FINGERPRINT).write_text(json.dumps({"name": name, "fingerprint": fingerprint(name)}) + "\n")


def check_base(adapter: str | Path, base: str) -> None:
    """`ValueError` if `base` holds other weights than the adapter was trained on; adapters of other programs pass."""
    file = Path(adapter) / BASE_FINGERPRINT
    if not file.is_file():
        return  # made by another program
    trained_on = json.loads(file.read_text())
    if fingerprint(base) != trained_on["fingerprint"]:
        raise ValueError(
            f"{adapter} is an adapter of {trained_on['name']} as it was when it was trained, but {base} holds other "
            f"weights now: an adapter only means something on its own base model. If they are the same in another "
            f"file format, delete {file}"
        )
