"""Every number that a script or a recipe can be told has limits: what lies outside is one line with its name."""

import sys
from dataclasses import dataclass, fields

import pytest
from support.general import REPOSITORY, load_script
from trl import ModelConfig

from vla0_trl.command_line import option, parse
from vla0_trl.limits import LIMITS, check_limits
from vla0_trl.training.arguments import DataArguments, VLASFTConfig, parse_recipe
from vla0_trl.training.fields import check_recipe_words

BAD = [
    ({"num_episodes": 0}, "--num_episodes 0 must be at least 1"),
    ({"num_envs": -1}, "--num_envs -1 must be at least 1"),
    ({"batch_sizes": [1, 0]}, "--batch_sizes 0 must be at least 1"),
    ({"num_videos": -1}, "--num_videos -1 must be at least 0"),
    ({"max_steps": -1}, "--max_steps -1 must be at least 1"),
    ({"max_steps": 0, "num_train_epochs": 1.0}, "--max_steps 0 must be at least 1"),
    ({"max_steps": 10**12}, "--max_steps 1000000000000 must be at most 1000000000"),
    ({"learning_rate": float("nan")}, "--learning_rate nan must be a finite number"),
    ({"learning_rate": -1.0}, "--learning_rate -1.0 must be at least 0"),
    ({"weight_decay": float("inf")}, "--weight_decay inf must be a finite number"),
    ({"some_other_number": float("nan")}, "--some_other_number nan must be a finite number"),
    ({"mask_max": 1.5}, "--mask_max 1.5 must be at most 1"),
    ({"expert_mix": float("nan")}, "--expert_mix nan must be a finite number"),
    ({"noise_fraction": -0.1}, "--noise_fraction -0.1 must be at least 0"),
    ({"seed": -1}, "--seed -1 must be at least 0"),
    ({"seed": 2**32}, "--seed 4294967296 must be at most 4294967295"),
    ({"save_steps": -0.5}, "--save_steps -0.5 must be at least 1"),
    ({"eval_steps": float("inf")}, "--eval_steps inf must be a finite number"),
    ({"learning_rate": 10**12}, "--learning_rate 1000000000000 must be at most 10000000000"),
    ({"num_episodes": 10**12}, "--num_episodes 1000000000000 must be at most 1000000"),
    ({"num_envs": 10**12}, "--num_envs 1000000000000 must be at most 10000"),
    ({"num_proc": 10**12}, "--num_proc 1000000000000 must be at most 10000"),
    ({"num_rows": 0}, "--num_rows 0 must be at least 1"),
    ({"round_episodes": -1}, "--round_episodes -1 must be at least 1"),
    ({"width": 10**12}, "--width 1000000000000 must be at most 16384"),
    ({"action_noise": 10**12}, "--action_noise 1000000000000 must be at most 512"),
    ({"router_aux_loss_coef": -1.0}, "--router_aux_loss_coef -1.0 must be at least 0"),
    ({"adam_beta1": 1.0}, "--adam_beta1 1.0 must be at most 0.999999999"),
    ({"dataloader_num_workers": 10**9}, "--dataloader_num_workers 1000000000 must be at most 1000"),
    ({"temperature": -1.0}, "--temperature -1.0 must be at least 0"),
    ({"temperature": 1e26}, "--temperature 1e\\+26 must be at most 100"),
    ({"ensemble_decay": -1e3}, "--ensemble_decay -1000.0 must be at least -100"),
    ({"num_episodes_per_task": 10**9}, "--num_episodes_per_task 1000000000 must be at most 100000"),
    ({"max_batch": 10**9}, "--max_batch 1000000000 must be at most 100000"),
    ({"num_workers": 10**9}, "--num_workers 1000000000 must be at most 1000"),
    ({"every": -1}, "--every -1 must be at least 1"),
    ({"task_id": -1}, "--task_id -1 must be at least 0"),
    ({"ddp_bucket_cap_mb": 0}, "--ddp_bucket_cap_mb 0 must be at least 1"),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=str)
def test_a_number_out_of_its_limits_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        check_limits(settings)


def test_what_lies_inside_passes():
    check_limits({"max_steps": -1, "num_train_epochs": 3.0, "save_steps": 0.5, "mask_max": 1, "seed": 2**32 - 1})
    check_limits({"num_episodes": 1, "overwrite": False, "seed": None, "normalization": "nan", "probe_steps": 0})


def test_recipes_defaults_lie_inside_and_every_name_is_somebodys(tmp_path):
    recipe = [VLASFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False), DataArguments(dataset_name="a")]
    check_limits({name: value for part in (*recipe, ModelConfig()) for name, value in vars(part).items()})
    counts = {f.name for part in (*recipe, ModelConfig()) for f in fields(part) if f.type in (int, "int")}
    known_otherwise = {"local_rank", "lora_r", "logging_steps", "max_length"}
    assert counts - LIMITS.keys() - known_otherwise == set(), "a whole number without limits"


@dataclass(kw_only=True)
class Arguments:
    num_episodes: int = option(3)
    expert_mix: float = option(0.0)


@pytest.mark.parametrize("words", ["--num_episodes 0", "--num_episodes nan", "--expert_mix nan", "--expert_mix 2"])
def test_every_script_says_it_in_one_line(words, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse(Arguments, "", words.split())
    printed = capsys.readouterr().err
    assert exit_info.value.code == 2 and printed.startswith("error: ") and printed.count("\n") == 1
    assert words.split()[0] in printed


@pytest.mark.parametrize("script", ["eval/eval_pusht.py", "eval/eval_libero.py"])
@pytest.mark.parametrize(
    "flag", ["--num_envs=0", "--max_steps=-1", "--num_videos=-1", "--ensemble_decay=nan", "--n_action_steps=x"]
)
def test_evaluations_say_it_in_one_line(script, flag, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, "--model_name_or_path", "m", "--output_dir", "o", flag])
    with pytest.raises(SystemExit) as exit_info:
        load_script(script).main()
    printed = capsys.readouterr().err
    assert exit_info.value.code == 2 and printed.startswith("error: ") and printed.count("\n") == 1
    assert flag.split("=")[0] in printed


RANGES = ["--normalization=nan,1", "--normalization=1,1", "--normalization=2,1", "--normalization=0,1e400"]
RANGES += ["--normalization=-1e308,1e308", "--episodes=3:1", "--episodes=0:0", "--episodes=-1:3", "--episodes=0:1e3"]
RANGES += ["--episodes=1:2:3", "--push_to_hub=a/b/c", "--push_to_hub=a b", "--output_dir=x[0]", "--output_dir=x::y"]


@pytest.mark.parametrize("flag", RANGES)
def test_conversions_say_it_before_they_read_anything(flag, capsys, monkeypatch):
    script = "data_prep/convert_pusht_zarr.py"
    monkeypatch.setattr(sys, "argv", [script, "--source", "absent", "--output_dir", "o", flag])
    with pytest.raises(SystemExit) as exit_info:
        load_script(script).main()
    printed = capsys.readouterr().err
    assert exit_info.value.code == 2 and printed.startswith("error: ") and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--logging_steps", "inf"], "--logging_steps inf must be a finite number"),
        (["--max_steps=0"], "--max_steps 0 must be at least 1"),
        (["--save-steps", "-3"], "--save_steps -3 must be at least 1"),
        (["--seed", "1000000000000"], "--seed 1000000000000 must be at most 4294967295"),
        (["--mask_max", "nan"], "--mask_max nan must be a finite number"),
    ],
)
def test_recipes_say_it_before_anything_heavy_is_imported(words, message):
    with pytest.raises(SystemExit, match=f"^error: {message}$"):
        check_recipe_words(REPOSITORY / "recipes/pusht/nano.yaml", "", words)


@pytest.mark.parametrize(
    "words", ["--dtype x", "--lr_scheduler_type x", "--seed true", "--rollout_steps 1.5", "--bf16 maybe"]
)
def test_a_recipes_own_parser_says_it_in_one_line(words, capsys):
    with pytest.raises(SystemExit) as error:
        parse_recipe(REPOSITORY / "recipes/pusht/nano.yaml", "", words.split())
    assert error.value.code.startswith(f"error: argument {words.split()[0]}") and "\n" not in error.value.code
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_steps: [1]", "max_steps is [1], wanted int"),
        ("warmup_steps: {}", "warmup_steps is {}, wanted"),
        ("optim: {a: 1}", "optim is {'a': 1}, wanted"),
        ("optim: 3", "optim is 3, wanted"),
        ("learning_rate: .nan", "--learning_rate nan must be a finite number"),
        ("seed: -1", "--seed -1 must be at least 0"),
        ("max_stps: 1", "unknown argument max_stps: did you mean --max_steps?"),
        ("3: 1", "unknown argument 3"),
        ("- a", "found ['a'], wanted an object with fields"),
        ("a: [", "is not YAML"),
        ("a: " + "[" * 5000, "is nested too deep"),
        ("a: !!python/name:os.system", "is not YAML"),
    ],
    ids=lambda value: value[:30],
)
def test_a_recipe_s_yaml(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(SystemExit) as error:
        check_recipe_words(tmp_path / "recipe.yaml", "", [])
    assert error.value.code.startswith("error: ") and message in error.value.code and "\n" not in error.value.code
