"""Robot policies that answer in plain text: a vision-language model fine-tuned to write its next actions as integers.

One episode's way through the package, top to bottom: `episodes` → `chat` → `collator` → `training` → `grammar` →
`policy` → `rollout` → `results`. The public names below load on first use, so that `import vla0_trl` stays instant.
"""

from importlib import import_module

_EXPORTS = {
    "ActionGrammarLogitsProcessor": "grammar",
    "ActionParseError": "actions",
    "ActionTokenizer": "actions",
    "NormStats": "actions",
    "TemporalEnsembler": "ensembling",
    "VLAConfig": "config",
    "VLADataCollator": "collator",
    "VLAPolicy": "policy",
}

__all__ = sorted(_EXPORTS)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
