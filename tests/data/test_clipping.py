"""What a range of integers does not reach: dimensions that never move, values outside, and how both are told."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from support.episodes import SmallSource, small_config, small_episode

from vla0_trl.data.chat_dataset import load_chat_dataset
from vla0_trl.data.convert import convert
from vla0_trl.data.episodes import Episode
from vla0_trl.data.staging import ConversionError


def test_a_dimension_that_never_moves_converts_and_spares_the_others(tmp_path):
    moving = np.linspace(-30, 90, 7, dtype=np.float32)
    idle = replace(small_episode(), actions=np.stack([moving, np.full(7, 0.25, np.float32)], 1))
    for normalization in ("min_max", "quantile"):
        source = SmallSource(count=1, broken=idle, broken_index=0)
        rows, config = load_chat_dataset(
            convert(source, small_config(normalization=normalization), tmp_path / normalization)
        )
        assert [row["action"].split()[:2] for row in rows][::6] == [["0", "0"], ["511", "0"]], normalization
        decoded = config.action_tokenizer().decode("511 0 0 511 255 9 1 1")
        assert decoded[:, 1].tolist() == [0.25] * 4 and decoded[:2, 0].tolist() == pytest.approx([90, -30], abs=0.01)


def test_a_range_that_ruins_the_actions_is_refused_and_what_was_read_kept(tmp_path, capsys):
    degrees = replace(small_episode(), actions=small_episode().actions * 10)
    source = SmallSource(count=1, broken=degrees, broken_index=0)
    message = r"action\[0\]: 100.0% of .* outside of \[-1.*and clipped; they run from .*: --normalization min_max"
    with pytest.raises(ConversionError, match=message):
        convert(source, small_config(normalization=[-1, 1]), tmp_path / "dataset")
    convert(source, small_config(), tmp_path / "dataset")
    assert "0 of 1 read now" in capsys.readouterr().out


def test_what_clips_more_than_a_thousandth_is_said_in_terminal_card_and_record(tmp_path, capsys):
    actions = np.random.default_rng(0).uniform(-1, 1, (400, 2)).astype(np.float32)
    actions[200, 1] = 1.5  # in 4 of 1600 values
    images = {name: np.repeat(frames[:1], 400, 0) for name, frames in small_episode().images.items()}
    states = np.tile(np.float32([0, 5, 0.5]), (400, 1))
    source = SmallSource(count=1, broken=Episode("push", actions, images, states, "long"), broken_index=0)
    convert(source, small_config(normalization=[-1, 1]), tmp_path / "dataset")
    clipped = "of the values are outside of [-1, 1] and clipped; they run from"
    fix = "--normalization min_max gives every dimension its range"
    lines = [
        f"action[1]: 0.2% {clipped} {actions[:, 1].min():g} to 1.5: {fix}",
        f"state[1]: 100.0% {clipped} 5 to 5: {fix}",
    ]
    assert "clipped:\n  " + "\n  ".join(lines) in capsys.readouterr().out
    card = (tmp_path / "dataset/README.md").read_text()
    assert [line for line in card.split("\n") if "| clipped" in line] == [f"| clipped | {line} |" for line in lines]
    assert json.loads((tmp_path / "dataset/conversion.json").read_text())["clipped"] == lines
