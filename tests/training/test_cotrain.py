"""A share of every step is from a vision chat dataset."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.runs import GLOBAL_BATCH, launch, losses, run
from support.vision_chats import chat_rows, save_chats, square, turn

from vla0_trl.training.cotrain import MixedOrder, losses_apart
from vla0_trl.training.settings import global_batch_size


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> str:
    return save_chats(tmp_path_factory.mktemp("chats") / "squares", chat_rows())


def logged(output_dir: Path, *names: str) -> list[list[float]]:
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [[entry[name] for name in names] for entry in history if "loss" in entry]


@pytest.mark.parametrize(("size", "chats_per_step"), [(8, 2), (8, 3), (10, 5), (16, 1), (7, 2)])
def test_every_step_has_its_share_evenly_spread(size, chats_per_step):
    order = MixedOrder(60, 7, size, chats_per_step, seed=0, shuffle=True)
    indices = np.array(list(order))
    assert len(order) == len(indices) and sorted(indices[indices < 60]) == list(range(60))
    assert indices[-1] < 60
    whole = indices[: len(indices) // size * size].reshape(-1, size) >= 60
    assert set(whole.sum(1)) == {chats_per_step}
    for pair in np.lib.stride_tricks.sliding_window_view(indices >= 60, 2):
        assert not pair.all(), "a batch of two would have no row of the policy"


def test_the_order_is_seeded_and_passes_over_the_chats_go_on_from_epoch_to_epoch():
    order = MixedOrder(12, 5, 8, 2, seed=3, shuffle=True)
    epochs = []
    for order.epoch in range(5):
        epochs.append(list(order))
        assert list(order) == epochs[-1]
    again = MixedOrder(12, 5, 8, 2, seed=3, shuffle=True)
    again.epoch = 2
    assert list(again) == epochs[2] and len({tuple(epoch) for epoch in epochs}) == 5
    seen = [index - 12 for epoch in epochs for index in epoch if index >= 12]
    assert len(seen) == 20 and all(sorted(seen[start : start + 5]) == list(range(5)) for start in range(0, 20, 5))
    assert list(MixedOrder(12, 5, 8, 2, seed=4, shuffle=True)) != epochs[0]


def test_sequential_rows_stay_in_order():
    assert list(MixedOrder(5, 2, 4, 1, seed=0, shuffle=False)) == [5, 0, 1, 2, 6, 3, 4]


def test_losses_are_summed_apart():
    log_probs = torch.tensor([[-1.0, -2.0, 0.0], [0.0, -4.0, 0.0], [-0.5, 0.0, 0.0]])
    sums = losses_apart(log_probs, log_probs != 0, torch.tensor([3, -1, 0]))
    assert sums.tolist() == [[3.5, 3], [4.0, 1]]


OPTIONS = {"max_steps": 13, "save_steps": 12, "cotrain_fraction": 0.25}


@pytest.fixture(scope="module")
def mixed_run(dot_dataset, chats, tmp_path_factory) -> Path:
    """Thirteen steps of eight rows, two of them chats: an epoch of 60 rows, and three steps more."""
    out = tmp_path_factory.mktemp("runs") / "mixed"
    return run(dot_dataset, out, cotrain_dataset_name=chats, save_initial=True, **OPTIONS)


def test_both_losses_are_logged_and_fall(mixed_run, dot_dataset, tmp_path, capsys):
    found = np.array(logged(mixed_run, "loss", "action_loss", "cotrain_loss"))
    total, action, chat = found.T
    assert np.all((np.minimum(action, chat) < total) & (total < np.maximum(action, chat)))
    assert chat[-1] < chat[0] - 1 and action[-1] < action[0]
    plain = run(dot_dataset, tmp_path / "plain", max_steps=1)
    assert logged(plain, "loss") and "cotrain_loss" not in (plain / "trainer_state.json").read_text()


def test_a_resumed_run_goes_on_with_the_same_rows(mixed_run, dot_dataset, chats, tmp_path):
    """From the second step of the second epoch."""
    resumed = tmp_path / "mixed"
    shutil.copytree(mixed_run, resumed)
    for path in (*resumed.glob("checkpoint-13"), *resumed.glob("*.safetensors"), resumed / "vla_config.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run(dot_dataset, resumed, cotrain_dataset_name=chats, save_initial=True, **OPTIONS)
    names = ("loss", "action_loss", "cotrain_loss")
    assert logged(resumed, *names) == logged(mixed_run, *names)


def test_accumulated_batches_have_the_rows_of_the_whole_step(mixed_run, dot_dataset, chats, tmp_path):
    options = OPTIONS | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 3}
    parts = run(dot_dataset, tmp_path / "parts", cotrain_dataset_name=chats, save_initial=True, **options)
    np.testing.assert_allclose(losses(parts), losses(mixed_run)[:3], rtol=1e-5)


def test_it_is_part_of_the_run(mixed_run, dot_dataset, chats, tmp_path):
    record = json.loads((mixed_run / "run.json").read_text())
    assert (record["cotrain_dataset_name"], record["cotrain_fraction"], record["cotrain_rows"]) == (chats, 0.25, 6)
    with pytest.raises(ValueError, match="cotrain_fraction"):
        run(dot_dataset, mixed_run, cotrain_dataset_name=chats, **OPTIONS | {"max_steps": 20, "cotrain_fraction": 0.5})


def test_a_run_says_how_its_steps_are_made(dot_dataset, chats, tmp_path, capsys):
    run(dot_dataset, tmp_path / "r", max_steps=1, cotrain_dataset_name=chats, cotrain_fraction=0.3)
    assert f"8 samples = 8 at once × 1 accumulated × 1 process, 2 of them from {chats}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cotrain_fraction": 0.6}, r"cotrain_fraction=0.6 must be in \(0, 0.5\]"),
        ({"cotrain_fraction": 0.01}, "at least one of the 8 rows of a step"),
        (
            {"cotrain_fraction": 0.5, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
            "use 2 or more",
        ),
        ({"cotrain_dataset_name": None, "cotrain_fraction": 0.3}, "cotrain_dataset_name is not set"),
        ({"torch_compile": True}, "torch_compile wants batches of one length"),
    ],
)
def test_what_would_not_be_the_share_is_refused(dot_dataset, chats, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(dot_dataset, tmp_path / "r", **{"cotrain_dataset_name": chats} | options)


def test_a_row_that_cannot_be_learnt_is_named_before_training(dot_dataset, tmp_path):
    rows = [*chat_rows(2), {"images": [square("red")], "messages": [turn("user", "Hello?")]}]
    folder = save_chats(tmp_path / "bad", rows)
    with pytest.raises(ValueError, match=f"^{folder}: row 2: the assistant says nothing"):
        run(dot_dataset, tmp_path / "r", cotrain_dataset_name=folder)
    assert not (tmp_path / "r" / "run.json").exists()


@pytest.mark.slow
def test_two_processes_are_the_run_of_one(dot_dataset, chats, tmp_path):
    options = ["--cotrain_dataset_name", chats, "--cotrain_fraction", 0.25]
    launch("cpu", 1, dot_dataset, tmp_path / "one", *options)
    launch("multi_gpu", 2, dot_dataset, tmp_path / "two", *options, "--max_steps", 2)
    launch("multi_gpu", 2, dot_dataset, tmp_path / "two", *options)
    names = ("loss", "action_loss", "cotrain_loss")
    np.testing.assert_allclose(logged(tmp_path / "two", *names), logged(tmp_path / "one", *names), rtol=2e-4)


def test_a_step_is_counted_over_processes_and_batches():
    class Settings:
        per_device_train_batch_size, gradient_accumulation_steps, world_size = 2, 2, 2

    assert global_batch_size(Settings) == GLOBAL_BATCH
