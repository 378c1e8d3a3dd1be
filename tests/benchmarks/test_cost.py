"""What a recipe costs on paper, against what a real step counts, and against what READMEs and headers say."""

import json
import re
from pathlib import Path

import pytest
from support.backbones import SMOLVLM
from support.general import REPOSITORY, load_script, shared_path
from support.runs import run_main
from torch.utils.flop_counter import FlopCounterMode

from vla0_trl.benchmarks import memory
from vla0_trl.benchmarks.cost import PEAKS, SHARE, Cost, recipe_cost
from vla0_trl.benchmarks.rehearsal import Rehearsal
from vla0_trl.envs.libero.setup import instruction, task_names
from vla0_trl.training.arguments import parse_recipe

NIGHT = REPOSITORY / "recipes/libero/night_12gb.yaml"
LORA = {"use_peft": "true", "lora_r": 4}


def plan_of(recipe: Path, folder: Path, **settings):
    here = {"output_dir": folder / "run", "use_cpu": "true", "report_to": "none", "save_strategy": "no"}
    here |= {"dataloader_num_workers": 0, "dataloader_persistent_workers": "false", "bf16": "false"}
    words = [str(word) for name, value in (here | settings).items() for word in (f"--{name}", value)]
    return parse_recipe(recipe, "", ["--config", str(recipe), *words])


@pytest.mark.parametrize("changes", [{"use_peft": "false"}, LORA], ids=["full", "lora"])
def test_flops_on_paper_are_those_of_a_real_step(changes, tiny_nano, tmp_path):
    size = {"image_size": 48, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 3}
    # the counter does not know the CPU's own kernel for attention
    size |= {"attn_implementation": "eager", "dtype": "float32", "optim": "adamw_torch"}
    plan = plan_of(NIGHT, tmp_path, model_name_or_path=tiny_nano, **size, **changes)
    cost = recipe_cost(plan, "libero", tiny_nano)
    with memory._kernels_like_a_gpus():
        trainer, _ = memory._trainer(plan, "libero", rows=2)
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        trainer.check_forward(trainer.model, dict(inputs))
        with FlopCounterMode(display=False) as counter:
            trainer.compute_loss(trainer.model, inputs).backward()
    assert cost.tflop == pytest.approx(counter.get_total_flops() / 2 / 1e12, rel=0.1)
    assert cost.tokens == pytest.approx(inputs["input_ids"].shape[1], rel=0.1)  # rows differ by their digits
    assert cost.samples == 3 * 2


def test_hours_are_a_fifth_of_the_peak():
    cost = Cost(tokens=1, answer_tokens=1, tflop=0.5, samples=3_600_000)
    assert SHARE == 0.2 and PEAKS["RTX 3060"] == 51.0
    assert cost.samples_per_second("RTX 3060") == pytest.approx(20.4)
    assert cost.hours("RTX 3060") == pytest.approx(1000 / 20.4)


def test_the_night_fits_into_a_night_and_pages_say_so(tmp_path):
    source = shared_path(f"data/models/{SMOLVLM}")
    cost = recipe_cost(plan_of(NIGHT, tmp_path), "libero", source)
    hours = cost.hours("RTX 3060")
    assert hours <= 12
    assert f"Time: {hours:.1f} hours on an RTX 3060, estimated." in NIGHT.read_text()
    cells = [str(cost.tokens), str(cost.answer_tokens), f"{cost.tflop:.2f}", f"{hours:.1f}"]
    lines = (REPOSITORY / "recipes/README.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith("| as it is"))
    assert [cell.strip() for cell in row.split("|")[2:6]] == cells


def test_the_conversion_of_the_night_takes_one_suite():
    pytest.importorskip("libero", reason='LIBERO is not installed: pip install -e ".[libero]"')
    [chosen] = re.findall(r'--tasks "(.*?)"', NIGHT.read_text())
    for suite in ("libero_spatial", "libero_object", "libero_goal", "libero_10"):
        found = [chosen in instruction(name).lower() for name in task_names(suite)]
        assert all(found) if suite == "libero_spatial" else not any(found)


def test_the_table_of_variations(tmp_path, monkeypatch, capsys):
    script = load_script("recipes/estimate.py")
    options = ["--model_configs", shared_path("data/models"), "--markdown", "--cards", "RTX 3060", "A100"]
    run_main(script, monkeypatch, NIGHT, *options, "--vary", "num_bins=99", "chunk_size=8,n_action_steps=8")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert lines[0][-2:] == ["hours, RTX 3060", "hours, A100"]
    rows = {line[0]: line[1:] for line in lines[2:]}
    assert list(rows) == ["as it is", "num_bins=99", "chunk_size=8,n_action_steps=8"]
    assert int(rows["num_bins=99"][0]) < int(rows["as it is"][0]) < int(rows["chunk_size=8,n_action_steps=8"][0])
    with pytest.raises(SystemExit):
        run_main(script, monkeypatch, NIGHT, *options, "--vary", "chunk_sise=8")
    assert capsys.readouterr().err == "error: unknown argument chunk_sise: did you mean --chunk_size?\n"
    with pytest.raises(SystemExit):
        run_main(script, monkeypatch, NIGHT, "--model_name_or_path", "USER/ABSENT")
    assert capsys.readouterr().err.startswith(f"error: {NIGHT}: USER/ABSENT: We couldn't connect to ")


@pytest.mark.slow
def test_the_whole_way_at_true_size(tmp_path, monkeypatch, capsys):
    """SmolVLM2-500M's architecture with random weights: 3 minutes on one core, 7 GiB."""
    script = load_script("recipes/rehearse.py")
    run_main(script, monkeypatch, NIGHT, "--output_dir", tmp_path, "--model_configs", shared_path("data/models"))
    report = json.loads((tmp_path / "rehearsal.json").read_text())
    assert next(iter(report)) == "random weights" and len(report) == 5
    assert max(part["peak_gib"] for part in report.values()) < 10
    assert (tmp_path / "merged" / "model.safetensors").stat().st_size > 1.8e9  # all of it, in float32


def test_a_rehearsal_goes_on_with_the_part_that_it_was_in(tmp_path, tiny_nano):
    size = {"image_size": 48, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "warmup_steps": 0}
    size |= {"dtype": "float32", "optim": "adamw_torch", "logging_steps": 1, "save_strategy": "steps", **LORA}
    rehearsal = Rehearsal(lambda **more: plan_of(NIGHT, tmp_path, **size | more), "libero", tiny_nano, tmp_path)
    first = rehearsal()
    assert [name.split(",")[0] for name in first] == [
        "random weights", "train 2 steps", "resume", "load", "merge"
    ]  # fmt: skip
    rehearsal.write_weights = rehearsal.resume = None  # would fail if they were called
    assert rehearsal() == first
