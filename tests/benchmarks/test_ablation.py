"""Ablations and curves as users start them, with real trainings and evaluations of a tiny backbone."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from support.backbones import TINY
from support.general import REPOSITORY, load_script
from support.runs import ABLATIONS, ENV

from vla0_trl.benchmarks.ablation import Ablation, Arm, flags, run_logged
from vla0_trl.evaluation.metrics import wilson_interval
from vla0_trl.stopping import Stopped
from vla0_trl.training.arguments import parse_recipe

HEAD = {
    "config": "recipes/pusht/nano.yaml",
    "recipe": "recipes/sft_pusht.py",
    "evaluation": "eval/eval_pusht.py",
    "published_source": "A paper",
    "published_episodes": 64,
}
SMALL = ["--max_steps", "2", "--save_steps", "2", "--num_eval_episodes", "0", "--eval_strategy", "no"]
SMALL += ["--nano", json.dumps(TINY | {"image_size": 96, "patch_size": 24}), "--report_to", "none"]


def ablation_file(folder: Path, arms: dict, **changes) -> Path:
    file = folder / "ablations.yaml"
    file.write_text(yaml.safe_dump(HEAD | changes | {"arms": arms}, sort_keys=False))
    return file


def run_main(script: str, monkeypatch, *arguments) -> int:
    """A script's main() in this process, from the repository's root; its exit status."""
    module = load_script(script)
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    try:
        module.main()
    except SystemExit as error:
        return error.code
    return 0


@pytest.fixture(scope="module")
def pusht_data(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pusht") / "data"
    command = [sys.executable, "data_prep/record_pusht.py", "--num_episodes", "2", "--output_dir", out]
    subprocess.run(command, cwd=REPOSITORY, env=ENV, check=True, timeout=200)
    return out


def test_the_shipped_ablation_can_be_trained():
    """Every arm's changes are fields of its recipe, and all of issue's choices are there."""
    ablation = Ablation.load(ABLATIONS)
    for arm in ablation.arms:
        arguments = ["--config", str(REPOSITORY / ablation.config), *flags(arm.train)]
        data, training, model = parse_recipe(Path(), "", [*arguments, "--use_cpu", "true"])
        parsed = {**vars(data), **vars(training), **vars(model)}
        assert {name: parsed[name] for name in arm.train} == arm.train
    assert {name for arm in ablation.arms for name in arm.train} == {
        *(
            "relative_actions",
            "use_state",
            "mask_max",
            "mask_full",
            "mask_skip",
            "mask_labels",
            "mask_unit",
        ),
        *("freeze_vision", "use_system_prompt", "num_bins", "waypoints", "nano", "chunk_size", "n_action_steps"),
        *("optim", "learning_rate", "muon_adamw_learning_rate", "dagger_steps", "dagger_teacher", "dataset_name"),
    }
    assert (REPOSITORY / ablation.recipe).is_file() and (REPOSITORY / ablation.evaluation).is_file()
    baseline, ensemble = ablation.arms[0], next(arm for arm in ablation.arms if "ensemble_size" in arm.evaluate)
    assert ablation.trained_by(ensemble) is baseline
    for arm in ablation.arms:  # the published rates are of 64 episodes
        if isinstance(arm.published, float):
            assert round(100 * round(arm.published * 0.64) / 64, 1) == arm.published


@pytest.mark.parametrize(
    ("arms", "changes", "message"),
    [
        ({"a": {"train": {"mask_maxx": 1}}}, {}, r"arm 'a', train: unknown keys \['mask_maxx'\]"),
        ({"a": {"trian": {}}}, {}, r"arm 'a': unknown keys \['trian'\]"),
        ({"a": {"train": {"max_steps": 1}}}, {}, "arm 'a' changes max_steps, which all arms share"),
        ({"a b": {}, "a_b": {}}, {}, "two arms have the same folder"),
        ({"a": {}}, {"resipe": "x"}, r"unknown keys \['resipe'\]"),
        ([], {}, r"arms is \[\], wanted an object"),
    ],
)
def test_bad_files_are_refused_before_any_training(arms, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Ablation.load(ablation_file(tmp_path, arms, **changes))
    file = tmp_path / "short.yaml"
    file.write_text("arms: {a: {}}\n")
    with pytest.raises(ValueError, match="config is absent, wanted a line of text"):
        Ablation.load(file)


def test_flags_are_what_a_shell_would_pass():
    assert flags({"use_state": False, "mask_max": 0.15, "mask_unit": "value", "cameras": ["a", "b"]}) == [
        "--use_state", "false", "--mask_max", "0.15", "--mask_unit", "value", "--cameras", "a", "b",
    ]  # fmt: skip
    assert flags({"nano": {"num_layers": 2}}) == ["--nano", '{"num_layers": 2}']
    assert Arm("Masking: 0.4, whole!").slug == "masking_0.4_whole"


@pytest.mark.slow
def test_arms_are_trained_evaluated_and_compared(pusht_data, tmp_path, monkeypatch, capsys):
    """Two arms that share a training, one that fails; run again, only what failed is tried again."""
    for name, value in ENV.items():
        monkeypatch.setenv(name, value)
    arms = {
        "broken": {"train": {"num_bins": 0}},
        "base": {"evaluate": {"max_steps": 20}, "published": 57.8},
        "one step": {"evaluate": {"max_steps": 20, "n_action_steps": 1}, "published": "no difference"},
    }
    out = tmp_path / "out"
    arguments = ["--ablations", ablation_file(tmp_path, arms), "--output_dir", out, "--num_episodes", "1"]
    arguments += ["--accelerate_config", "accelerate_configs/cpu.yaml", "--", "--dataset_name", pusht_data, *SMALL]
    assert run_main("recipes/ablate.py", monkeypatch, *arguments) == 1

    printed = capsys.readouterr()
    assert "1/3 broken" in printed.out and "failed: train: error: --num_bins 0 must be at least 1" in printed.out
    assert "1 of 3 arms failed" in printed.err
    assert [path.name for path in (out / "train").iterdir()] == ["base"]
    broken, base, one_step = json.loads((out / "ablation.json").read_text())["arms"]
    assert "--num_bins 0" in broken["error"] and "success_rate" not in broken
    assert base["num_episodes"] == one_step["num_episodes"] == 1 and base["error"] is None
    assert base["published_interval"] == list(wilson_interval(37, 64))
    protocols = [
        json.loads((out / "eval" / name / "results.json").read_text())["protocol"] for name in ("base", "one_step")
    ]
    assert [protocol["n_action_steps"] for protocol in protocols] == [5, 1]
    assert "| no difference |" in (out / "ablation.md").read_text()
    assert (out / "ablation.png").read_bytes().startswith(b"\x89PNG")

    logs = {path: path.stat().st_mtime_ns for path in (out / "logs").glob("*.log") if "broken" not in path.name}
    assert run_main("recipes/ablate.py", monkeypatch, *arguments) == 1
    assert len(logs) == 4 and all(path.stat().st_mtime_ns == time for path, time in logs.items())
    assert json.loads((out / "ablation.json").read_text())["arms"][1:] == [base, one_step]


SAVING = """
import signal, time
def save(*_):
    time.sleep(2)
    print("saved", flush=True)
    raise SystemExit(143)
signal.signal(signal.SIGTERM, save)
signal.alarm(60)
print("training", flush=True)
signal.pause()
"""


@pytest.mark.slow
def test_sigterm_ends_an_ablation_once_the_training_has_saved(tmp_path):
    """Behind `accelerate launch`, which does not wait for it."""
    (tmp_path / "recipe.py").write_text(SAVING)
    file, log = ablation_file(tmp_path, {"a": {}}, recipe=str(tmp_path / "recipe.py")), tmp_path / "logs/a_train.log"
    command = [sys.executable, "recipes/ablate.py", "--ablations", file, "--output_dir", tmp_path]
    command += ["--accelerate_config", "accelerate_configs/cpu.yaml"]
    with subprocess.Popen(command, cwd=REPOSITORY, env=ENV, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (log.exists() and "training\n" in log.read_text()):
            time.sleep(0.1)
        process.terminate()
        assert "stopped; the same command goes on from here" in process.communicate(timeout=120)[1]
    assert process.returncode == 143 and log.read_text().endswith("saved\n")


@pytest.mark.parametrize("status", [130, 143])
def test_a_command_that_a_signal_stopped_has_not_failed(status, tmp_path):
    with pytest.raises(Stopped) as stopped:
        run_logged([sys.executable, "-c", f"raise SystemExit({status})"], tmp_path / "log")
    assert stopped.value.status == status


def test_files_that_are_not_here_are_found_before_any_training(tmp_path, monkeypatch, capsys):
    file = ablation_file(tmp_path, {"a": {}}, config="recipes/pusht/no.yaml")
    assert run_main("recipes/ablate.py", monkeypatch, "--ablations", file, "--output_dir", tmp_path / "o") == 2
    assert f"{file} names recipes/pusht/no.yaml, which is not here" in capsys.readouterr().err


def test_a_name_that_no_arm_has_is_an_error(tmp_path, monkeypatch, capsys):
    arguments = ["--ablations", ablation_file(tmp_path, {"a": {}}), "--output_dir", tmp_path / "o", "--arms", "b"]
    assert run_main("recipes/ablate.py", monkeypatch, *arguments) == 2
    assert "--arms ['b']: the file has ['a']" in capsys.readouterr().err
