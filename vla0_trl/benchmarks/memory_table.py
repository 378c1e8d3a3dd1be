"""How much memory each recipe needs: the table that recipes/README.md and `vla0_trl.check` show.

`memory_table.json` is what `recipes/bench_memory.py … --json` wrote; measure again with the same command.
"""

import json
from pathlib import Path

TABLE = Path(__file__).with_name("memory_table.json")
GIB = 2**30
CARD = 12 * GIB
PARTS = ("weights", "gradients", "optimizer", "activations")


def load_table() -> dict[str, dict[str, float]]:
    """Each recipe's `weights_gib`, `gradients_gib`, `optimizer_gib`, `activations_gib` and `peak_gib`.

    Recipes are named as in recipes/: "libero/lora_12gb.yaml".
    """
    configs = json.loads(TABLE.read_text())["configs"]
    return {name.removeprefix("recipes/"): figures for name, figures in configs.items()}


def checkpoint_gib(figures: dict[str, float]) -> float:
    """A checkpoint's size: the weights that are trained, which are as large as their gradients, and Adam's state."""
    return figures["gradients_gib"] + figures["optimizer_gib"]
