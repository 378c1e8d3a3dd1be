"""Submodules under the names that they had in earlier versions: they still import, with a warning, until 0.3."""

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Where a room has an old name now (policy, training, evaluation, envs.pusht, envs.libero), nothing is redirected.
MOVED = {
    "chat": "processing.chat",
    "tokenization": "processing.chat_tokenizer",
    "images": "processing.images",
    "collator": "processing.collator",
    "modeling": "models.loading",
    "nano": "models.nano",
    "forward": "models.attention",
    "episodes": "data.episodes",
    "chat_dataset": "data.chat_dataset",
    "grammar": "policy.grammar",
    "ensembling": "policy.execution",
    "decoding": "policy.speculative.decoder",
    "recipe": "training.run",
    "arguments": "training.arguments",
    "rollout": "evaluation.rollout",
    "results": "evaluation.episode_log",
    "metrics": "evaluation.metrics",
    "evaluation.runner": "evaluation.driver",
}


class _OldNames(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == "vla0_trl" and name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = f"vla0_trl.{MOVED[spec.name.partition('.')[2]]}"
        warnings.warn(f"{spec.name} is now {new}; the old name goes in 0.3", DeprecationWarning, stacklevel=2)
        module = import_module(new)
        spec.loader_state = module.__spec__  # which the import of this name overwrites
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run: the module under its new name has been."""
        module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """Let imports find the old names, after everything else has been looked for."""
    if not any(isinstance(finder, _OldNames) for finder in sys.meta_path):
        sys.meta_path.append(_OldNames())
