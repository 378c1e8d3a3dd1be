import numpy as np
import torch
from PIL import Image

from vla0_trl.data.chat_dataset import load_chat_dataset
from vla0_trl.data.rows_in_memory import RowsInMemory
from vla0_trl.models.loading import load_processor
from vla0_trl.processing.collator import VLADataCollator


def test_a_batch_is_what_the_dataset_gives(dot_dataset, tiny_nano):
    dataset, config = load_chat_dataset(dot_dataset)
    collator = VLADataCollator(load_processor(tiny_nano, config), config, mask_max=1.0)
    kept, indices = RowsInMemory(dataset), [3, 0, 7, 3]
    expected = collator(dataset.select(indices))
    for _ in range(2):
        batch = collator(kept.__getitems__(indices))
        assert batch.keys() == expected.keys() and all(torch.equal(batch[key], expected[key]) for key in batch)
    assert len(kept) == len(dataset) and np.array_equal(
        kept.__getitems__([3])[0]["images"][0], np.asarray(dataset[3]["images"][0])
    )


def test_each_row_is_decoded_once(dot_dataset, monkeypatch):
    kept = RowsInMemory(load_chat_dataset(dot_dataset)[0])
    opened, plain_open = [], Image.open
    monkeypatch.setattr(Image, "open", lambda source: opened.append(source) or plain_open(source))
    kept.__getitems__([1, 2])
    assert kept.__getitems__([2])[0] is kept.__getitems__([2, 1])[0] and len(opened) == 2
    kept.__getitems__([1, 4])
    assert len(opened) == 3
