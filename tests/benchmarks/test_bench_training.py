"""The benchmark runs, measures all contestants, and writes what it printed."""

import json
import subprocess
import sys

import pytest
import yaml
from support.general import REPOSITORY
from support.runs import ENV

from vla0_trl.benchmarks.recipe import recipe_speed

RECIPE = {"model_name_or_path": "nano", "use_cpu": True, "bf16": False, "dagger_steps": 0}
RECIPE |= {"per_device_train_batch_size": 4, "save_steps": 1}


@pytest.mark.slow
def test_prints_and_writes_the_table(tmp_path):
    command = [sys.executable, "recipes/bench_training.py", "--rows", "8", "--turns", "1", "--steps", "1"]
    command += ["--peak_tflops", "0.5"]
    outputs = ["--json", str(tmp_path / "bench.json"), "--trace", str(tmp_path / "trace.json")]
    done = subprocess.run(
        [*command, "--batch_size", "2", *outputs],
        cwd=REPOSITORY, env=ENV, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    data = json.loads((tmp_path / "bench.json").read_text())
    assert set(data["ratios"]) == {"collator_vs_trl", "collator_vs_peer", "step_vs_trl", "step_vs_trl_tuned"}
    assert all(ratio > 0 for ratio in data["ratios"].values())
    assert {"torch", "transformers", "trl"} <= data["versions"].keys()
    # 192 → 262 at every position, and 1.9 M weights in the layers, of which 371 tokens take two FLOP forth, four back.
    assert 6 * 1.9e6 * 371 < data["sample"]["tflop"] * 1e12 < 9 * 1.9e6 * 371 and data["sample"]["image_tokens"] == 32
    assert data["table"]["ours"]["mfu"] == pytest.approx(
        data["table"]["ours"]["samples_per_s"] * data["sample"]["tflop"] / 0.5
    )
    assert set(data["table"]) == {"trl", "trl_tuned", "peer", "ours"}
    # Two 256 px cameras as uint8, and not even a tenth of that for all the ids.
    assert 2 * 256 * 256 * 3 < data["table"]["ours"]["mb_per_row"] * 1e6 < 0.43e6
    assert "collator_vs_peer" in done.stdout and "aten::" in done.stdout and (tmp_path / "trace.json").exists()
    assert "outside of torch's operators in" in done.stdout


def test_a_recipe_beside_its_bare_loop(dot_dataset, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    speeds = recipe_speed(recipe, dot_dataset, steps=2)
    assert list(speeds) == ["recipe", "bare loop", "collator"] and min(speeds.values()) > 0
