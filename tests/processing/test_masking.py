"""Masks and labels: which values are hidden from the model in training, and which it is trained to write."""

import numpy as np
import pytest
import torch
from support.backbones import TINY

from vla0_trl import VLADataCollator
from vla0_trl.models.loading import load_processor, set_image_size
from vla0_trl.models.nano import NanoConfig, build_nano


def test_masking_hides_whole_values(backbone, rows):
    _, processor, config = backbone
    collator = VLADataCollator(processor, config, mask_max=1.0, mask_skip=0.0)
    mask_id, counts = collator.chat_tokenizer.mask_id, []
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
                text = processor.tokenizer.decode(tail).removesuffix(collator.chat_tokenizer._suffix).strip()
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
        skipped += ((collator(rows)["input_ids"] == collator.chat_tokenizer.mask_id).sum(1) == 0).sum().item()
    assert 0.4 < skipped / 300 < 0.72  # 0.5 skipped, and 1/12 of the others round to none


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
        hidden = batch["input_ids"] == kept.chat_tokenizer.mask_id
        assert torch.equal(other["labels"] == -100, (plain == -100) | hidden)
        counts += hidden.sum(1).tolist()
    assert 0.7 < np.mean([count == example_config.num_values for count in counts]) < 0.85
    assert set(counts) == set(range(7))


@pytest.mark.parametrize("mask_unit", ["value", "character"])
def test_digit_tokens_refuse_to_keep_labels(tiny_nano, example_config, mask_unit):
    with pytest.raises(ValueError, match="use mask_labels='ignore'"):
        VLADataCollator(
            load_processor(tiny_nano, example_config), example_config, mask_labels="keep", mask_unit=mask_unit
        )


@pytest.mark.parametrize(
    "options",
    [{"mask_full": 2.0}, {"mask_labels": "drop"}, {"mask_max": 1.5}, {"mask_skip": -0.1}, {"mask_unit": "word"}],
)
def test_impossible_masking_raises(tiny_nano, example_config, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        VLADataCollator(load_processor(tiny_nano, example_config), example_config, **options)
