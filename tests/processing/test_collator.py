import pickle

import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image
from support.backbones import TINY
from support.episodes import DotSource
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from vla0_trl import VLADataCollator
from vla0_trl.data.chat_dataset import load_chat_dataset
from vla0_trl.models.loading import load_processor, set_image_size
from vla0_trl.models.nano import NanoConfig, build_nano
from vla0_trl.processing.images import model_inputs


@pytest.fixture
def rows(example_config):
    """Rows whose integers are their values."""
    rng = np.random.default_rng(0)
    return [
        {
            "images": [Image.fromarray(rng.integers(0, 256, (48, 48, 3), np.uint8))],
            "task": "Push it." if i % 2 else "Push that thing over there, please.",
            "raw_state": [12.0, 400.0],
            "raw_action": rng.integers(0, 512, example_config.num_values).astype(float).tolist(),
            "episode_index": i,
            "frame_index": 3,
        }
        for i in range(6)
    ]


def answers(processor, batch) -> list[str]:
    """The labelled text of each row."""
    return [processor.tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]]


def test_labels_cover_the_completion_only(backbone, rows):
    _, processor, config = backbone
    collator = VLADataCollator(processor, config, mask_max=0.0)
    batch = collator(rows)
    for row, text in zip(rows, answers(processor, batch), strict=True):
        numbers = " ".join(str(int(value)) for value in row["raw_action"])
        assert text == collator.chat.prefix + numbers + collator.chat._suffix
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


def test_masking_hides_whole_values(backbone, rows):
    _, processor, config = backbone
    collator = VLADataCollator(processor, config, mask_max=1.0, mask_skip=0.0)
    mask_id, counts = collator.chat.mask_id, []
    for epoch in range(40):
        collator.set_epoch(epoch)
        batch = collator(rows)
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            hidden = ids == mask_id
            counts.append(hidden.sum().item())
            assert (labels[hidden] == -100).all()
            completion = (labels != -100).nonzero()[0].item()
            if not hidden[: completion + 1].any():
                tail = ids[completion:][ids[completion:] != processor.tokenizer.pad_token_id]
                text = processor.tokenizer.decode(tail).removesuffix(collator.chat._suffix).strip()
                words = text.split(" ")
                assert len(words) == config.num_values and all(w == "?" or w.isdigit() for w in words), text
    # U(0, 1) over six values: 0 to 6 hidden, three in the mean.
    assert set(counts) == set(range(7)) and 2.5 < np.mean(counts) < 3.5


def test_mask_skip_and_evaluation_leave_samples_alone(backbone, rows):
    _, processor, config = backbone
    plain = VLADataCollator(processor, config, mask_max=0.0)(rows)["input_ids"]
    for options in ({"mask_skip": 1.0}, {"train": False}):
        assert torch.equal(VLADataCollator(processor, config, mask_max=1.0, **options)(rows)["input_ids"], plain)
    skipped = 0
    collator = VLADataCollator(processor, config, mask_max=1.0, mask_skip=0.5)
    for epoch in range(50):
        collator.set_epoch(epoch)
        skipped += ((collator(rows)["input_ids"] == collator.chat.mask_id).sum(1) == 0).sum().item()
    assert 0.4 < skipped / 300 < 0.72  # 0.5 skipped, and 1/12 of the others round to none


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
        for batch, start in zip(epochs[-1], range(0, len(dataset), 8), strict=True):
            here = collator(dataset.select(range(start, min(start + 8, len(dataset)))))
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


def test_hidden_values_stay_targets_where_labels_are_kept(example_config, rows):
    """Three in four samples hide all their values, the others a share; every value is a target in all of them."""
    model, processor = build_nano(NanoConfig(**TINY, number_tokens=True), num_bins=511, texts=["Push it.\nState: "])
    set_image_size(processor, model.config, example_config)
    options = {"mask_max": 1.0, "mask_skip": 0.0, "mask_full": 0.75}
    kept, ignored = (
        VLADataCollator(processor, example_config, **options, mask_labels=labels) for labels in ("keep", "ignore")
    )
    plain = VLADataCollator(processor, example_config, mask_max=0.0)(rows)["labels"]
    counts = []
    for epoch in range(50):
        kept.set_epoch(epoch)
        ignored.set_epoch(epoch)
        batch, other = kept(rows), ignored(rows)
        assert torch.equal(batch["labels"], plain) and torch.equal(batch["input_ids"], other["input_ids"])
        hidden = batch["input_ids"] == kept.chat.mask_id
        assert torch.equal(other["labels"] == -100, (plain == -100) | hidden)
        counts += hidden.sum(1).tolist()
    assert 0.7 < np.mean([count == example_config.num_values for count in counts]) < 0.85
    assert set(counts) == set(range(7))


def test_smoothed_labels_are_spread_around_the_true_integers(example_config, rows):
    """In the mean over epochs a discretised normal distribution; the input stays as it is, and so does evaluation."""
    model, processor = build_nano(NanoConfig(**TINY, number_tokens=True), num_bins=511, texts=["Push it.\nState: "])
    set_image_size(processor, model.config, example_config)
    for row in rows:
        row["raw_action"] = [100.0, 200.0, 300.0, 400.0, 0.0, 511.0]
    options = {"mask_max": 0.0, "label_smoothing_bins": 3.0}
    collator = VLADataCollator(processor, example_config, **options)
    plain = VLADataCollator(processor, example_config, mask_max=0.0)(rows)
    zero = processor.tokenizer.convert_tokens_to_ids("Ġ0")
    offsets = []
    for epoch in range(100):
        collator.set_epoch(epoch)
        batch = collator(rows)
        assert torch.equal(batch["input_ids"], plain["input_ids"])
        assert torch.equal(batch["labels"] < zero, plain["labels"] < zero)  # the end of the turn, and what is ignored
        numbers = batch["labels"][batch["labels"] >= zero].view(len(rows), 6) - zero
        assert numbers.min() >= 0 and numbers.max() <= 511
        offsets.append(numbers[:, :4] - torch.tensor([100, 200, 300, 400]))
    offsets = torch.cat(offsets).float()
    assert offsets.mean().abs() < 0.3 and offsets.std().item() == pytest.approx((9 + 1 / 12) ** 0.5, rel=0.05)
    evaluation = VLADataCollator(processor, example_config, train=False, **options)
    assert torch.equal(evaluation(rows)["labels"], plain["labels"])


def test_digit_tokens_cannot_be_smoothed(tiny_nano, example_config):
    with pytest.raises(ValueError, match="label_smoothing_bins needs numbers of one token"):
        VLADataCollator(load_processor(tiny_nano, example_config), example_config, label_smoothing_bins=1.0)


@pytest.mark.parametrize("mask_unit", ["value", "character"])
def test_digit_tokens_refuse_to_keep_labels(tiny_nano, example_config, mask_unit):
    with pytest.raises(ValueError, match="use mask_labels='ignore'"):
        VLADataCollator(
            load_processor(tiny_nano, example_config), example_config, mask_labels="keep", mask_unit=mask_unit
        )


def test_waypoints_are_taken_from_the_raw_chunk(tiny_nano, example_config, rows):
    config = example_config.replace(waypoints=[0, 2])
    collator = VLADataCollator(load_processor(tiny_nano, config), config)
    for row in rows:
        _, action = collator.integers(row)
        assert action.tolist() == [row["raw_action"][i] for i in (0, 1, 4, 5)]


@pytest.mark.parametrize(
    "options",
    [{"mask_full": 2.0}, {"mask_labels": "drop"}, {"mask_max": 1.5}, {"mask_skip": -0.1}, {"mask_unit": "word"}],
)
def test_impossible_masking_raises(tiny_nano, example_config, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        VLADataCollator(load_processor(tiny_nano, example_config), example_config, **options)


def test_the_dataset_reads_back_what_was_recorded(dot_dataset):
    """The fixture itself, end to end: dots are where the state says."""
    dataset = load_dataset(dot_dataset, split="train")
    episode = DotSource().episode(2)
    frames = [row for row in dataset if row["episode_index"] == 2]
    assert np.array_equal([np.asarray(row["images"][0]) for row in frames], episode.images["image"])
