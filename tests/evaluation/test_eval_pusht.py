"""eval/eval_pusht.py with a real nano checkpoint in the real simulator."""

from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from support.general import check_user_error, load_script
from support.pusht_evaluation import results_of, rows_of, save_checkpoint

from vla0_trl.command_line import parse
from vla0_trl.config import VLAConfig
from vla0_trl.evaluation.arguments import EvaluationArguments, LiberoArguments
from vla0_trl.evaluation.driver import execution_protocol
from vla0_trl.internals import FallbackWarning
from vla0_trl.policy.speculative.tree_forward import TreeForward


def test_an_evaluation_leaves_episodes_results_and_videos(evaluate, checkpoint, capsys):
    folder = evaluate("--num_videos", "1")
    rows = rows_of(folder)
    assert [row["seed"] for row in rows] == [100000, 100001, 100002, 100003]
    assert [(row["steps"], row["model_calls"]) for row in rows] == [(6, 3)] * 4
    assert {row["checkpoint"] for row in rows} == {checkpoint}
    assert [path.name for path in (folder / "videos").iterdir()] == ["episode_100000_failure.mp4"]
    results = results_of(folder)
    assert results["num_episodes"] == 4 and results["successes"] == 0
    assert results["protocol"] == {
        "env": "gym_pusht/PushT-v0",
        "state": "agent",
        "simulator": ", ".join(f"{name} {version(name)}" for name in ("gym-pusht", "pymunk", "shapely")),
        "seed": 100000,
        "max_steps": 6,
        "success_coverage": 0.95,
        "n_action_steps": 2,
        "ensemble_size": 1,
        "ensemble_decay": None,
        "dtype": "float32",
    }
    assert results["versions"].keys() == {"python", "torch", "transformers", "gym-pusht", "pymunk", "numpy"}
    table = capsys.readouterr().out
    assert "revision" in table and "success %" in table and "0.0 – 49.0" in table and str(folder) in table


def test_with_a_broken_decoder_an_evaluation_finishes_and_says_so(evaluate, monkeypatch, tmp_path):
    right = rows_of(evaluate("--num_videos", "0"))
    assert [row["decoding"] for row in right] == ["fast"] * 4 and results_of(tmp_path / "out")["decoding"] == "fast"
    monkeypatch.setattr(TreeForward, "step", lambda self, tokens: np.zeros((*tokens.shape[:2], len(self.token_ids))))
    with pytest.warns(FallbackWarning, match="fast decoding of SmolVLMForConditionalGeneration does not work with"):
        evaluate("--output_dir", str(tmp_path / "stock"))
    assert results_of(folder := tmp_path / "stock")["decoding"] == "stock"
    assert rows_of(folder) == [row | {"decoding": "stock"} for row in right]


def test_parallel_decoding_is_another_protocol(evaluate, tmp_path, capsys):
    exact, stock = tmp_path / "exact", tmp_path / "stock"
    evaluate("--output_dir", str(exact))
    evaluate("--output_dir", str(stock), "--decoding", "stock")
    assert results_of(stock) == results_of(exact) | {"decoding": "stock"}
    folder = evaluate("--decoding", "parallel", "--refine", "1")
    assert {row["decoding"] for row in rows_of(folder)} == {"parallel"} and results_of(folder)[
        "decoding"
    ] == "parallel"
    assert results_of(folder)["protocol"] == results_of(exact)["protocol"] | {"decoding": "parallel", "refine": 1}
    with pytest.raises(SystemExit):
        evaluate("--num_episodes", "5")
    assert "belongs to another run (decoding: parallel" in capsys.readouterr().err


def test_ensembling_asks_at_every_step(evaluate, tmp_path):
    folder = evaluate("--num_episodes", "2", "--ensemble_size", "2", "--ensemble_decay", "0.1")
    assert [row["model_calls"] for row in rows_of(folder)] == [6, 6]
    protocol = results_of(folder)["protocol"]
    assert [protocol[key] for key in ("n_action_steps", "ensemble_size", "ensemble_decay")] == [1, 2, 0.1]


ENSEMBLE = {"ensemble_size": 4, "ensemble_decay": 0.1}


@pytest.mark.parametrize("arguments", [load_script("eval/eval_pusht.py").Arguments, LiberoArguments])
@pytest.mark.parametrize(
    ("saved", "flags", "expected"),
    [
        (ENSEMBLE, "--n_action_steps 8", (8, 1, None, None)),
        (ENSEMBLE, "--n_action_steps 1", (1, 1, None, None)),
        (ENSEMBLE, "", (1, 4, 0.1, None)),
        (ENSEMBLE, "--ensemble_size 2", (1, 2, 0.1, None)),
        (ENSEMBLE, "--ensemble_size 1", (8, 1, None, None)),
        (ENSEMBLE, "--ensemble_weights vla0_v1", (1, 4, None, "vla0_v1")),
        (ENSEMBLE, "--ensemble_decay 0", (1, 4, 0.0, None)),
        ({"n_action_steps": 5}, "--ensemble_size 8", (1, 8, None, None)),
        ({"n_action_steps": 5}, "--ensemble_size 8 --ensemble_weights vla0_v2", (1, 8, None, "vla0_v2")),
        ({"n_action_steps": 5}, "--ensemble_size 1", (5, 1, None, None)),
        (ENSEMBLE, "--n_action_steps 8 --ensemble_size 4", "leave n_action_steps out, or set ensemble_size=1"),
        (ENSEMBLE, "--n_action_steps 8 --ensemble_decay 0.1", "ensemble_size=1 keeps only the newest"),
    ],
)
def test_flags_replace_the_checkpoints_way_to_execute_chunks(arguments, saved, flags, expected):
    args = parse(arguments, "", ["--model_name_or_path", "m", "--output_dir", "o", *flags.split()])
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            args.execution_of(VLAConfig(**saved))
        return
    config = args.execution_of(VLAConfig(**saved))
    names = ("n_action_steps", "ensemble_size", "ensemble_decay", "ensemble_weights")
    assert tuple(getattr(config, name) for name in names) == expected
    protocol = execution_protocol(config)
    assert [protocol.get(name) for name in names] == list(expected)


def test_a_checkpoint_with_the_full_state_gets_it(evaluate, tmp_path):
    full = save_checkpoint(tmp_path / "full", seed=0, state_dim=5)
    folder = evaluate("--model_name_or_path", full, "--num_episodes", "1")
    assert results_of(folder)["protocol"]["state"] == "full"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n_action_steps", "3"], "n_action_steps=3 is more than chunk_size=2"),
        (["--ensemble_size", "3"], "ensemble_size=3 must be between 1 and chunk_size=2"),
        (["--ensemble_size", "2", "--n_action_steps", "2"], "leave n_action_steps out"),
        (["--ensemble_decay", "0.1"], "ensemble_size=1 keeps only the newest"),
        (["--model_name_or_path", "/no/such/run"], "no folder '/no/such/run'"),
        (["--refine", "1"], "refine=1 with exact decoding"),
        (["--decoding", "parallel", "--refine", "4"], "an answer of 4 numbers has at most 3 rounds"),
        (["--num_envs", "0"], "--num_envs 0 must be at least 1"),
        (["--output_dir", __file__], "is a file, or a link that leads to itself"),
    ],
)
def test_a_user_error_is_one_line_and_leaves_nothing(evaluate, tmp_path, capsys, flags, message):
    check_user_error(lambda: evaluate(*flags), message, capsys, tmp_path)


def test_a_checkpoint_of_another_robot_is_refused(evaluate, tmp_path, capsys):
    libero = save_checkpoint(tmp_path / "libero", seed=0, cameras=["front", "wrist"])
    with pytest.raises(SystemExit):
        evaluate("--model_name_or_path", libero)
    assert "is not for PushT: it has cameras ['front', 'wrist']" in capsys.readouterr().err


def test_an_evaluation_has_a_folder_of_its_checkpoints_name_by_default():
    assert EvaluationArguments(model_name_or_path="recipes/pusht/checkpoint").output_dir == Path(
        "runs/eval/recipes_pusht_checkpoint"
    )
    assert EvaluationArguments(model_name_or_path="USER/NAME", output_dir=Path("a")).output_dir == Path("a")
