import pickle

import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image
from support.episodes import DotSource
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from vla0_trl import VLADataCollator
from vla0_trl.data.chat_dataset import load_chat_dataset
from vla0_trl.models.loading import load_processor
from vla0_trl.processing.images import model_inputs


def answers(processor, batch) -> list[str]:
    """The labelled text of each row."""
    return [processor.tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]]


def test_labels_cover_the_completion_only(backbone, rows):
    _, processor, config = backbone
    collator = VLADataCollator(processor, config, mask_max=0.0)
    batch = collator(rows)
    for row, text in zip(rows, answers(processor, batch), strict=True):
        numbers = " ".join(str(int(value)) for value in row["raw_action"])
        assert text == collator.chat_tokenizer.prefix + numbers + collator.chat_tokenizer._suffix
    trained = batch["labels"] != -100
    assert torch.equal(batch["labels"][trained], batch["input_ids"][trained])
    # Completions are one piece, padding is on the right, and no padding is trained.
    assert (trained.int().diff(dim=1).abs().sum(1) <= 2).all() and not trained[batch["attention_mask"] == 0].any()
    assert (batch["attention_mask"].diff(dim=1) <= 0).all()
    assert (batch["input_ids"][batch["attention_mask"] == 0] == processor.tokenizer.pad_token_id).all()


def test_equals_trls_own_collator_without_masking(backbone, rows, example_config):
    """Same ids, labels and pixels as plain TRL makes of the text columns."""
    _, processor, config = backbone
    for row in rows:
        state, action = ("12 400", " ".join(str(int(v)) for v in row["raw_action"]))
        row["prompt"] = [{"role": "user", "content": f"{row['task']}\nState: {state}"}]
        row["completion"] = [{"role": "assistant", "content": action}]
    ours = VLADataCollator(processor, config, mask_max=0.0)(rows)
    theirs = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)([dict(row) for row in rows])
    assert set(ours) == set(theirs) - {"pixel_attention_mask"}
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-6)


def test_draws_depend_on_seed_epoch_and_frame_alone(tiny_nano, example_config, rows):
    processor = load_processor(tiny_nano, example_config)
    config = example_config.replace(crop_ratio=0.75)

    def batch(epoch=0, seed=0, order=slice(None)):
        collator = VLADataCollator(processor, config, mask_max=1.0, seed=seed, defer_images=True)
        collator.set_epoch(epoch)
        return collator(rows[order])

    def camera(batch):
        return batch["images"]["cameras"][0]

    def same(a, b):
        return torch.equal(a["input_ids"], b["input_ids"]) and torch.equal(camera(a), camera(b))

    assert same(batch(), batch()) and not same(batch(), batch(epoch=1)) and not same(batch(), batch(seed=1))
    assert torch.equal(camera(batch(order=slice(None, None, -1))).flip(0), camera(batch()))


def test_the_collator_pickles(backbone, rows):
    """With the prompts and the epoch that it has; a spawned worker process gets it so."""
    _, processor, config = backbone
    collator = VLADataCollator(processor, config.replace(crop_ratio=0.75), mask_max=1.0, mask_skip=0.0)
    for epoch in (0, 3):
        collator.set_epoch(epoch)
        copy = pickle.loads(pickle.dumps(collator))  # our own bytes, made in this line
        torch.testing.assert_close(copy(rows), collator(rows), rtol=0, atol=0)
        copy.set_epoch(epoch + 1)
        assert not torch.equal(copy(rows)["input_ids"], collator(rows)["input_ids"])


@pytest.mark.parametrize(
    ("num_workers", "start"),
    [(1, "fork"), (3, "fork"), pytest.param(1, "forkserver", marks=pytest.mark.slow)],  # Python 3.14's default
)
def test_draws_reach_worker_processes_and_do_not_depend_on_their_number(tiny_nano, dot_dataset, num_workers, start):
    """Masks, crops and colours, epoch by epoch, are those that this process would draw."""
    dataset, config = load_chat_dataset(dot_dataset)
    config = config.replace(crop_ratio=0.75, image_jitter=[0.2, 0.2, 0.2, 0.05])
    collator = VLADataCollator(load_processor(tiny_nano, config), config, mask_max=1.0, defer_images=True)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=8, collate_fn=collator, num_workers=num_workers, persistent_workers=True,
        multiprocessing_context=start,
    )  # fmt: skip
    epochs = []
    for epoch in (0, 1, 0):
        collator.set_epoch(epoch)
        epochs.append(list(loader))
        for batch, first in zip(epochs[-1], range(0, len(dataset), 8), strict=True):
            here = collator(dataset.select(range(first, min(first + 8, len(dataset)))))
            torch.testing.assert_close(batch, here, rtol=0, atol=0)
    torch.testing.assert_close(epochs[0], epochs[2], rtol=0, atol=0)
    for part in (lambda b: b["input_ids"], lambda b: b["images"]["cameras"][0], lambda b: b["images"]["jitter"]):
        assert not all(torch.equal(part(a), part(b)) for a, b in zip(epochs[0], epochs[1], strict=True))


def test_the_steady_state_calls_neither_template_nor_tokenizer(backbone, rows, monkeypatch):
    _, processor, config = backbone
    collator = VLADataCollator(processor, config, defer_images=True)
    first = collator(rows)["input_ids"]

    def called(*_, **__):
        raise AssertionError("called for a row")

    for owner, name in (
        (processor, "apply_chat_template"),
        (processor, "__call__"),
        (processor.tokenizer, "__call__"),
    ):
        monkeypatch.setattr(type(owner), name, called)
    assert torch.equal(collator(rows)["input_ids"], first)
    with pytest.raises(AssertionError, match="called for a row"):
        collator([{**rows[0], "task": "Something new."}])


def test_static_length_depends_on_the_tasks_alone(backbone, rows):
    """All of its rows' numbers may be long or short, masked or not: the length is the same, and nothing is lost."""
    _, processor, config = backbone
    tasks = sorted({row["task"] for row in rows})
    collator = VLADataCollator(processor, config, mask_max=1.0, static_tasks=tasks, pad_to_multiple_of=4)
    plain = VLADataCollator(processor, config, mask_max=1.0)
    lengths = set()
    for value in (0.0, 511.0):
        for epoch in range(3):
            collator.set_epoch(epoch)
            plain.set_epoch(epoch)
            changed = [{**row, "raw_state": [value] * 2, "raw_action": [value] * 6} for row in rows]
            batch, short = collator(changed)["input_ids"], plain(changed)["input_ids"]
            lengths |= {batch.shape[1], *(collator([row])["input_ids"].shape[1] for row in changed)}
            assert torch.equal(batch[:, : short.shape[1]], short)
            assert (batch[:, short.shape[1] :] == processor.tokenizer.pad_token_id).all()
    (length,) = lengths
    longest = [{**row, "raw_state": [511.0] * 2, "raw_action": [511.0] * 6} for row in rows]
    assert length % 4 == 0
    assert length - 4 < VLADataCollator(processor, config, mask_max=0.0)(longest)["input_ids"].shape[1] <= length


def test_deferred_images_become_the_same_pixels(backbone, rows):
    _, processor, config = backbone
    now = VLADataCollator(processor, config, train=False)(rows)
    later = VLADataCollator(processor, config, train=False, defer_images=True)(rows)
    assert [camera.dtype for camera in later["images"]["cameras"]] == [torch.uint8]
    pixels = model_inputs(processor.image_processor, config=config, **later.pop("images"))
    assert now.keys() == later.keys() | pixels.keys()
    assert all(torch.equal(now[key], pixels[key]) for key in pixels)


def test_text_columns_and_raw_columns_agree(tiny_nano, dot_dataset):
    dataset, config = load_chat_dataset(dot_dataset)
    collator = VLADataCollator(load_processor(tiny_nano, config), config, mask_max=0.0)
    with_raw = collator(dataset.select(range(12)))
    without = collator(dataset.select(range(12)).remove_columns(["raw_state", "raw_action"]))
    assert torch.equal(with_raw["input_ids"], without["input_ids"])


def test_a_shorter_chunk_is_the_beginning_of_the_stored_one(tiny_nano, dot_dataset, dot_config):
    dataset, config = load_chat_dataset(dot_dataset)
    processor = load_processor(tiny_nano, config)
    row = dataset.select([0])
    short = VLADataCollator(processor, config.replace(chunk_size=2), mask_max=0.0)
    stored = VLADataCollator(processor, config, mask_max=0.0)
    (short_text,), (stored_text,) = answers(processor, short(row)), answers(processor, stored(row))
    assert short_text.split("<")[0].split() == stored_text.split("<")[0].split()[:4]


def test_cameras_are_taken_by_name(tiny_nano, example_config):
    config = example_config.replace(cameras=["wrist"])
    images = [Image.new("RGB", (48, 48), color) for color in ((255, 0, 0), (0, 255, 0))]
    row = {"images": images, "task": "Push it.", "raw_state": [1, 2], "raw_action": [0.0] * 6}
    collator = VLADataCollator(
        load_processor(tiny_nano, config), config, defer_images=True, stored_cameras=["front", "wrist"]
    )
    assert collator([row])["images"]["cameras"][0][0, :, 0, 0].tolist() == [0, 255, 0]
    with pytest.raises(ValueError, match=r"1 images, but the dataset has the cameras \['front', 'wrist'\]"):
        collator([{**row, "images": images[:1]}])


def test_jitter_is_drawn_in_training_only(tiny_nano, example_config, rows):
    config = example_config.replace(image_jitter=[0.2, 0.2, 0.2, 0.05])
    processor = load_processor(tiny_nano, config)
    train, evaluation = (VLADataCollator(processor, config, train=train, mask_max=0)(rows) for train in (True, False))
    plain = VLADataCollator(processor, example_config, mask_max=0)(rows)
    assert torch.equal(evaluation["pixel_values"], plain["pixel_values"])
    assert not torch.equal(train["pixel_values"], plain["pixel_values"])
    assert torch.equal(train["input_ids"], plain["input_ids"])


def test_cameras_of_changing_size_raise(tiny_nano, example_config, rows):
    rows[1]["images"] = [Image.new("RGB", (40, 48))]
    with pytest.raises(ValueError, match="camera 'image' has images of different sizes"):
        VLADataCollator(load_processor(tiny_nano, example_config), example_config)(rows)


def test_waypoints_are_taken_from_the_raw_chunk(tiny_nano, example_config, rows):
    config = example_config.replace(waypoints=[0, 2])
    collator = VLADataCollator(load_processor(tiny_nano, config), config)
    for row in rows:
        _, action = collator.integers(row)
        assert action.tolist() == [row["raw_action"][i] for i in (0, 1, 4, 5)]


def test_the_dataset_reads_back_what_was_recorded(dot_dataset):
    """The fixture itself, end to end: dots are where the state says."""
    dataset = load_dataset(dot_dataset, split="train")
    episode = DotSource().episode(2)
    frames = [row for row in dataset if row["episode_index"] == 2]
    assert np.array_equal([np.asarray(row["images"][0]) for row in frames], episode.images["image"])
