"""Open-loop metrics on the dots: of policies whose errors are known, and of a real nano checkpoint."""

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support.general import load_script

from vla0_trl.data.chat_dataset import load_chat_dataset
from vla0_trl.evaluation.open_loop import action_errors, pick_frames, token_accuracy
from vla0_trl.models.loading import load_model, load_processor
from vla0_trl.policy.policy import VLAPolicy
from vla0_trl.policy.speculative.options import DecodingOptions


@pytest.fixture(scope="module")
def dots(dot_dataset):
    return load_chat_dataset(dot_dataset)


@pytest.fixture(scope="module")
def checkpoint(dots, tiny_nano, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    for part in (load_model(tiny_nano), load_processor(tiny_nano, dots[1]), dots[1]):
        part.save_pretrained(folder)
    return str(folder)


class Remembering:
    """Knows the demonstrations by their states, and answers `offset` beside them."""

    def __init__(self, rows, config, offset: float):
        self.config, self.offset = config, np.float32(offset)
        self.chunks = {tuple(row["raw_state"]): row["raw_action"] for row in rows}

    def predict_action_chunk(self, observations):
        assert {observation["images"]["image"].shape for observation in observations} == {(48, 48, 3)}
        chunks = np.array([self.chunks[tuple(observation["state"].tolist())] for observation in observations])
        shape = (len(observations), -1, self.config.action_dim)
        return chunks.reshape(shape)[:, : self.config.chunk_size].astype(np.float32) + self.offset


def test_frames_are_spread_over_the_asked_episodes(dots):
    rows = pick_frames(dots[0], 2, 5, num_frames=7)
    # 3 episodes of 10 frames: every fifth, first and last among them
    assert list(zip(rows["episode_index"], rows["frame_index"], strict=True)) == [
        (2, 0), (2, 5), (3, 0), (3, 4), (3, 9), (4, 4), (4, 9)
    ]  # fmt: skip
    assert len(pick_frames(dots[0], 2, 5, num_frames=1000)) == 30
    with pytest.raises(ValueError, match=r"no frames of episodes 6:9: the dataset has episodes 0 to 5"):
        pick_frames(dots[0], 6, 9, 10)


@pytest.mark.parametrize("chunk_size", [4, 2])
def test_action_errors_in_environment_units(dots, chunk_size):
    rows, config = pick_frames(dots[0], 0, 2, 20), dots[1].replace(chunk_size=chunk_size)
    errors = action_errors(Remembering(rows, config, offset=3.0), rows, ["image"], batch_size=8)
    assert errors["rmse"] == pytest.approx(3, abs=1e-5)
    assert errors["first_rmse"] == pytest.approx(3, abs=1e-5)
    # who stays errs by the way to the dot's next positions
    way = np.array(rows["raw_action"]).reshape(20, 4, 2)[:, :chunk_size] - np.array(rows["raw_state"])[:, None]
    assert errors["baselines"]["stay"]["rmse"] == pytest.approx(np.sqrt((way**2).mean()))
    assert errors["baselines"]["stay"]["first_rmse"] == pytest.approx(np.sqrt((way[:, 0] ** 2).mean()))
    mean_way = way - config.action_stats.mean
    assert errors["baselines"]["mean"]["rmse"] == pytest.approx(np.sqrt((mean_way**2).mean()))


def test_absolute_actions_have_no_position_to_stay_at(dots):
    rows, config = pick_frames(dots[0], 0, 1, 5), dots[1].replace(relative_actions=False)
    assert action_errors(Remembering(rows, config, 0.0), rows, ["image"], 8)["baselines"].keys() == {"mean"}


def test_a_policy_is_scored_on_its_own_cameras_in_its_own_order(dots, checkpoint):
    """The dataset stores three; the policy was trained on two of them, the other way round."""
    stored, own = ["front", "side", "wrist"], ["wrist", "front"]
    config = dots[1].replace(cameras=own)
    policy = VLAPolicy(load_model(checkpoint), load_processor(checkpoint, config), config)
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (48, 48, 3), np.uint8)) for _ in stored]
    rows = [{**row, "images": noise} for row in pick_frames(dots[0], 0, 1, 2)]
    seen, forward = [], policy.model.forward

    def look(pixel_values, **inputs):
        seen.append(pixel_values)
        return forward(pixel_values=pixel_values, **inputs)

    policy.model.forward = look
    token_accuracy(policy, rows, stored, 2)
    observation = {"images": dict(zip(stored, map(np.asarray, noise), strict=True)), "task": "t"}
    expected = policy._inputs([observation | {"state": rows[0]["raw_state"]}])["pixel_values"]
    assert torch.equal(seen[0][:1], expected)


@pytest.mark.parametrize("batch_size", [1, 16])
def test_token_accuracy_counts_the_answer_only(dots, checkpoint, batch_size):
    policy = VLAPolicy.from_pretrained(checkpoint, device="cpu")
    tokenizer = policy.processor.tokenizer
    seven = tokenizer.convert_tokens_to_ids("7")

    def all_but_sevens(input_ids, **inputs):
        # knows the next token, wherever that is not a 7
        following = input_ids.roll(-1, dims=1)
        following[following == seven] += 1
        return SimpleNamespace(logits=torch.nn.functional.one_hot(following, len(tokenizer)).float())

    policy.model.forward = all_but_sevens
    rows = pick_frames(dots[0], 0, 3, 30)
    answers = rows["action"]
    # one token per byte; a space before every number, and the end of the turn
    total = sum(len(answer) + 2 for answer in answers)
    expected = 1 - sum(answer.count("7") for answer in answers) / total
    assert token_accuracy(policy, rows, ["image"], batch_size) == pytest.approx(expected)


def _run(monkeypatch, checkpoint, dot_dataset, folder, *flags):
    flags = ["--model_name_or_path", checkpoint, "--dataset_name", dot_dataset, "--output_dir", str(folder), *flags]
    monkeypatch.setattr(sys, "argv", ["eval_offline.py", *flags])
    load_script("eval/eval_offline.py").main()


def test_the_script_writes_what_summarize_reads(monkeypatch, checkpoint, dot_dataset, tmp_path, capsys):
    _run(monkeypatch, checkpoint, dot_dataset, tmp_path / "out", "--episodes", "4:6", "--num_frames", "6")
    offline = json.loads((tmp_path / "out" / "offline.json").read_text())
    assert offline["checkpoint"] == checkpoint and len(offline["checkpoint_hash"]) == 64
    assert offline["episodes"] == "4:6" and offline["num_frames"] == 6
    assert 0 <= offline["token_accuracy"] < 0.5  # untrained
    assert offline["rmse"] > offline["baselines"]["stay"]["rmse"] > 0
    assert f"{offline['rmse']:.2f} over the chunk" in capsys.readouterr().out


def test_another_decoding_is_that_of_the_policy_and_is_written_down(
    monkeypatch, checkpoint, dots, dot_dataset, tmp_path
):
    flags = ["--episodes", "4:6", "--num_frames", "6", "--decoding", "parallel", "--refine", "2"]
    _run(monkeypatch, checkpoint, dot_dataset, tmp_path / "out", *flags)
    offline = json.loads((tmp_path / "out" / "offline.json").read_text())
    assert offline["decoding"] == "parallel" and offline["refine"] == 2
    policy = VLAPolicy.from_pretrained(checkpoint, decoding=DecodingOptions(mode="parallel", refine=2))
    errors = action_errors(policy, pick_frames(dots[0], 4, 6, 6), ["image"], batch_size=16)
    assert offline["rmse"] == errors["rmse"]


@pytest.mark.parametrize("decoding", ["exact", "parallel"])
def test_answers_are_greedy_whatever_the_temperature(decoding, monkeypatch, checkpoint, dots, dot_dataset, tmp_path):
    warm = shutil.copytree(checkpoint, tmp_path / "warm")
    dots[1].replace(temperature=5.0).save_pretrained(warm)
    errors = []
    for folder in (checkpoint, str(warm)):
        flags = ["--episodes", "4:6", "--num_frames", "6", "--decoding", decoding]
        _run(monkeypatch, folder, dot_dataset, tmp_path / "out", *flags)
        offline = json.loads((tmp_path / "out" / "offline.json").read_text())
        assert offline["temperature"] == 0
        errors.append(offline["rmse"])
    assert errors[0] == errors[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--episodes", "6:8"], "no frames of episodes 6:8"),
        (["--episodes", "4"], "--episodes 4: expected from:to"),
        (["--episodes", "4:6", "--dataset_name", "/no/such/data"], "no folder '/no/such/data'"),
        (["--episodes", "4:6", "--batch_size", "0"], "--batch_size 0 must be at least 1"),
        (["--episodes", "4:6", "--refine", "1"], "refine=1 with exact decoding"),
    ],
)
def test_a_user_error_is_one_line(monkeypatch, checkpoint, dot_dataset, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as exit_info:
        _run(monkeypatch, checkpoint, dot_dataset, tmp_path / "out", *flags)
    errors = capsys.readouterr().err.splitlines()
    assert exit_info.value.code == 2
    assert errors[-1].startswith("error: ") and message in errors[-1]
    assert not (tmp_path / "out").exists()


def test_a_dataset_of_another_robot_is_refused(monkeypatch, checkpoint, dots, dot_dataset, tmp_path, capsys):
    faster = tmp_path / "faster"
    for part in (load_model(checkpoint), load_processor(checkpoint, dots[1]), dots[1].replace(fps=20.0)):
        part.save_pretrained(faster)
    with pytest.raises(SystemExit):
        _run(monkeypatch, str(faster), dot_dataset, tmp_path / "out", "--episodes", "4:6")
    assert "the checkpoint has fps=20.0, the dataset fps=10.0" in capsys.readouterr().err
