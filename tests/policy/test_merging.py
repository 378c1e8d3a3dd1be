"""Merged adapters act like adapters, and adapters stay with their base model."""

import json
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.backbones import TINY, observations
from support.general import load_script
from support.runs import predicts, run

from vla0_trl import VLAPolicy
from vla0_trl.models.adapters import merge_adapter
from vla0_trl.models.fingerprint import fingerprint
from vla0_trl.models.loading import load_model, load_processor
from vla0_trl.models.nano import NanoConfig, build_nano
from vla0_trl.policy.merging import merge

LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": [r".*\.(text_model|connector|vision_model)\..*proj"]}


@pytest.mark.parametrize("flags", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_a_merged_checkpoint_acts_like_the_adapter(flags, dot_dataset, tmp_path, monkeypatch):
    adapter, merged = run(dot_dataset, tmp_path / "run", LORA | flags, save_initial=True), tmp_path / "merged"
    script = load_script("recipes/merge_adapter.py")
    monkeypatch.setattr("sys.argv", ["merge", "--model_name_or_path", str(adapter), "--output_dir", str(merged)])
    script.main()
    assert np.array_equal(predicts(merged), predicts(adapter))
    assert not np.array_equal(predicts(merged), predicts(adapter / "initial"))
    assert not list(merged.glob("adapter*")) and type(VLAPolicy.from_pretrained(merged).model).__name__[:4] == "Smol"
    base, whole = (load_file(folder / "model.safetensors") for folder in (adapter / "base_model", merged))
    assert base.keys() == whole.keys()
    changed = {name for name in base if not torch.equal(base[name], whole[name])}
    assert {part for part in ("text_model", "connector", "vision_model") if any(part in name for name in changed)} == {
        "text_model", "connector", "vision_model"
    }  # fmt: skip
    assert all("proj" in name for name in changed)


def _random_adapter(base: str, folder, config, **lora):
    """A large change, so that wrong merges show; no training."""
    torch.manual_seed(0)
    model = get_peft_model(load_model(base), LoraConfig(r=4, lora_alpha=16, init_lora_weights=False, **lora))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    for part in (model, load_processor(base, config), config):
        part.save_pretrained(folder)
    return folder


def test_a_target_that_is_tied_is_not_merged(tiny_nano, example_config, tmp_path):
    adapter = _random_adapter(tiny_nano, tmp_path / "a", example_config, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(ValueError, match=r"embed_tokens shares its weight with .*lm_head"):
        merge(str(adapter), tmp_path / "merged", torch.float32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_a_merged_config_says_that_embeddings_are_tied_no_more(saved, tiny_nano, example_config, tmp_path):
    lora = {"target_modules": ["q_proj"], "modules_to_save": [saved]}
    adapter, merged = _random_adapter(tiny_nano, tmp_path / "a", example_config, **lora), tmp_path / "merged"
    merge(str(adapter), merged, torch.float32)
    config = json.loads((merged / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(merged / "model.safetensors")
    chunks = [VLAPolicy.from_pretrained(each).predict_action_chunk(observations(3)) for each in (adapter, merged)]
    assert np.array_equal(*chunks)


def test_a_merged_model_that_answers_differently_is_not_written(tiny_nano, example_config, tmp_path, monkeypatch):
    adapter = _random_adapter(tiny_nano, tmp_path / "a", example_config, target_modules=["q_proj"])

    def half(model):
        merged = merge_adapter(model)
        merged.get_parameter("model.text_model.layers.0.self_attn.q_proj.weight").data *= 0.5
        return merged

    monkeypatch.setattr("vla0_trl.models.adapters.merge_adapter", half)
    with pytest.raises(ValueError, match=r"does not answer as the adapter does: logits differ by"):
        merge(str(adapter), tmp_path / "merged", torch.float32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


@pytest.fixture(scope="module")
def adapter(dot_dataset, tmp_path_factory):
    return run(dot_dataset, tmp_path_factory.mktemp("runs") / "run", LORA)


def test_an_adapter_refuses_another_base_model(adapter, tmp_path):
    """Of the same shape, so that it would load without a word."""
    moved = shutil.copytree(adapter, tmp_path / "run")
    other, processor = build_nano(NanoConfig(**TINY), seed=99)
    shutil.rmtree(moved / "base_model")
    other.save_pretrained(moved / "base_model")
    processor.save_pretrained(moved / "base_model")
    config = (moved / "adapter_config.json").read_text().replace(str(adapter), str(moved))
    (moved / "adapter_config.json").write_text(config)
    with pytest.raises(ValueError, match=r"other weights now: an adapter only means something on its own base model"):
        predicts(moved)
    # Moved together with its own base model, it is at home.
    shutil.rmtree(moved / "base_model")
    shutil.copytree(adapter / "base_model", moved / "base_model")
    assert np.array_equal(predicts(moved), predicts(adapter))


def test_fingerprints_see_changed_weights(tiny_nano, tmp_path):
    copy = shutil.copytree(tiny_nano, tmp_path / "copy")
    assert fingerprint(copy) == fingerprint(tiny_nano)
    weights = load_file(copy / "model.safetensors")
    weights["model.connector.modality_projection.proj.weight"] += 1e-3
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(copy) != fingerprint(tiny_nano)


def test_what_is_no_adapter_or_would_be_overwritten_is_refused(adapter, dot_dataset, tmp_path, monkeypatch, capsys):
    script = load_script("recipes/merge_adapter.py")
    full = run(dot_dataset, tmp_path / "full", max_steps=1)
    for source, target, message in (
        (full, tmp_path / "m", "has no adapter to merge"),
        (adapter, full, "is not empty"),
        (tmp_path / "nothing", tmp_path / "m", "no folder"),
    ):
        monkeypatch.setattr("sys.argv", ["m", "--model_name_or_path", str(source), "--output_dir", str(target)])
        with pytest.raises(SystemExit, match="2"):
            script.main()
        printed = capsys.readouterr().err
        assert printed.splitlines()[-1].startswith("error: ") and message in printed and not (tmp_path / "m").exists()
