"""Rows of vision chat datasets: read as TRL reads them, and checked before training."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from support.backbones import QWEN, SMOLVLM
from support.general import shared_path
from support.vision_chats import TURNS, chat_rows, save_chats, square, turn
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from vla0_trl import VLADataCollator
from vla0_trl.data.chat_dataset import load_chat_dataset
from vla0_trl.data.vision_chat import VisionChats
from vla0_trl.models.loading import load_processor
from vla0_trl.processing.chat_tokenizer import IGNORED, ChatTokenizer
from vla0_trl.processing.images import ImageError, fit_images, model_inputs, row_image

IMAGE_TOKENS = 4  # of nano's images
SIDES = {"nano": 48, SMOLVLM: 512, QWEN: 224}


def backbone(name: str, tiny_nano: str, config) -> tuple:
    """Its processor, and a config of its image size."""
    config = config.replace(image_size=SIDES[name], tile_images=False)
    return load_processor(tiny_nano if name == "nano" else shared_path(f"data/models/{name}"), config), config


@pytest.mark.parametrize("name", SIDES)
def test_batches_are_those_of_trl(name, tiny_nano, example_config, tmp_path):
    """Ids, labels and pixels of prompt-completion rows with no image, one and two."""
    processor, config = backbone(name, tiny_nano, example_config)
    side = SIDES[name]
    rows = []
    for index, color in enumerate(("red", "green", "blue")):
        images = [square(color, side).resize((side, side)) for _ in range(index)]
        rows.append({"images": images, "prompt": [turn("user", "Which?")], "completion": [turn("assistant", color)]})
    folder = save_chats(tmp_path / name, rows, ("prompt", "completion"))
    theirs = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    ours = VLADataCollator(processor, config, pad_to_multiple_of=1)
    for index, row in enumerate(VisionChats(folder).__getitems__([0, 1, 2])):
        expected = theirs([{name: rows[index][name] for name in ("images", "prompt", "completion")}])
        ids, labels = ours.chat_tokenizer.encode_chat(row["chat"], row["targets_from"])
        assert ids == expected["input_ids"][0].tolist()
        assert labels == expected["labels"][0].tolist()
        if index:
            others = fit_images([row_image(row, image) for image in range(index)], config)
            pixels = model_inputs(processor.image_processor, [], config, others=others)
            torch.testing.assert_close(pixels["pixel_values"], expected["pixel_values"], rtol=0, atol=1e-5)


def test_every_answer_of_a_conversation_is_a_target(tiny_nano, example_config, tmp_path):
    processor, config = backbone("nano", tiny_nano, example_config)
    tokenizer = ChatTokenizer(processor, config)
    chats = VisionChats(save_chats(tmp_path / "squares", chat_rows()))
    row = chats.__getitems__([5])[0]
    ids, labels = tokenizer.encode_chat(row["chat"], row["targets_from"])
    assert ids.count(tokenizer.image_token_id) == 2 * IMAGE_TOKENS
    learnt = processor.tokenizer.decode([label for label in labels if label != IGNORED])
    assert learnt == " blue<end_of_utterance> red<end_of_utterance>"
    assert (row["episode_index"], row["frame_index"], len(row["images"])) == (-1, 5, 2)


def test_a_damaged_image_is_named_by_dataset_and_row(tiny_nano, example_config, tmp_path):
    folder = save_chats(tmp_path / "squares", chat_rows())
    table = pq.read_table(tmp_path / "squares" / "train.parquet")
    images = table["images"].to_pylist()
    png = images[4][0]["bytes"]
    images[4][0]["bytes"] = png[:45] + bytes(10) + png[55:]  # the header stays
    place, field = table.column_names.index("images"), table.schema.field("images")
    pq.write_table(table.set_column(place, field, pa.array(images, field.type)), tmp_path / "squares/train.parquet")
    collator = VLADataCollator(load_processor(tiny_nano, example_config), example_config)
    chats = VisionChats(folder)
    chats.check(collator.chat_tokenizer, 10_000)  # looks at headers
    with pytest.raises(ImageError, match=rf"^{folder}: row 4, image 0: does not decode"):
        collator(chats.__getitems__([4]))


def test_a_row_whose_one_image_is_null_is_text(tmp_path):
    features = Features({"messages": TURNS, "image": Image()})
    images = (None, square("red"))
    rows = [row | {"image": image} for row, image in zip(chat_rows(2), images, strict=True)]
    rows = [{name: row[name] for name in features} for row in rows]
    (tmp_path / "one").mkdir()
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "one" / "train.parquet")
    assert [len(row["images"]) for row in VisionChats(str(tmp_path / "one")).__getitems__([0, 1])] == [0, 1]


def test_a_batch_of_both_kinds(dot_dataset, tiny_nano, tmp_path):
    """Actions as without chats; images of both in one list, in the order of their places."""
    dataset, config = load_chat_dataset(dot_dataset)
    collator = VLADataCollator(load_processor(tiny_nano, config), config, seed=3)
    actions = dataset.__getitems__([4, 9])
    chats = VisionChats(save_chats(tmp_path / "squares", chat_rows())).__getitems__([0, 2, 1])
    alone, both = collator(actions), collator([*actions, *chats])
    width = alone["input_ids"].shape[1]
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(both[name][:2, :width], alone[name]) and len(both[name]) == 5
    pixels = both["pixel_values"]
    assert pixels.shape == (1, 2 + 0 + 2 + 1, 3, 48, 48)
    assert torch.equal(pixels[0, :2], alone["pixel_values"][:, 0])
    colors = (pixels[0, 2:, :, 24, 24] > 0).tolist()
    assert colors == [[False, False, True], [True, False, False], [False, True, False]]  # blue, red; green
    counts = (both["input_ids"] == collator.chat_tokenizer.image_token_id).sum(1)
    assert counts.tolist() == [IMAGE_TOKENS * count for count in (1, 1, 0, 2, 1)]


def content_parts(*parts: dict) -> dict:
    return {"role": "user", "content": [{"type": None, "text": None} | part for part in parts]}


def test_content_parts_and_a_single_image_column_are_read(tiny_nano, example_config, tmp_path):
    processor, config = backbone("nano", tiny_nano, example_config)
    part = {"type": Value("string"), "text": Value("string")}
    features = Features({"image": Image(), "messages": List({"role": Value("string"), "content": List(part)})})
    user = content_parts({"type": "text", "text": "See"}, {"type": "image"}, {"type": "text", "text": "?"})
    answer = content_parts({"type": "text", "text": "red"}) | {"role": "assistant"}
    (tmp_path / "parts").mkdir()
    rows = Dataset.from_list([{"image": square("red"), "messages": [user, answer]}], features=features)
    rows.to_parquet(tmp_path / "parts" / "train.parquet")
    chats, tokenizer = VisionChats(str(tmp_path / "parts")), ChatTokenizer(processor, config)
    chats.check(tokenizer, 512)
    ids, _ = tokenizer.encode_chat(chats.__getitems__([0])[0]["chat"])
    text = processor.tokenizer.decode(ids)
    assert text.startswith("<|im_start|>User: See<fake_token_around_image>") and "?<end_of_utterance>" in text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"images": [], "messages": []}, "messages is empty"),
        ({"images": [], "messages": None}, "messages is empty"),
        ({"images": [], "messages": [turn("user", "Hi")]}, "the assistant says nothing, so there is nothing to learn"),
        (
            {"images": [], "messages": [turn("robot", "Hi")]},
            "messages has the role 'robot', wanted one of system, user",
        ),
        ({"images": [], "messages": [turn("user", None)]}, "messages has a turn without content"),
        ({"images": [], "messages": [turn("user", "<image>Hi")]}, "'<image>' is a special token"),
        (
            {"images": [square("red")], "messages": [turn("assistant", "Hi")]},
            "Number of images provided (1) does not match number of image placeholders (0)",
        ),
        ({"images": [], "messages": [turn("user", "long " * 200), turn("assistant", "x")]}, "the model reads 512"),
        ({"images": [], "messages": [turn("assistant", "x"), turn("user", "x")] * 2}, "begins with the assistant"),
        ({"images": [None], "messages": []}, "images holds a path in place of an image: embed it"),
        ({"images": [{"bytes": b"GIF?"}], "messages": []}, "images holds no image that can be read: wanted PNG"),
        ({"images": [], "messages": [None]}, "messages has a turn that is null"),
        ({"images": [], "messages": [turn("user", "x"), turn("assistant", "y")] * 51}, "has 102 turns, at most 100"),
    ],
)
def test_bad_rows_are_named(row, message, tiny_nano, example_config, tmp_path):
    processor, config = backbone("nano", tiny_nano, example_config)
    folder = save_chats(tmp_path / "chats", [*chat_rows(3), row])
    chats, tokenizer = VisionChats(folder), ChatTokenizer(processor, config)
    with pytest.raises(ValueError) as error:
        chats.check(tokenizer, 512)
    assert str(error.value).startswith(f"{folder}: row 3: ") and message in str(error.value)


def test_turns_that_a_template_forbids_are_named(tiny_nano, example_config, tmp_path):
    processor, config = backbone("nano", tiny_nano, example_config)
    tokenizer = ChatTokenizer(processor, config)
    twice = "messages | length > 1 and messages[1]['role'] == 'user'"
    forbids = "{% if " + twice + " %}{{ raise_exception('roles must alternate') }}{% endif %}"
    processor.chat_template = forbids + processor.chat_template
    rows = [*chat_rows(1), {"images": [], "messages": [turn("user", "Hello?")] * 2 + [turn("assistant", "Yes?")]}]
    with pytest.raises(ValueError, match=r"row 1: .*: TemplateError: roles must alternate: repair the row"):
        VisionChats(save_chats(tmp_path / "chats", rows)).check(tokenizer, 512)


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{{", "{% if messages | length > 2 %}" + LOOP + "{% endif %}{{", "takes more than 2 s or 1 GiB for one row"),
        ("['text']", "['text'] | upper", "must write texts as they are"),
        ("['text']", "['text'] | replace('<', '')", "must write texts as they are"),
    ],
)
def test_a_template_that_is_hostile_to_chats_alone(old, new, message, tiny_nano, example_config, tmp_path):
    processor, config = backbone("nano", tiny_nano, example_config)
    tokenizer = ChatTokenizer(processor, config)
    processor.chat_template = processor.chat_template.replace(old, new, 1)
    chats = VisionChats(save_chats(tmp_path / "chats", chat_rows()))
    with pytest.raises(ValueError, match=f"row [02]: .*: its chat template {message}") as error:
        chats.check(tokenizer, 512)
    assert "\n" not in str(error.value)


def test_a_template_that_trims_is_followed(tiny_nano, example_config):
    processor, config = backbone("nano", tiny_nano, example_config)
    plain = ChatTokenizer(processor, config)
    expected = plain.encode_chat([{**turn("user", [{"type": "text", "text": "a"}])}, answer("b \U000f0000")])
    processor.chat_template = processor.chat_template.replace("['text']", "['text'] | trim")
    trims = ChatTokenizer(processor, config)
    assert trims.encode_chat([turn("user", [{"type": "text", "text": " a\n"}]), answer(" b \U000f0000 ")]) == expected


def answer(text: str) -> dict:
    return turn("assistant", [{"type": "text", "text": text}])


def test_other_columns_are_one_line(tmp_path):
    text = Dataset.from_dict({"prompt": ["a"], "completion": ["b"]})
    paths = Dataset.from_dict({"images": [["a.png"]], "messages": [[turn("user", "a")]]})
    for name, dataset, message in (("text", text, "each a list of role and content"), ("paths", paths, "cast it")):
        (tmp_path / name).mkdir()
        dataset.to_parquet(tmp_path / name / "train.parquet")
        with pytest.raises(ValueError, match=message):
            VisionChats(str(tmp_path / name))
