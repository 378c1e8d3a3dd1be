"""Rows that join a training set while it is trained on."""

import numpy as np
import pytest

from vla0_trl.data.chat_dataset import RAW_SCHEMA, load_chat_dataset
from vla0_trl.training.growing_rows import GrowingRows


def as_raw(row: dict, frame_index: int) -> dict:
    """A row as an expert gives it: without the text columns, marked by its frame index."""
    image = {"bytes": b"not read here", "path": None}
    return {name: row[name] for name in RAW_SCHEMA.names} | {"images": [image], "frame_index": frame_index}


@pytest.fixture
def rows(dot_dataset, tmp_path) -> GrowingRows:
    return GrowingRows(load_chat_dataset(dot_dataset)[0], 0.25, 0, tmp_path / "dagger")


def test_nothing_changes_before_rows_are_added(rows):
    assert rows.load() == 0 and len(rows) == 60
    assert [row["frame_index"] for row in rows.__getitems__([3, 17])] == [3, 7]


def test_the_share_of_added_rows_is_the_fraction(rows):
    rows.write_round(100, [as_raw(rows.dataset[0], 1000 + i) for i in range(7)])
    rows.begin(101)
    assert rows.load() == 7
    drawn = np.array([row["frame_index"] for row in rows.__getitems__(list(range(60)))])
    added = drawn >= 1000
    assert 5 <= added.sum() <= 25  # 15 expected of 60
    assert len(set(drawn[added])) > 1
    np.testing.assert_array_equal(drawn[~added], np.arange(60)[~added] % 10)


def test_a_resumed_run_draws_what_the_uninterrupted_one_draws(rows, dot_dataset):
    rows.write_round(100, [as_raw(rows.dataset[0], 100 + i) for i in range(5)])
    rows.begin(99)
    drawn = [[row["frame_index"] for row in rows.__getitems__(range(60))] for _ in range(4)]  # steps 100 to 103
    assert max(drawn[0]) == max(drawn[1]) == 9 and max(drawn[2]) >= 100
    again = GrowingRows(load_chat_dataset(dot_dataset)[0], 0.25, 0, rows.folder)
    again.begin(100)
    assert [[row["frame_index"] for row in again.__getitems__(range(60))] for _ in range(3)] == drawn[1:]


def test_batches_of_one_step_count_as_one_step(rows, dot_dataset):
    rows.write_round(1, [as_raw(rows.dataset[0], 100)])
    two = GrowingRows(load_chat_dataset(dot_dataset)[0], 0.9, 0, rows.folder, batches_per_step=2)
    two.begin(0)
    largest = [max(row["frame_index"] for row in two.__getitems__(range(60))) for _ in range(6)]
    assert largest == [9, 9, 9, 9, 100, 100]


def test_an_epochs_last_step_may_have_fewer_batches(rows, dot_dataset):
    """Epochs of three batches, two to a step: steps 1 and 2, then 3 and 4."""
    rows.write_round(2, [as_raw(rows.dataset[0], 100)])
    drawn = {}
    for step in range(4):
        two = GrowingRows(load_chat_dataset(dot_dataset)[0], 0.9, 0, rows.folder, batches_per_step=2)
        two.begin(step, batches_per_epoch=3)
        first = step // 2 * 3 + step % 2 * 2
        drawn[step] = [[row["frame_index"] for row in two.__getitems__(range(60))] for _ in range(first, 6)]
        assert drawn[step] == drawn[0][first:]
    assert [max(batch) for batch in drawn[0]] == [9, 9, 9, 9, 9, 100]


def test_a_resumed_run_forgets_the_rounds_after_its_checkpoint(rows):
    for step in (100, 200, 300):
        rows.write_round(step, [as_raw(rows.dataset[0], step)])
    rows.drop_rounds_after(200)
    rows.load()
    assert sorted(rows.rounds) == [100, 200]


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, float("nan")])
def test_a_fraction_that_would_do_nothing_is_refused(dot_dataset, tmp_path, fraction):
    with pytest.raises(ValueError, match="dagger_fraction"):
        GrowingRows(load_chat_dataset(dot_dataset)[0], fraction, 0, tmp_path)
