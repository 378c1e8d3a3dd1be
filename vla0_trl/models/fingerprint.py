"""Which weights a folder holds: hashes of checkpoints, and adapters with the base model they belong to."""

import hashlib
import json
from pathlib import Path

from transformers.utils import cached_file

from vla0_trl.config import CONFIG_NAME
from vla0_trl.schema import line_of_text, optional, read_record, text

ADAPTER_CONFIG = "adapter_config.json"
BASE_FINGERPRINT = "base_model.json"  # saved with an adapter: which weights it changes
_DECIDE = ("*.safetensors", CONFIG_NAME, "config.json", ADAPTER_CONFIG, "*processor_config.json", "tokenizer*")
_DECIDE += ("chat_template*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model")
_PROBES, _PROBE_BYTES = 64, 4096


def is_adapter(name_or_path: str | Path) -> bool:
    """Whether this is a folder with a PEFT adapter instead of a whole model."""
    return (Path(name_or_path) / ADAPTER_CONFIG).is_file()


def base_model_of(adapter: str | Path) -> str:
    """The base model that an adapter names: a folder, or a Hub id.

    A relative path counts from a folder that the adapter is in, whatever the current directory is. If a run has moved,
    the base model that moved with it is taken: the folder of that name beside the adapter.
    """
    named = _adapter_config(adapter)["base_model_name_or_path"]
    around = [Path(adapter).resolve(), *Path(adapter).resolve().parents]
    candidates = [folder / named for folder in around]  # all the same one, if the path is absolute
    candidates.append(Path(named))
    is_path = Path(named).is_absolute() or named.startswith(".") or named.count("/") > 1
    if is_path:
        candidates += [folder / Path(named).name for folder in around[:3]]
    for candidate in candidates:
        if candidate.is_dir():
            return str(candidate.resolve())
    if is_path:
        raise FileNotFoundError(
            f"{adapter}: its base model {named} is gone; put the folder back, or beside the adapter"
        )
    return named


def base_revision_of(adapter: str | Path) -> str | None:
    """The revision of the Hub's base model that an adapter was trained on; None: the newest, or a folder."""
    return _adapter_config(adapter)["revision"]


def _adapter_config(adapter: str | Path) -> dict:
    kinds = {"base_model_name_or_path": line_of_text, "revision": optional(text)}
    return read_record(Path(adapter) / ADAPTER_CONFIG, kinds)


def weight_files(name_or_path: str | Path, revision: str | None = None) -> list[Path]:
    """The safetensors files of a folder, or of a Hub id that has been downloaded."""
    if Path(name_or_path).is_dir():
        return sorted(Path(name_or_path).glob("*.safetensors"))
    config = cached_file(str(name_or_path), "config.json", revision=revision, local_files_only=True)
    return sorted(Path(config).parent.glob("*.safetensors"))


def checkpoint_hash(folder: Path) -> str:
    """sha256 over all that decides a checkpoint's answers: weights, configs, processor, tokenizer, chat template."""
    paths = sorted({path for pattern in _DECIDE for path in folder.glob(pattern)})
    if not any(path.suffix == ".safetensors" for path in paths):
        raise FileNotFoundError(f"{folder} has no *.safetensors: not a whole checkpoint")
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def fingerprint(name_or_path: str | Path, revision: str | None = None) -> str:
    """Tells one model's weights from another's: a hash of names, shapes and a few thousand values, in milliseconds."""
    digest = hashlib.sha256()
    for file in weight_files(name_or_path, revision):
        with file.open("rb") as data:
            header = int.from_bytes(data.read(8), "little")
            digest.update(data.read(header))
            size = file.stat().st_size - header - 8
            for part in range(_PROBES):
                data.seek(header + 8 + size * part // _PROBES)
                digest.update(data.read(_PROBE_BYTES))
    return digest.hexdigest()


def save_base_fingerprint(adapter: Path) -> None:
    """Save with an adapter which base weights it belongs to: it would also load on others of that shape."""
    name, revision = base_model_of(adapter), base_revision_of(adapter)
    base = {"name": name, "fingerprint": fingerprint(name, revision)}
    (adapter / BASE_FINGERPRINT).write_text(json.dumps(base) + "\n")


def check_base(adapter: str | Path, base: str, revision: str | None = None) -> None:
    """`ValueError` if `base` holds other weights than the adapter was trained on; adapters of other programs pass."""
    file = Path(adapter) / BASE_FINGERPRINT
    if not file.is_file():
        return  # made by another program
    trained_on = read_record(file, {"name": text, "fingerprint": text})
    if fingerprint(base, revision) != trained_on["fingerprint"]:
        raise ValueError(
            f"{adapter} is an adapter of {trained_on['name']} as it was when it was trained, but {base} holds other "
            f"weights now: an adapter only means something on its own base model. If they are the same in another "
            f"file format, delete {file}"
        )
