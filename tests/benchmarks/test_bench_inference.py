"""The bench prints and writes what its docstring says, on the smallest model."""

import json
import subprocess
import sys

import pytest
import torch
from support.backbones import QWEN
from support.general import REPOSITORY, shared_path

from vla0_trl.benchmarks.inference import DigitsAndSpaces, bench, check_sources, random_policy
from vla0_trl.policy.speculative.options import DecodingOptions


@pytest.mark.slow
def test_the_table_of_the_nano_model(tmp_path):
    command = [sys.executable, "eval/bench_inference.py", "--models", "nano", "qwen2.5-vl-3b", "--max_gb", "1"]
    command += ["--chunks", "2", "--warmup", "1", "--batch_sizes", "1", "3", "--json", str(tmp_path / "bench.json")]
    command += ["--models_dir", str(shared_path(f"data/models/{QWEN}").parent)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "qwen2.5-vl-3b skipped: 15." in done.stdout or "qwen2.5-vl-3b skipped: 16." in done.stdout
    result = json.loads((tmp_path / "bench.json").read_text())
    rows = {(row["variant"], row["batch"]): row for row in result["table"]}
    assert {("a", 1), ("c", 1), ("d", 1), ("d±", 1), ("a", 3), ("c", 3)} <= rows.keys()
    assert all(row["other_answers"] == 0 for row in result["table"] if row["variant"] in ("c", "d", "d±"))
    assert rows["d", 1]["passes_per_chunk"] < rows["c", 1]["passes_per_chunk"] < rows["a", 1]["passes_per_chunk"]
    assert rows["d", 1]["acceptance"] > rows["d±", 1]["acceptance"] > 0
    assert 1 < rows["p", 1]["passes_per_chunk"] <= 3 and rows["p", 1]["other_answers"] is None
    ratios = result["ratios"]
    assert {"ours_vs_stock_b1", "drafts_vs_stock_b1", "ours_vs_stock_b3", "of_floor_b1"} <= ratios.keys()
    assert {"parallel_vs_stock_b1", "parallel_vs_ours_b3"} <= ratios.keys()
    assert ratios["ours_vs_stock_b1"] == pytest.approx(rows["a", 1]["median_ms"] / rows["c", 1]["median_ms"])
    assert result["versions"]["torch"] and result["ratios_by_model"] == {"nano": ratios}


def test_a_model_whose_config_cannot_be_read_is_one_line_before_anything_is_timed(tmp_path):
    check_sources(["nano"], None)
    with pytest.raises(ValueError, match=r"^smolvlm2-500m needs .* --models_dir, or leave it out") as error:
        check_sources(["nano", "smolvlm2-500m"], tmp_path)
    assert "\n" not in str(error.value)


def test_batches_are_timed_one_after_the_other_with_stock_decoding_alone():
    """Answers of the second batch may be longer than those of the first."""
    policy = random_policy("nano", None, torch.device("cpu"), torch.float32, max_gb=1.0)
    policy.decoder.options = DecodingOptions(mode="stock")
    for size in (1, 3):
        table = bench(policy, size, chunks=1, warmup=0, jitter=2)
        assert [row["variant"] for row in table if row["variant"] != "b"] == ["a"]
        assert policy.generation_config.max_new_tokens == policy.grammar.max_new_tokens == 81


def test_stock_may_write_any_digits_and_spaces_but_nothing_else():
    policy = random_policy("nano", None, torch.device("cpu"), torch.float32, max_gb=1.0)
    names = policy.processor.tokenizer.convert_ids_to_tokens(range(len(policy.processor.tokenizer)))
    scores = DigitsAndSpaces(policy)(torch.zeros(1, 3), torch.zeros(1, len(names)))
    assert sorted(names[i] for i in scores[0].isfinite().nonzero().flatten()) == [*"0123456789", "Ġ"]
