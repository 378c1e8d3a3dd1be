"""The probes tell a policy that sees from one that does not, and leave the training alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from packaging.version import Version
from support.backbones import TINY
from support.runs import SHARDED, launch, losses, run

from vla0_trl import VLAPolicy
from vla0_trl.config import VLAConfig
from vla0_trl.data.chat_dataset import load_chat_dataset
from vla0_trl.data.convert import convert
from vla0_trl.data.episodes import Episode, SourceInfo
from vla0_trl.models.loading import load_model, load_processor
from vla0_trl.training.arguments import VLASFTConfig
from vla0_trl.training.observation_gap import ProbeCallback
from vla0_trl.training.trainer import VLATrainer

GAPS = ("observation_gap", "image_gap", "state_gap")


class TwoAnswers:
    """Episodes of one answer each, that only the image's colour or only the state tells."""

    def __init__(self, told_by: str):
        self.told_by = told_by
        self.info = SourceInfo("two answers", "1", "apache-2.0", "none", 10.0, "Computed.", {"told_by": told_by})

    def __len__(self) -> int:
        return 8

    def task(self, index: int) -> str:
        return "Answer."

    def episode(self, index: int) -> Episode:
        answer, other = index // 4, index % 2  # `other` says nothing about the answer
        shown, state = (answer, other) if self.told_by == "images" else (other, answer)
        images = np.full((6, 48, 48, 3), 255 * shown, np.uint8)
        states, actions = np.full((6, 1), state, np.float32), np.full((6, 2), answer, np.float32)
        return Episode("Answer.", actions, {"image": images}, states, f"episode {index}")


def probed(output_dir) -> list[dict[str, float]]:
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "observation_gap" in entry]


@pytest.mark.parametrize("told_by", ["images", "state"])
def test_the_gap_is_of_what_the_policy_looks_at(told_by, tmp_path):
    config = VLAConfig(action_dim=2, state_dim=1, chunk_size=2, image_size=48, use_state=True, num_bins=511)
    dataset = str(convert(TwoAnswers(told_by), config, tmp_path / "data"))
    out = run(dataset, tmp_path / "r", max_steps=60, probe_steps=30, learning_rate=3e-3, per_device_eval_batch_size=16)
    entries = probed(out)
    assert [entry["step"] for entry in entries] == [30, 60]
    seen, other = entries[-1], {"images": "state_gap", "state": "image_gap"}[told_by]
    looked_at = {"images": "image_gap", "state": "state_gap"}[told_by]
    assert seen[looked_at] > 0.5 and abs(seen[other]) < 0.1
    assert seen["observation_gap"] == pytest.approx(seen[looked_at], rel=0.1)
    assert seen["first_action_loss"] < 0.1


@pytest.fixture
def trainer(dot_dataset, tiny_nano, tmp_path) -> VLATrainer:
    dataset, config = load_chat_dataset(dot_dataset)
    args = VLASFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", probe_steps=1)
    return VLATrainer(load_model(tiny_nano), args, config, load_processor(tiny_nano, config), dataset, config.cameras)


def test_a_policy_that_cannot_see_has_no_gap(trainer):
    """With a connector of zeros, all images are the same to it; the state's text still arrives."""
    probe = ProbeCallback(trainer)
    trainer.model.eval()
    before = probe.measure()
    assert all(before[name] != 0 for name in GAPS)
    torch.nn.init.zeros_(trainer.model.model.connector.modality_projection.proj.weight)
    blind = probe.measure()
    assert blind["image_gap"] == 0 and blind["state_gap"] != 0
    assert blind["observation_gap"] == pytest.approx(blind["state_gap"], abs=1e-6)


def test_first_action_loss_is_of_the_first_action_alone(trainer):
    """Compared with the model's own loss where only those tokens are labels."""
    probe = ProbeCallback(trainer)
    trainer.model.eval()
    rows = [trainer.train_dataset[index] for index in probe._chosen]
    batch = trainer.eval_collator(rows)
    for labels, row in zip(batch["labels"], rows, strict=True):
        text = " ".join(row["action"].split(" ")[:2])
        first = int((labels >= 0).nonzero()[0])
        tokens = len(trainer.processing_class.tokenizer(" " + text)["input_ids"]) - (
            not trainer.eval_collator.chat_tokenizer.prefix
        )
        labels[first + tokens :] = -100
    with torch.no_grad():
        expected = trainer.model(**trainer.prepare_batch(batch)).loss.item()
    assert probe.measure()["first_action_loss"] == pytest.approx(expected, rel=1e-4)


def test_errors_of_answers_are_those_of_the_policy_and_of_staying(trainer):
    probe = ProbeCallback(trainer)
    trainer.model.eval()
    found = probe.measure()
    policy = VLAPolicy(trainer.model, trainer.processing_class, trainer.vla_config)
    squares, of_staying = [], []
    for index in probe._chosen:
        row = trainer.train_dataset[index]
        state, true = np.array(row["raw_state"], np.float32), np.array(row["raw_action"]).reshape(4, 2)
        observation = {"images": {"image": np.asarray(row["images"][0])}, "state": state, "task": row["task"]}
        squares.append((policy.predict_action_chunk([observation])[0] - true) ** 2)
        of_staying.append((state - true) ** 2)
    assert found["chunk_rmse"] == pytest.approx(np.sqrt(np.mean(squares)), rel=1e-5)
    assert found["stay_rmse"] == pytest.approx(np.sqrt(np.mean(of_staying)), rel=1e-5)
    assert found["first_value_loss"] != found["first_action_loss"]


def test_probes_leave_the_training_alone(dot_dataset, tmp_path):
    options = {"max_steps": 4, "mask_max": 1.0, "nano": TINY}
    plain, watched = (
        run(dot_dataset, tmp_path / "a", **options),
        run(dot_dataset, tmp_path / "b", probe_steps=1, **options),
    )
    assert losses(watched) == losses(plain)
    accuracies = [
        [
            entry["mean_token_accuracy"]
            for entry in json.loads((out / "trainer_state.json").read_text())["log_history"]
            if "loss" in entry
        ]
        for out in (plain, watched)
    ]
    assert accuracies[0] == accuracies[1]
    assert len(probed(watched)) == 4 and not probed(plain)


def test_held_out_rows_are_probed_where_there_are_some(dot_dataset, tmp_path, trainer):
    assert len(ProbeCallback(trainer)._chosen) == 60
    trainer.eval_dataset = trainer.train_dataset.select(range(40, 60))
    probe = ProbeCallback(trainer)
    assert probe._dataset is trainer.eval_dataset and len(probe._chosen) == 20
    trainer.eval_dataset = trainer.train_dataset.select([0])
    with pytest.raises(ValueError, match="needs at least 2 rows, there are 1"):
        ProbeCallback(trainer)


@pytest.fixture(scope="module")
def one_process(dot_dataset, tmp_path_factory) -> list[dict[str, float]]:
    out = tmp_path_factory.mktemp("one") / "r"
    launch("cpu", 1, dot_dataset, out, "--probe_steps", 2, "--logging_steps", 2)
    return probed(out)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["multi_gpu", *SHARDED])
def test_two_processes_measure_what_one_does(config, dot_dataset, one_process, tmp_path):
    if config == "fsdp2" and Version(torch.__version__) < Version("2.12"):
        pytest.skip("torch 2.11 leaves FSDP2's weights sharded here")
    launch(config, 2, dot_dataset, tmp_path / "r", "--probe_steps", 2, "--logging_steps", 2)
    entries = probed(tmp_path / "r")
    assert [entry["step"] for entry in entries] == [2, 4]
    for entry, expected in zip(entries, one_process, strict=True):
        for name in ("first_action_loss", *GAPS):
            assert entry[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4)
