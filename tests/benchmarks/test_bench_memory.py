"""The memory benchmark: synthetic rows of true shape, and what shallow models tell of deep ones."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from support.backbones import TINY
from support.general import REPOSITORY, load_script, shared_path
from transformers import AutoConfig, AutoModelForImageTextToText

from vla0_trl.benchmarks import memory, memory_table
from vla0_trl.benchmarks.synthetic import synthetic_dataset
from vla0_trl.models.loading import load_processor
from vla0_trl.models.nano import NanoConfig, build_nano
from vla0_trl.processing.chat_tokenizer import ChatTokenizer
from vla0_trl.training.arguments import parse_recipe

CONFIGS = sorted((REPOSITORY / "recipes").rglob("*12gb.yaml"))
DEPTH = {"num_layers": 5, "vision_layers": 3}


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    """An estimate of a nano of five and three layers, from its folder's config and processor alone."""
    folder = tmp_path_factory.mktemp("bench")
    source, config = folder / "models" / "SmolVLM2-500M-Video-Instruct", CONFIGS[0]
    model, processor = build_nano(NanoConfig(**TINY | DEPTH | {"image_size": 96}))
    model.config.save_pretrained(source)
    processor.save_pretrained(source)
    words = ["bench", str(config), "--model_configs", str(source.parent), "--json", str(folder / "memory.json")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sys.argv", [*words, "--image_size", "96", "--per_device_train_batch_size", "6", "--bf16", "false"]
        )
        load_script("recipes/bench_memory.py").main()
    return json.loads((folder / "memory.json").read_text()) | {"source": str(source), "config": str(config)}


def test_the_estimate_of_shallow_models_is_the_whole_models_arithmetic(report):
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(report["source"]))
    parameters = sum(p.nbytes for p in model.parameters()) / 2**30
    figures = report["configs"][report["config"]]
    buffers = sum(b.nbytes for b in model.buffers()) / 2**30
    assert figures["weights_gib"] == pytest.approx(parameters + buffers, rel=1e-3)
    assert figures["gradients_gib"] == pytest.approx(parameters, rel=1e-6)
    # 8-bit Adam keeps two bytes of a weight's four; small tensors and embeddings stay in 32 bit.
    assert 0.5 * parameters < figures["optimizer_gib"] < 2 * parameters
    assert figures["peak_gib"] == pytest.approx(sum(figures[f"{part}_gib"] for part in memory.PARTS))
    assert report["estimated"] and report["peak_gib"] == {report["config"]: figures["peak_gib"]}
    assert report["versions"]["torch"] == torch.__version__.split("+")[0] and report["machine"]["device"] == "cpu"


def test_the_extrapolation_meets_the_whole_model(report, tmp_path, monkeypatch):
    """Activations of five and three layers with six samples, as they really are."""
    plan = memory_plan(report, tmp_path)
    memory.random_checkpoint(report["source"], tmp_path / "whole", torch.float32)
    plan[2].model_name_or_path = str(tmp_path / "whole")
    monkeypatch.setattr(memory.chunked_logprob, "TOKEN_CHUNK_SIZE", memory._CPU_TOKEN_CHUNK)
    found = memory._measure_on_cpu(plan, "libero")
    vocabulary = AutoConfig.from_pretrained(report["source"]).text_config.vocab_size
    head = 6 * found["answer_tokens"] * vocabulary * 2
    estimated = report["configs"][report["config"]]["activations_gib"] * 2**30 - head
    # Rows differ in length with how many of their values are hidden: 2 % with mask_max 0.15.
    assert estimated == pytest.approx(found["kept"] + found["passing"], rel=0.03)


def memory_plan(report: dict, folder: Path):
    settings = {"output_dir": folder / "run", "report_to": "none", "save_strategy": "no", "use_cpu": "true"}
    settings |= {"bf16": "false", "max_steps": 2, "gradient_accumulation_steps": 1, "dataloader_num_workers": 0}
    settings |= {"dataloader_persistent_workers": "false", "image_size": 96, "per_device_train_batch_size": 6}
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    return parse_recipe(Path(report["config"]), "", ["--config", report["config"], *words])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_recipes_for_12_gb_say_what_they_need(path):
    text = path.read_text()
    assert "12 GB" in text and "Memory: " in text and "@" not in text.split("# Model")[0]
    values = yaml.safe_load(text)
    batch = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"]
    assert batch == (16 if path.parent.name == "pusht" else 64)
    assert values["optim"] == "adamw_bnb_8bit" and values["bf16"]
    assert (values["dtype"] == "bfloat16") == values.get("use_peft", False), "only frozen weights may be rounded"


def test_pages_and_recipes_show_the_one_table_of_memory():
    table = memory_table.load_table()
    assert table.keys() >= {f"{path.parent.name}/{path.name}" for path in CONFIGS}
    columns, measurements = [*memory.PARTS, "peak"], (REPOSITORY / "recipes/measurements.md").read_text()
    assert f"| recipe | {' | '.join(columns)} |\n" in measurements
    overview = (REPOSITORY / "recipes/README.md").read_text().splitlines()
    for name, figures in table.items():
        cells = [f"{figures[f'{part}_gib']:.1f}" for part in columns]
        assert f"| `{name}` | {' | '.join(cells)} |\n" in measurements
        peak = f"{figures['peak_gib']:.1f} GiB"
        assert f"Memory: about {peak} at its peak" in (REPOSITORY / "recipes" / name).read_text()
        [row] = [line for line in overview if line.startswith("| ") and f"`{name}`" in line]
        assert f" {peak} (e) |" in row


@pytest.mark.parametrize(
    ("kind", "image_size", "tokens"), [("libero", 256, range(290, 330)), ("pusht", 512, range(150, 220))]
)
def test_synthetic_rows_have_the_true_length(kind, image_size, tokens):
    """With the real tokenizer: 56 or 20 integers of mostly three digits, one token per digit."""
    dataset, config = synthetic_dataset(kind, 4)
    config = config.replace(image_size=image_size, use_state=True)
    processor = load_processor(shared_path("data/models/SmolVLM2-500M-Video-Instruct"), config)
    chat = ChatTokenizer(processor, config)
    prompt = chat.encode_prompt(dataset[0]["task"], [500] * config.state_dim)
    answer = chat.encode_answer([int(number) for number in dataset[0]["action"].split()])[0]
    assert len(prompt) + len(answer) in tokens
    assert [image.size for image in dataset[0]["images"]] == [(256, 256)] * 2 if kind == "libero" else [(96, 96)]


def test_a_mistyped_option_of_the_recipes_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench", str(CONFIGS[0]), "--lora_rr", "8"])
    with pytest.raises(SystemExit, match="2"):
        load_script("recipes/bench_memory.py").main()
    assert capsys.readouterr().err == "error: unknown argument --lora_rr: did you mean --lora_r?\n"
