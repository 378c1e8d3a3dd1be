import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from support.general import REPOSITORY, load_script

from vla0_trl.data.chat_dataset import load_chat_dataset
from vla0_trl.data.chat_rows import ChatRows
from vla0_trl.models.loading import load_processor
from vla0_trl.processing.collator import VLADataCollator
from vla0_trl.processing.images import ImageError
from vla0_trl.training.run import main


def test_a_batch_is_what_the_dataset_gives(dot_dataset, tiny_nano):
    dataset, config = load_chat_dataset(dot_dataset)
    collator = VLADataCollator(load_processor(tiny_nano, config), config, mask_max=1.0)
    kept, indices = ChatRows(dataset, keep=True), [3, 0, 7, 3]
    expected = collator(dataset.select(indices))
    for rows in (kept, kept, ChatRows(dataset, keep=False)):
        batch = collator(rows.__getitems__(indices))
        assert batch.keys() == expected.keys() and all(torch.equal(batch[key], expected[key]) for key in batch)
    assert len(kept) == len(dataset) and np.array_equal(
        kept.__getitems__([3])[0]["images"][0], np.asarray(dataset[3]["images"][0])
    )


def test_each_row_is_decoded_once(dot_dataset, monkeypatch):
    kept = ChatRows(load_chat_dataset(dot_dataset)[0], keep=True)
    opened, plain_open = [], Image.open
    monkeypatch.setattr(Image, "open", lambda source: opened.append(source) or plain_open(source))
    kept.__getitems__([1, 2])
    assert kept.__getitems__([2])[0] is kept.__getitems__([2, 1])[0] and len(opened) == 2
    kept.__getitems__([1, 4])
    assert len(opened) == 3


@pytest.fixture
def damaged_dataset(dot_dataset, tmp_path) -> str:
    """A dataset with one PNG whose pixels are damaged, and whose head and tail are whole."""
    folder = Path(shutil.copytree(dot_dataset, tmp_path / "dots"))
    (file,) = (folder / "data").iterdir()
    rows = pq.read_table(file)
    images = rows["images"].to_pylist()
    png = images[3][0]["bytes"]
    images[3][0]["bytes"] = png[:60] + bytes(20) + png[80:]
    place, field = rows.column_names.index("images"), rows.schema.field("images")
    pq.write_table(rows.set_column(place, field, pa.array(images, field.type)), file)
    return str(folder)


def test_a_damaged_image_is_named(damaged_dataset):
    rows = ChatRows(load_chat_dataset(damaged_dataset)[0], keep=True)
    rows.__getitems__([2, 4])
    with pytest.raises(ImageError, match=r"^episode 0, frame 3, image 0: does not decode"):
        rows.__getitems__([2, 3])


@pytest.mark.parametrize(("keep", "workers"), [("true", 0), ("false", 0), ("false", 1)])
def test_training_ends_with_one_line_for_it(damaged_dataset, tiny_nano, tmp_path, monkeypatch, keep, workers):
    words = ["--dataset_name", damaged_dataset, "--output_dir", tmp_path / "run", "--model_name_or_path", tiny_nano]
    words += ["--chunk_size", 4, "--n_action_steps", 2, "--image_size", 48, "--num_eval_episodes", 0]
    words += ["--eval_strategy", "no", "--save_initial", "false", "--rows_in_memory", keep]
    words += ["--dataloader_num_workers", workers]
    monkeypatch.setattr("sys.argv", ["sft_pusht.py", *map(str, words)])
    with pytest.raises(
        SystemExit, match=r"^error: episode 0, frame 3, image 0: does not decode \(.+\): get or [\w ]+$"
    ):
        main(REPOSITORY / "recipes/pusht/nano.yaml", "", load_script("recipes/sft_pusht.py").in_simulator)
