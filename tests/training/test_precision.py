"""A machine without a GPU, or with one without bfloat16, is said at the start, instead of a NaN after an hour."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from trl import ModelConfig

from vla0_trl.training.arguments import DataArguments, VLASFTConfig
from vla0_trl.training.settings import CPU_RECIPES, PRECISION_ADVICE, check_together, without_bfloat16


@pytest.fixture
def card(monkeypatch):
    """A T4 and an RTX 3060, by what torch tells of them."""

    def put_in(name: str, capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)

    return put_in


def test_cards_before_ampere_have_none(card):
    assert without_bfloat16() is None or torch.cuda.is_available()
    card("Tesla T4", (7, 5))
    assert without_bfloat16() == "Tesla T4"
    card("NVIDIA GeForce RTX 3060", (8, 6))
    assert without_bfloat16() is None


def test_bf16_on_such_a_card_is_an_error_with_advice(card, tmp_path):
    card("Tesla T4", (7, 5))
    with pytest.raises(
        ValueError, match=r"^bf16=True, but Tesla T4 can't multiply in bfloat16: float16 does not help"
    ):
        VLASFTConfig(output_dir=str(tmp_path), bf16=True)


def test_without_a_gpu_the_recipes_for_a_cpu_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("vla0_trl.training.arguments.is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(
        ValueError, match=rf"^bf16=True, and torch finds no GPU.* {re.escape(CPU_RECIPES)} are for a CPU"
    ):
        VLASFTConfig(output_dir=str(tmp_path), bf16=True)
    folder = Path(__file__).parents[2] / "recipes"
    files = [path for path in folder.glob("*/*.yaml") if yaml.safe_load(path.read_text()).get("use_cpu")]
    assert sorted(re.split(", | and ", CPU_RECIPES)) == sorted(str(path.relative_to(folder)) for path in files)


def test_so_are_weights_in_bfloat16(card, tmp_path):
    training = VLASFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    training.use_cpu = False  # as on a machine with a GPU, which this one may not be
    card("Tesla T4", (7, 5))
    with pytest.raises(ValueError, match=r"^dtype=bfloat16, but Tesla T4"):
        check_together(DataArguments(dataset_name="x"), training, ModelConfig(dtype="bfloat16"))


def test_fp16_is_warned_about(tmp_path, capsys):
    VLASFTConfig(output_dir=str(tmp_path), fp16=True, bf16=False, use_cpu=True)
    assert capsys.readouterr().out == f"warning: fp16=True: {PRECISION_ADVICE}\n"
