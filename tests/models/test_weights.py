"""Incomplete, foreign or broken weights are refused by name; transformers and PEFT would only warn."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.general import short_words

from vla0_trl.config import VLAConfig
from vla0_trl.models.fingerprint import save_base_fingerprint
from vla0_trl.models.loading import load_model, load_processor
from vla0_trl.training.run import check_same_adapter

VICTIM = "model.text_model.layers.0.mlp.up_proj.weight"


def _change(folder: Path, file: str, change) -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


@pytest.fixture
def checkpoint(tiny_nano, example_config, tmp_path) -> Path:
    """A whole checkpoint of ours."""
    folder = shutil.copytree(tiny_nano, tmp_path / "checkpoint")
    example_config.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(tiny_nano, example_config, tmp_path) -> Path:
    model = get_peft_model(
        load_model(tiny_nano), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["modality_projection"])
    )
    model.save_pretrained(tmp_path / "adapter")
    example_config.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def _set(name: str, index: int, value: float):
    def change(tensors):
        tensors[name].view(-1)[index] = value

    return change


FAULTS = {
    "missing": (lambda tensors: tensors.pop(VICTIM), f"1 weights are missing: {VICTIM}"),
    "unexpected": (lambda tensors: tensors.update(extra=torch.zeros(2)), "1 weights are unexpected: extra"),
    "nan": (_set(VICTIM, 7, float("nan")), rf"1 weights are not finite \(NaN or infinity\): {VICTIM}"),
    "infinity": (_set(VICTIM, 0, float("-inf")), f"not finite .*: {VICTIM}"),
    "shape": (lambda tensors: tensors.update({VICTIM: torch.zeros(3, 64)}), f"of another shape .*: {VICTIM}"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_with_wrong_weights_is_refused_by_name(checkpoint, fault):
    change, message = FAULTS[fault]
    _change(checkpoint, "model.safetensors", change)
    with pytest.raises(ValueError, match=message):
        load_model(checkpoint)


def test_a_base_backbone_may_carry_more_but_not_less(tiny_nano, tmp_path):
    base = shutil.copytree(tiny_nano, tmp_path / "base")
    _change(base, "model.safetensors", FAULTS["unexpected"][0])
    load_model(base)
    _change(base, "model.safetensors", FAULTS["missing"][0])
    with pytest.raises(ValueError, match="are missing"):
        load_model(base)


def test_a_cut_off_file_is_one_line(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"SafetensorError: .*: if one of its files is damaged"):
        load_model(checkpoint)


DAMAGED = "transformers can't load it .*: if one of its files is damaged"
# file, path of a field (none: the whole file), its value, what is said
FILES = [
    ("config.json", (), "{", "not a valid JSON"),
    ("config.json", (), "null", DAMAGED),
    ("config.json", (), "[1]", DAMAGED),
    ("config.json", ("model_type",), 3, DAMAGED),
    ("config.json", ("text_config",), [1], DAMAGED),
    ("config.json", ("text_config", "model_type"), 0, DAMAGED),
    ("config.json", ("text_config", "num_hidden_layers"), 10**9, "num_hidden_layers is 1000000000, wanted up to 1000"),
    ("config.json", ("text_config", "num_hidden_layers"), "x", DAMAGED),
    ("config.json", ("vision_config", "num_hidden_layers"), 10**5, "num_hidden_layers is 100000, wanted up to 1000"),
    ("config.json", ("text_config", "num_attention_heads"), 10**9, DAMAGED),
    ("config.json", ("text_config", "head_dim"), -1, DAMAGED),
    ("config.json", ("text_config", "hidden_size"), 10**5, "config.json is of a model of"),
    ("config.json", ("text_config", "intermediate_size"), 10**9, "config.json is of a model of"),
    ("config.json", ("vision_config", "image_size"), 10**9, "config.json is of a model of"),
    ("config.json", ("vision_config", "patch_size"), 10**9, DAMAGED),
    ("config.json", ("text_config", "rms_norm_eps"), None, DAMAGED),
    ("config.json", ("tie_word_embeddings",), 10**9, DAMAGED),
    ("processor_config.json", ("image_processor", "image_mean"), "x", DAMAGED),
    ("processor_config.json", ("image_processor", "image_mean"), [1, 2], DAMAGED),
    ("processor_config.json", ("image_processor", "image_mean"), [float("nan"), 0, 0], DAMAGED),
    ("processor_config.json", ("image_processor", "image_processor_type"), 10**9, DAMAGED),
    ("tokenizer.json", (), "", DAMAGED),
    ("tokenizer.json", ("model",), {}, DAMAGED),
    ("tokenizer.json", ("model", "merges"), [["q", "q"]], DAMAGED),
    ("tokenizer.json", ("added_tokens",), "x", DAMAGED),
    ("tokenizer_config.json", (), "\udcff", DAMAGED),
    ("tokenizer_config.json", (), "[]", DAMAGED),
    ("tokenizer_config.json", ("model_max_length",), "x", DAMAGED),
    ("tokenizer_config.json", ("tokenizer_class",), 10**9, DAMAGED),
]


@pytest.mark.parametrize(("file", "path", "value", "message"), FILES, ids=short_words)
def test_an_altered_file_of_transformers_is_one_line(checkpoint, file, path, value, message):
    altered = found = None
    if path:
        altered = found = json.loads((checkpoint / file).read_text())
        for name in path[:-1]:
            found = found[name]
        found[path[-1]] = value
    (checkpoint / file).write_text(json.dumps(altered) if path else value, errors="surrogateescape")
    with pytest.raises((ValueError, OSError), match=message) as error:
        load_model(checkpoint)
        load_processor(checkpoint, VLAConfig.from_pretrained(checkpoint))
    assert "\n" not in str(error.value)


def test_large_but_finite_weights_and_tied_ones_are_fine(checkpoint):
    """Their sum overflows; and the output head is not in the file, because it is the embedding."""
    tensors = load_file(checkpoint / "model.safetensors")
    assert "lm_head.weight" not in tensors
    _change(checkpoint, "model.safetensors", lambda tensors: tensors[VICTIM].fill_(3e38))
    assert load_model(checkpoint).get_parameter(VICTIM).max() == 3e38


LORA = "base_model.model.model.text_model.layers.1.self_attn.q_proj.lora_A.weight"
SAVED = "base_model.model.model.connector.modality_projection.proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(LORA), f"1 weights are missing: {LORA}"),
        (lambda tensors: tensors.pop(SAVED), f"1 weights are missing: {SAVED}"),
        (lambda tensors: tensors.update({f"{LORA}.x": torch.zeros(1)}), f"1 weights are unexpected: {LORA}.x"),
        (_set(LORA, 1, float("nan")), f"not finite .*: {LORA}"),
        (lambda tensors: tensors.update({LORA: torch.zeros(2, 63)}), "does not fit its base model"),
    ],
    ids=["missing", "missing module", "unexpected", "nan", "shape"],
)
def test_an_adapter_with_wrong_weights_is_refused_by_name(adapter, change, message):
    load_model(adapter)
    _change(adapter, "adapter_model.safetensors", change)
    with pytest.raises(ValueError, match=message):
        load_model(adapter)


@pytest.mark.parametrize(
    ("file", "value", "message"),
    [
        ("adapter_config.json", None, "adapter_config.json: is not JSON"),
        ("adapter_config.json", [1], "wanted an object"),
        (
            "adapter_config.json",
            {"base_model_name_or_path": [1]},
            "base_model_name_or_path is .*, wanted a line of text",
        ),
        ("adapter_config.json", {"base_model_name_or_path": "absent/x"}, "absent/x: We couldn't connect"),
        ("adapter_config.json", {"revision": 5}, "revision is 5, wanted text"),
        ("adapter_config.json", {"peft_type": [1]}, DAMAGED),
        ("adapter_config.json", {"r": None}, DAMAGED),
        ("adapter_config.json", {"r": 3}, "does not fit its base model"),
        ("adapter_config.json", {"lora_alpha": "x"}, DAMAGED),
        ("adapter_config.json", {"target_modules": 10**9}, DAMAGED),
        ("adapter_config.json", {"megatron_config": [1]}, DAMAGED),
        ("base_model.json", {"fingerprint": 3}, "fingerprint is 3, wanted text"),
        ("base_model.json", [], "wanted an object"),
    ],
    ids=short_words,
)
def test_an_altered_file_of_an_adapter_is_one_line(adapter, file, value, message):
    save_base_fingerprint(adapter)
    found = json.loads((adapter / file).read_text())
    text = "{" if value is None else json.dumps(found | value if isinstance(value, dict) else value)
    (adapter / file).write_text(text)
    with pytest.raises((ValueError, OSError), match=message) as error:
        load_model(adapter)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["IA3", "X"])
def test_an_adapter_of_another_kind_is_not_trained_further(adapter, kind):
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": kind}))
    with pytest.raises(ValueError, match=DAMAGED) as error:
        check_same_adapter(LoraConfig(r=2), str(adapter))
    assert "\n" not in str(error.value)


def test_a_broken_base_model_of_an_adapter_is_refused(adapter, tiny_nano, tmp_path):
    base = shutil.copytree(tiny_nano, tmp_path / "base")
    _change(base, "model.safetensors", FAULTS["nan"][0])
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace(str(tiny_nano), str(base)))
    with pytest.raises(ValueError, match=f"not finite .*: {VICTIM}"):
        load_model(adapter)
