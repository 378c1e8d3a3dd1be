"""Robot policies that answer in plain text: a vision-language model fine-tuned to write its next actions as integers.

An episode goes through the rooms in this order: `data` (episodes become chat rows) → `processing` (rows become tokens,
labels, masks and pixels) → `training` (with `models`) → `policy` (answers become actions) → `evaluation` (in `envs`).
The public names below load on first use, so that `import vla0_trl` stays instant.
"""

import logging
import os
from importlib import import_module

from vla0_trl.old_names import install

_EXPORTS = {
    "ActionGrammarLogitsProcessor": "policy.grammar",
    "ActionParseError": "actions",
    "ActionTokenizer": "actions",
    "NormStats": "stats",
    "TemporalEnsembler": "policy.execution",
    "VLAConfig": "config",
    "VLADataCollator": "processing.collator",
    "VLAPolicy": "policy.policy",
}

__all__ = sorted(_EXPORTS)
__version__ = "0.2.0"


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def pip_install(extra: str) -> str:
    """The command that installs an extra of ours, in the versions that were tested."""
    return f'pip install -c requirements.lock -e ".[{extra}]"'


def __dir__() -> list[str]:
    return [*globals(), *__all__]


install()
# Threads of torch's that wait for each other sleep instead of spinning, if torch is not imported yet: beside other
# programs, spinning takes their cores away (recipes/measurements.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Where HOME can't be written, matplotlib uses a temporary folder and says so, which is no problem.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
# PEFT imports bitsandbytes where it is installed, which then warns that the package `kernels` is missing. That is only
# a faster 4-bit product on CPUs; without it everything works. Here, because every import of the package passes here.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit" not in record.getMessage())
