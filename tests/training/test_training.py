"""Every way to train, for real, on a tiny nano backbone: what should move moves, and a resumed run is the same run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.backbones import TINY
from support.general import ONE_MORE, HostSyncs
from support.runs import losses, predicts, run
from trl import SFTConfig, SFTTrainer

from vla0_trl import VLAPolicy
from vla0_trl.data.chat_dataset import load_chat_dataset
from vla0_trl.models.loading import load_model, load_processor
from vla0_trl.run_folder import last_checkpoint
from vla0_trl.training.arguments import DataArguments, VLASFTConfig
from vla0_trl.training.row_trace import NotFiniteError
from vla0_trl.training.run import hold_out
from vla0_trl.training.trainer import VLATrainer

AUGMENTED = {"crop_ratio": 0.75, "image_jitter": [0.2, 0.2, 0.2, 0.05]}


def moved(before: Path, after: Path) -> dict[str, bool]:
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert old.keys() == new.keys()
    return {name: not torch.equal(old[name], new[name]) for name in old}


@pytest.fixture(scope="module")
def full_run(dot_dataset, tmp_path_factory) -> Path:
    """Four steps of full fine-tuning with a checkpoint at each second, uninterrupted."""
    out = tmp_path_factory.mktemp("runs") / "full"
    return run(dot_dataset, out, data=AUGMENTED, max_steps=4, save_steps=2, save_initial=True)


def test_full_fine_tuning_moves_every_parameter(full_run):
    changes = moved(full_run / "initial", full_run)
    # Positions and bytes that never occur have no gradient, but weight decay alone would not count either.
    assert all(changes.values()), [name for name, changed in changes.items() if not changed]
    assert losses(full_run)[-1] < losses(full_run)[0]


def test_every_checkpoint_is_self_sufficient(full_run):
    final = predicts(full_run)
    assert final.shape == (1, 4, 2)
    assert np.array_equal(predicts(full_run / "checkpoint-4"), final)
    assert all(moved(full_run / "checkpoint-2", full_run).values())
    assert predicts(full_run / "checkpoint-2").shape == predicts(full_run / "initial").shape == (1, 4, 2)
    assert not list(full_run.rglob("*.bin.index.json")) and not list(full_run.rglob("pytorch_model*"))


def test_metrics_include_action_token_accuracy(full_run):
    history = json.loads((full_run / "trainer_state.json").read_text())["log_history"]
    assert all(0 <= entry["mean_token_accuracy"] <= 1 for entry in history if "loss" in entry)


def test_resume_gives_the_losses_of_an_uninterrupted_run(full_run, dot_dataset, tmp_path):
    killed = tmp_path / "full"
    shutil.copytree(full_run, killed)
    for path in (*killed.glob("checkpoint-4"), *killed.glob("*.safetensors"), killed / "vla_config.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    # What a kill in the middle of writing leaves is not taken for a checkpoint.
    (killed / "checkpoint-3").mkdir()
    (killed / "checkpoint-3" / "model.safetensors").write_bytes(b"half")
    assert last_checkpoint(killed) == killed / "checkpoint-2"
    run(dot_dataset, killed, data=AUGMENTED, max_steps=4, save_steps=2, save_initial=True)
    assert losses(killed) == losses(full_run)
    assert not any(moved(full_run, killed).values())


def test_a_finished_run_is_not_trained_again(full_run, dot_dataset):
    before = (full_run / "model.safetensors").stat().st_mtime_ns
    run(dot_dataset, full_run, data=AUGMENTED, max_steps=4, save_steps=2, save_initial=True)
    assert (full_run / "model.safetensors").stat().st_mtime_ns == before


def test_muon_in_bfloat16_resumes_bit_for_bit(dot_dataset, tmp_path):
    """Float32 copies of the weights, momentum, schedule: with one token per number, labels kept and waypoints."""
    options = {"optim": "muon", "muon_adamw_learning_rate": 2e-2, "lr_scheduler_type": "cosine", "warmup_steps": 1}
    options |= {"nano": TINY | {"number_tokens": True}, "mask_labels": "keep", "mask_full": 0.75}
    shared = {"model": {"dtype": "bfloat16"}, "data": {"waypoints": [0, 3]}, "max_steps": 4, "save_steps": 2}
    whole = run(dot_dataset, tmp_path / "whole", save_initial=True, **shared, **options)
    assert all(moved(whole / "initial", whole).values())
    resumed = tmp_path / "resumed"
    shutil.copytree(whole, resumed)
    for path in (*resumed.glob("checkpoint-4"), *resumed.glob("*.safetensors"), resumed / "vla_config.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run(dot_dataset, resumed, save_initial=True, **shared, **options)
    assert losses(resumed) == losses(whole) and not any(moved(whole, resumed).values())
    assert predicts(whole).shape == (1, 4, 2)


def test_rows_in_memory_change_nothing(full_run, dot_dataset, tmp_path):
    options = {"max_steps": 4, "save_steps": 2, "save_initial": True}
    assert losses(run(dot_dataset, tmp_path / "r", data=AUGMENTED, rows_in_memory=True, **options)) == losses(full_run)
    with pytest.raises(ValueError, match="once in every worker: set one of the two to 0"):
        run(dot_dataset, tmp_path / "s", rows_in_memory=True, dataloader_num_workers=2)


def test_frozen_vision_stays(dot_dataset, tmp_path):
    changes = moved(
        *(run(dot_dataset, tmp_path / "r", freeze_vision=True, save_initial=True) / d for d in ("initial", ""))
    )
    vision = {name for name in changes if ".vision_model." in name}
    assert vision and {name for name, changed in changes.items() if not changed} == vision


@pytest.mark.parametrize("freeze_vision", [False, True])
def test_lora_trains_the_adapter_alone(dot_dataset, tmp_path, freeze_vision):
    model = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["all-linear"]}
    out = run(dot_dataset, tmp_path / "r", model, freeze_vision=freeze_vision, save_initial=True, save_steps=3)
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (out / "initial", out))
    assert old.keys() == new.keys() and not (out / "model.safetensors").exists()
    vision = {name for name in new if "vision_model" in name}
    assert bool(vision) != freeze_vision
    assert all(not torch.equal(old[name], new[name]) for name in new if "lora_B" in name)
    # The base model beside the run is untouched, and found by the adapter alone, from every checkpoint.
    base = load_file(out / "base_model" / "model.safetensors")
    again = run(dot_dataset, tmp_path / "s", model, freeze_vision=freeze_vision)
    assert all(torch.equal(base[name], t) for name, t in load_file(again / "base_model" / "model.safetensors").items())
    assert np.array_equal(predicts(out), predicts(out / "checkpoint-3"))
    policy = VLAPolicy.from_pretrained(out)
    assert type(policy.model).__name__.startswith("Peft") and policy.config.base_model == str(out / "base_model")


def test_8_bit_adam_trains(dot_dataset, tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs the extra [train8bit]")
    out = run(dot_dataset, tmp_path / "r", optim="adamw_bnb_8bit", save_initial=True, save_steps=3)
    assert all(moved(out / "initial", out).values())
    state = torch.load(out / "checkpoint-3" / "optimizer.pt", weights_only=True)["state"]
    dtypes = {tensor.dtype for tensor in torch.utils._pytree.tree_leaves(state) if torch.is_tensor(tensor)}
    assert torch.uint8 in dtypes


def test_bf16_trains(dot_dataset, tmp_path):
    out = run(dot_dataset, tmp_path / "r", bf16=True, save_initial=True)
    assert all(moved(out / "initial", out).values())
    full = run(dot_dataset, tmp_path / "s")
    np.testing.assert_allclose(losses(out), losses(full), rtol=0.02)
    assert losses(out) != losses(full)


def test_accumulation_and_checkpointing_change_nothing_but_memory(dot_dataset, tmp_path):
    plain = losses(run(dot_dataset, tmp_path / "plain"))
    for name, options in {
        "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        "checkpointed": {"gradient_checkpointing": True},
    }.items():
        np.testing.assert_allclose(losses(run(dot_dataset, tmp_path / name, **options)), plain, rtol=1e-3)


def test_compiled_steps_equal_plain_ones_and_compile_once(dot_dataset, tmp_path, monkeypatch):
    plain = losses(run(dot_dataset, tmp_path / "plain", max_steps=4))
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):
        monkeypatch.setenv(name, "no")  # which transformers sets for good
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = run(dot_dataset, tmp_path / "c", max_steps=4, torch_compile=True, torch_compile_backend="aot_eager")
    np.testing.assert_allclose(losses(compiled), plain, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert predicts(compiled).shape == (1, 4, 2)


def test_stops_at_token_accuracy(dot_dataset, tmp_path):
    out = run(dot_dataset, tmp_path / "r", max_steps=50, stop_at_token_accuracy=0.01)
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["global_step"] < 50 and state["log_history"][-2]["mean_token_accuracy"] >= 0.01
    assert (out / f"checkpoint-{state['global_step']}" / "vla_config.json").exists()


def test_a_run_says_what_it_will_take(dot_dataset, tmp_path, capsys):
    model = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"]}
    run(dot_dataset, tmp_path / "r", model, max_steps=21, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    printed = capsys.readouterr().out
    model, sample, batch, duration = printed[printed.index("model:") :].splitlines()[:4]
    assert "base_model, 0.2 M parameters" in model
    # 4 image tokens of a 48 px image; 8 integers of up to 3 digits, 7 or 8 spaces and an end of turn.
    assert sample == "sample:   98 tokens: 4 of images, 33 of the answer"
    assert batch == "batch:    6 samples = 2 at once × 3 accumulated × 1 process"
    assert duration == "duration: 21 steps = 2.10 epochs over 60 samples"
    speed, memory = printed[printed.index("speed:") :].splitlines()[:2]
    assert "samples/s; about " in speed and speed.endswith(" s left")
    assert 0.1 < float(memory.split("at most ")[1].split(" GiB")[0]) < 64


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_rows(dot_dataset, tmp_path):
    out = tmp_path / "r"
    with pytest.raises(NotFiniteError, match=r"the loss is nan at step 2; the batch's rows are in .*process0.json"):
        run(dot_dataset, out, learning_rate=1e10, max_steps=9)
    found = json.loads((out / "not_finite_step2_process0.json").read_text())
    assert found["columns"] == ["episode_index", "frame_index"] and found["step"] == 2
    rows = {tuple(row) for row in found["rows"] + found["before"]}
    assert len(found["rows"]) == len(found["before"]) == 8 and len(rows) == 16, "two batches of one epoch"
    assert rows < {(episode, frame) for episode in range(6) for frame in range(10)}
    assert not list(out.glob("checkpoint-*"))


def test_energy_adds_up_over_the_sessions_of_a_run(dot_dataset, tmp_path):
    pytest.importorskip("codecarbon", reason="needs the extra [energy]")
    first, second = (
        json.loads((run(dot_dataset, tmp_path / "r", max_steps=n, save_steps=2, log_energy=True) / f).read_text())
        for n, f in ((2, "energy.json"), (4, "energy.json"))
    )
    assert 0 < first["kwh"] < second["kwh"] < 0.01 and 0 < first["seconds"] < second["seconds"]
    assert (first["steps"], second["steps"], second["samples"]) == (2, 4, 32)


def test_held_out_episodes_are_evaluated_without_masking(dot_dataset, tmp_path):
    dataset, _ = load_chat_dataset(dot_dataset)
    train, held_out = hold_out(dataset, 2)
    assert set(held_out["episode_index"]) == {4, 5} and set(train["episode_index"]) == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="the dataset has 6 episodes"):
        hold_out(dataset, 6)
    options = {"data": {"num_eval_episodes": 2}, "eval_strategy": "steps", "eval_steps": 3}
    scores = []
    for name, mask_max in (("a", 0.0), ("b", 1.0)):
        out = run(dot_dataset, tmp_path / name, learning_rate=0.0, mask_max=mask_max, **options)
        history = json.loads((out / "trainer_state.json").read_text())["log_history"]
        scores.append(next(entry["eval_loss"] for entry in history if "eval_loss" in entry))
    assert scores[0] == scores[1]


def test_recipes_change_the_text_without_a_new_conversion(dot_dataset, tmp_path):
    out = run(dot_dataset, tmp_path / "r", data={"relative_actions": False, "num_bins": 99, "chunk_size": 2})
    policy = VLAPolicy.from_pretrained(out)
    assert policy.config.action_stats.max[0] > 20  # positions now, not differences
    assert policy.config.num_values == 4 and predicts(out).shape == (1, 2, 2)


def test_another_runs_folder_is_kept(full_run, dot_dataset, tmp_path):
    before = (full_run / "model.safetensors").read_bytes()
    with pytest.raises(
        ValueError, match=r"belongs to another run \(learning_rate: 0.01 there, 0.5 here\).*--overwrite"
    ):
        run(dot_dataset, full_run, data=AUGMENTED, learning_rate=0.5, max_steps=4)
    assert (full_run / "model.safetensors").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="not made by a recipe"):
            run(dot_dataset, tmp_path / "mine", overwrite=overwrite)
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_what_the_dataset_cannot_give_raises_before_training(dot_dataset, tmp_path):
    with pytest.raises(ValueError, match="chunk_size"):
        run(dot_dataset, tmp_path / "r", data={"chunk_size": 9})
    assert not (tmp_path / "r" / "model.safetensors").exists()
    with pytest.raises(ValueError, match="dataset_name is missing"):
        DataArguments()
    with pytest.raises(ValueError, match="remove_unused_columns"):
        VLASFTConfig(output_dir=str(tmp_path / "r"), remove_unused_columns=True, use_cpu=True, bf16=False)


def test_losses_equal_plain_trl(dot_dataset, tiny_nano, tmp_path):
    """Without masking and crops, our collator and trainer compute what `SFTTrainer` and its own collator compute.

    It also shows that plain TRL trains on a chat dataset unmodified.
    """
    dataset, config = load_chat_dataset(dot_dataset)
    options = {"max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1}
    options |= {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "seed": 3}

    plain = SFTTrainer(
        model=load_model(tiny_nano),
        args=SFTConfig(output_dir=str(tmp_path / "plain"), **options),
        train_dataset=dataset,
        processing_class=load_processor(tiny_nano, config),
    )
    ours = VLATrainer(
        model=load_model(tiny_nano),
        args=VLASFTConfig(output_dir=str(tmp_path / "ours"), mask_max=0.0, **options),
        vla_config=config,
        processing_class=load_processor(tiny_nano, config),
        train_dataset=dataset,
        stored_cameras=config.cameras,
    )
    history = []
    for trainer in (plain, ours):
        trainer.train()
        history.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    np.testing.assert_allclose(*history, rtol=1e-5)
    # While it trains, the host waits for the device at TRL's metrics, five times, where a lost run is noticed, and
    # twice where the answers' positions are chosen: on GPUs, TRL itself does that.
    syncs = []
    for trainer in (plain, ours):
        batch = next(iter(trainer.get_train_dataloader()))
        with HostSyncs() as counter:
            trainer.training_step(trainer.model, batch)
        syncs.append(counter.count)
    assert syncs[1] == 8 + ONE_MORE < syncs[0]
