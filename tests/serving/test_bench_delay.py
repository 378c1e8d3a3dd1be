"""eval/bench_delay.py: what a robot executes while its policy thinks, in both simulators."""

import json
import sys

import numpy as np
import pytest
from support.backbones import TINY
from support.general import libero_assets, load_script

from vla0_trl.actions import NormStats
from vla0_trl.config import VLAConfig
from vla0_trl.envs.pusht.env import PushTEnv
from vla0_trl.models.nano import NanoConfig, build_nano
from vla0_trl.processing.chat import prompt_messages

BENCH = load_script("eval/bench_delay.py")
DELAY = 2


class Walk:
    """Chunks of 8 targets, one pixel apart, from the agent on, of which 5 are executed."""

    config = VLAConfig(chunk_size=8, n_action_steps=5)

    def predict_action_chunk(self, observations, prefixes):
        [observation], [prefix] = observations, prefixes
        chunk = observation["state"][:2] + np.arange(1, 9)[:, None] * [1.0, 0.0]
        if prefix is not None:
            chunk[: len(prefix)] = prefix
        return chunk[None].astype(np.float32)


@pytest.mark.parametrize(("way", "held", "prefixed"), [(0, 10, False), (1, 2, False), (2, 2, True)])
def test_a_robot_stands_still_only_where_it_stops_and_thinks(way, held, prefixed):
    """30 steps, 2 of them per answer: of 7 steps 2 are lost by stopping, by asking ahead only the first 2."""
    env = PushTEnv("agent", 30)
    found = BENCH.run_episode(Walk(), env, 3, DELAY, [*BENCH.WAYS.values()][way])
    assert (found["steps"], found["held"], found["success"]) == (30, held, False)
    assert len(found["seams"]) == (3 if way == 0 else 5) and max(found["others"]) == pytest.approx(1, abs=1e-3)
    if prefixed:
        assert max(found["seams"]) < 3.5


def test_libero_is_a_task_of_a_suite(tmp_path, monkeypatch, capsys):
    """Random weights in the real simulator, twelve steps."""
    assets = libero_assets()
    stats = [NormStats.from_array(np.stack([-np.ones(size), np.ones(size)])) for size in (7, 8)]
    config = VLAConfig(
        cameras=["image"], action_dim=7, state_dim=8, chunk_size=8, n_action_steps=4, image_size=48, fps=20,
        action_stats=stats[0], state_stats=stats[1], gripper="sign",
    )  # fmt: skip
    model, processor = build_nano(
        NanoConfig(**TINY), 0, config.num_bins, [prompt_messages(config, "x")[-1]["content"]]
    )
    for part in (model, processor, config):
        part.save_pretrained(tmp_path / "nano")
    words = ["--suite", "libero_object", "--num_episodes", "1", "--max_steps", "12", "--delays_ms", "0", "100"]
    words += ["--model_name_or_path", tmp_path / "nano", "--assets_dir", assets, "--json", tmp_path / "cells.json"]
    monkeypatch.setattr(sys, "argv", ["bench_delay.py", *map(str, words)])
    BENCH.main()
    cells = json.loads((tmp_path / "cells.json").read_text())["cells"]
    assert [(cell["delay_ms"], cell["steps"], cell["held"]) for cell in cells] == [
        (0, 12, 0), (100, 12, 4), (100, 12, 2), (100, 12, 2)
    ]  # fmt: skip
    assert all(cell["n"] == 1 and cell["successes"] == 0 and np.isfinite(cell["seam_jump"]) for cell in cells)
    assert "| 100 ms | (b) asks ahead | 0 %" in capsys.readouterr().out
