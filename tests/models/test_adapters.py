"""Adapters find their base model, at its revision, from any directory; and are trained further."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.backbones import TINY
from support.runs import predicts, run

from vla0_trl.models.fingerprint import base_model_of, base_revision_of
from vla0_trl.models.nano import NanoConfig, build_nano

LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub's cache on disk with two revisions of org/base, whose weights differ."""
    repository = tmp_path / "hub" / "models--org--base"
    for seed, (revision, commit) in enumerate((("main", "a" * 40), ("v1", "b" * 40))):
        model, processor = build_nano(NanoConfig(**TINY), seed=seed)
        for part in (model, processor):
            part.save_pretrained(repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return repository / "snapshots"


def test_an_adapter_keeps_the_revision_of_its_base_model(hub, dot_dataset, tmp_path):
    model = {"model_name_or_path": "org/base", "model_revision": "v1", **LORA}
    adapter = run(dot_dataset, tmp_path / "run", model, nano=None)
    assert (base_model_of(adapter), base_revision_of(adapter)) == ("org/base", "v1")
    answer = predicts(adapter)  # also compares the base model's fingerprint
    shutil.rmtree(hub / ("a" * 40))  # the newest revision is not asked for
    assert np.array_equal(predicts(adapter), answer)


def test_a_base_model_by_relative_path_is_found_from_any_directory(dot_dataset, tiny_nano, tmp_path, monkeypatch):
    shutil.copytree(tiny_nano, tmp_path / "models" / "base")
    monkeypatch.chdir(tmp_path)
    adapter = run(dot_dataset, tmp_path / "runs" / "lora", {"model_name_or_path": "models/base", **LORA}, nano=None)
    answer = predicts(adapter)
    monkeypatch.chdir("/")
    assert np.array_equal(predicts(adapter), answer)
    config = adapter / "adapter_config.json"
    written = json.loads(config.read_text())
    assert written["base_model_name_or_path"] == str(tmp_path / "models" / "base")
    # as adapters of other programs, and older ones of ours, have it
    config.write_text(json.dumps(written | {"base_model_name_or_path": "models/base"}))
    assert np.array_equal(predicts(adapter), answer)
    moved = shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-moved"))
    assert base_model_of(moved / "runs" / "lora") == str(moved / "models" / "base")


@pytest.mark.parametrize("flags", [LORA, {}], ids=["the same recipe", "without use_peft"])
def test_a_lora_checkpoint_as_model_is_the_same_adapter_trained_further(flags, dot_dataset, tmp_path):
    first = run(dot_dataset, tmp_path / "first", LORA)
    second = run(
        dot_dataset, tmp_path / "second", {**flags, "model_name_or_path": str(first)}, nano=None, save_initial=True
    )
    assert np.array_equal(predicts(second / "initial"), predicts(first))
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert base_model_of(second) == base_model_of(first) == str(first / "base_model")
    with pytest.raises(ValueError, match=r"with r=4, which is trained further, so r=8 would do nothing"):
        run(dot_dataset, tmp_path / "third", {**LORA, "lora_r": 8, "model_name_or_path": str(first)}, nano=None)


def test_a_target_that_shares_its_weight_is_refused_in_training(dot_dataset, tmp_path):
    with pytest.raises(ValueError, match=r"target .*embed_tokens shares its weight with .*lm_head.* leave it out"):
        run(dot_dataset, tmp_path / "run", LORA | {"lora_target_modules": ["q_proj", "embed_tokens"]})
