"""Golden tests: what is rendered, and which ids it becomes, pinned for the three backbones."""

import os
import signal

import numpy as np
import pytest
from PIL import Image
from support.backbones import QWEN, SMOLVLM, TINY

from vla0_trl.models.loading import load_processor, set_image_size
from vla0_trl.models.nano import NanoConfig, build_nano
from vla0_trl.processing import template_check
from vla0_trl.processing.chat import SYSTEM_PROMPT, prompt_messages, with_images
from vla0_trl.processing.chat_tokenizer import ChatTokenizer

RENDERED = {
    "nano": (
        "<|im_start|>User:<image>Push it.\nState: 12 400<end_of_utterance>Assistant:",
        " 5 511 0<end_of_utterance>",
    ),
    SMOLVLM: (
        "<|im_start|>User:<image>Push it.\nState: 12 400<end_of_utterance>\nAssistant:",
        " 5 511 0<end_of_utterance>\n",
    ),
    QWEN: (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|>"
        "<|vision_end|>Push it.\nState: 12 400<|im_end|>\n<|im_start|>assistant\n",
        "5 511 0<|im_end|>\n",
    ),
}
# The answer "5 511 0", token by token.
ANSWER_TOKENS = {
    "nano": ["Ġ", "5", "Ġ", "5", "1", "1", "Ġ", "0", "<end_of_utterance>"],
    SMOLVLM: ["Ġ", "5", "Ġ", "5", "1", "1", "Ġ", "0", "<end_of_utterance>", "Ċ"],
    QWEN: ["5", "Ġ", "5", "1", "1", "Ġ", "0", "<|im_end|>", "Ċ"],
}
IMAGE_TOKENS = {"nano": 4, SMOLVLM: 64, QWEN: 64}


def test_prompts_of_short_tasks_alone_are_kept(backbone):
    _, processor, config = backbone
    chat = ChatTokenizer(processor, config)
    for task, kept in (("a" * 2000, True), ("a" * 2001, False)):
        assert chat.encode_prompt(task, [12, 400]) == chat.encode_prompt(task, [12, 400])
        assert (task in chat._prompts) == kept


def test_rendered_prompt_and_answer_are_pinned(backbone):
    name, processor, config = backbone
    chat = ChatTokenizer(processor, config)
    prompt = chat.render("Push it.", "12 400")
    assert (prompt, chat.render("Push it.", "12 400", "5 511 0")[len(prompt) :]) == RENDERED[name]


def test_answer_tokens_are_pinned_and_labelled(backbone):
    name, processor, config = backbone
    chat = ChatTokenizer(processor, config)
    ids, labels = chat.encode_answer([5, 511, 0])
    assert processor.tokenizer.convert_ids_to_tokens(ids) == ANSWER_TOKENS[name]
    assert ids == labels
    assert ids[-len(chat._suffix_ids)] == chat.end_of_turn_id


def test_ids_equal_the_processors_own(backbone):
    """The caches and tables give what the processor makes of the rendered text."""
    name, processor, config = backbone
    chat = ChatTokenizer(processor, config)
    blank = Image.new("RGB", (config.image_size, config.image_size))
    rng = np.random.default_rng(0)
    for _ in range(20):
        state, action = rng.integers(0, 512, 2), rng.integers(0, 512, config.num_values)
        text = chat.render("Push it.", " ".join(map(str, state)), " ".join(map(str, action)))
        expected = processor(text=[text], images=[[blank]], add_special_tokens=False)["input_ids"][0]
        assert chat.encode_prompt("Push it.", state) + chat.encode_answer(action)[0] == list(expected)
    assert list(expected).count(chat.image_token_id) == IMAGE_TOKENS[name]


def test_every_number_is_spelled_right(backbone):
    _, processor, config = backbone
    chat = ChatTokenizer(processor, config.replace(num_bins=1000))
    ids, _ = chat.encode_answer(range(1001))
    text = processor.tokenizer.decode(ids[: -len(chat._suffix_ids)], clean_up_tokenization_spaces=False)
    assert text == chat.prefix + " ".join(map(str, range(1001)))


def test_a_hidden_value_leaves_one_token_and_its_separators(backbone):
    name, processor, config = backbone
    chat = ChatTokenizer(processor, config)
    ids, labels = chat.encode_answer([5, 511, 0], np.array([False, True, False]))
    tokens = processor.tokenizer.convert_ids_to_tokens(ids)
    first = len(chat.prefix) + 1
    assert tokens[:first] == ANSWER_TOKENS[name][:first]
    assert tokens[first : first + 3] == ["Ġ", "?", "Ġ"]
    assert [token for token, label in zip(tokens, labels, strict=True) if label == -100] == ["?"]
    # Not even the number of digits is left.
    assert ids == chat.encode_answer([5, 7, 0], np.array([False, True, False]))[0]
    everything, labels = chat.encode_answer([1, 22, 333], np.ones(3, bool))
    assert everything.count(chat.mask_id) == 3 == labels.count(-100)
    assert everything[-len(chat._suffix_ids) :] == labels[-len(chat._suffix_ids) :] == chat._suffix_ids


def test_hidden_characters_are_digits_only(backbone):
    _, processor, config = backbone
    chat = ChatTokenizer(processor, config)
    ids, labels = chat.encode_answer([5, 511, 0])
    hidden, hidden_labels = chat.hide_characters(ids, labels, 1.0, np.random.default_rng(0))
    text = processor.tokenizer.decode(hidden[: -len(chat._suffix_ids)], clean_up_tokenization_spaces=False)
    assert text == chat.prefix + "? ??? ?"
    assert hidden_labels.count(-100) == 5
    assert chat.hide_characters(ids, labels, 0.0, np.random.default_rng(0)) == (ids, labels)


def test_system_prompt_and_images_come_first(example_config):
    messages = prompt_messages(example_config.replace(use_system_prompt=True), "Push it.", "1 2")
    assert [message["role"] for message in messages] == ["system", "user"]
    assert "predict robot actions for the next 3 timesteps. Each action has 2 dim" in messages[0]["content"]
    assert "6 integers (0 - 511 each)" in messages[0]["content"] and "{" not in messages[0]["content"]
    assert SYSTEM_PROMPT.startswith("Analyze the input image")
    parts = with_images(messages, 2)
    assert [part["type"] for part in parts[1]["content"]] == ["image", "image", "text"]
    assert [part["type"] for part in parts[0]["content"]] == ["text"]


def test_empty_task_and_wrong_state_raise(backbone):
    _, processor, config = backbone
    chat = ChatTokenizer(processor, config)
    with pytest.raises(ValueError, match="task is empty"):
        chat.encode_prompt("  ", [1, 2])
    with pytest.raises(ValueError, match="state of 2 integers, got 3"):
        chat.encode_prompt("Push it.", [1, 2, 3])


def test_templates_that_cannot_work_say_so(tiny_nano, example_config):
    processor = load_processor(tiny_nano, example_config)
    template = processor.chat_template
    processor.chat_template = template.replace("Assistant:", "Answer now:")
    with pytest.raises(ValueError, match="completion-only"):
        ChatTokenizer(processor, example_config)
    processor.chat_template = template.replace("<end_of_utterance>", "")
    with pytest.raises(ValueError, match="end of turn"):
        ChatTokenizer(processor, example_config)


TEMPLATES = [
    ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 2 s or 1 GiB"),
    ("{{ 'x' * 10**10 }}", "MemoryError"),
    ("{{ 'x' * 10**6 }}", "it writes more than 100000 characters for one row"),
    ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ("{{ messages[7]['role'] }}", "UndefinedError"),
    ("{{ raise_exception('no images') }}", "TemplateError: no images"),
    ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ("{% if %}", "TemplateSyntaxError"),
]


@pytest.mark.parametrize(("template", "message"), TEMPLATES)
def test_a_template_of_a_stranger_has_limits(tiny_nano, example_config, template, message):
    processor = load_processor(tiny_nano, example_config)
    processor.chat_template = template + processor.chat_template
    with pytest.raises(ValueError) as error:
        ChatTokenizer(processor, example_config)
    assert str(error.value).startswith(f"{tiny_nano}: its chat template ") and "\n" not in str(error.value)
    assert message in str(error.value)


def test_a_fork_that_is_stuck_is_tried_again(monkeypatch):
    """As one is, in `os.fork()` itself, if another thread held a lock of Python's at that moment."""
    fork, forks = os.fork, []

    def stuck_at_first() -> int:
        child = fork()
        forks.append(child)
        if not child and len(forks) == 1:
            signal.pause()
        return child

    monkeypatch.setattr(os, "fork", stuck_at_first)
    monkeypatch.setattr(template_check, "_START_SECONDS", 2)
    assert template_check.within_limits(lambda: ["text"], "model") == ["text"]
    assert len(forks) >= 2


def test_an_empty_template(tiny_nano, example_config):
    processor = load_processor(tiny_nano, example_config)
    processor.chat_template = ""
    with pytest.raises(ValueError, match="puts '' before and '' after an answer"):
        ChatTokenizer(processor, example_config)


@pytest.fixture
def number_tokens(example_config):
    """(processor, config): one token per number."""
    nano = NanoConfig(**TINY, number_tokens=True)
    model, processor = build_nano(nano, num_bins=example_config.num_bins, texts=["Push it.\nState: "])
    set_image_size(processor, model.config, example_config)
    return processor, example_config


def test_number_tokens_make_a_brief_row(number_tokens):
    processor, config = number_tokens
    chat = ChatTokenizer(processor, config)
    assert chat.render("Push it.", "12 400", "5 511 0") == (
        "<|im_start|>Push it.\nState: 12 400<image><end_of_utterance> 5 511 0<end_of_utterance>"
    )
    prompt, (answer, labels) = chat.encode_prompt("Push it.", [12, 400]), chat.encode_answer([5, 511, 0])
    fake = "<fake_token_around_image>"
    assert processor.tokenizer.convert_ids_to_tokens(prompt + answer) == [
        *("<|im_start|>", "Push", "Ġit.", "Ċ", "State:", "Ġ12", "Ġ400", fake, "<global-img>"),
        *(["<image>"] * 4),
        *(fake, "<end_of_utterance>", "Ġ5", "Ġ511", "Ġ0", "<end_of_utterance>"),
    ]
    assert labels == answer
    text = chat.render("Push it.", "12 400", "5 511 0")
    blank = Image.new("RGB", (config.image_size, config.image_size))
    assert prompt + answer == processor(text=[text], images=[[blank]], add_special_tokens=False)["input_ids"][0]


def test_a_hidden_number_token_is_one_token_whose_label_may_stay(number_tokens):
    processor, config = number_tokens
    chat = ChatTokenizer(processor, config)
    plain, _ = chat.encode_answer([5, 511, 0])
    hidden = np.array([True, False, True])
    ids, labels = chat.encode_answer([5, 511, 0], hidden)
    assert processor.tokenizer.convert_ids_to_tokens(ids) == ["Ġ?", "Ġ511", "Ġ?", "<end_of_utterance>"]
    assert labels == [-100, plain[1], -100, plain[3]]
    assert chat.can_keep_labels and chat.encode_answer([5, 511, 0], hidden, keep_labels=True) == (ids, plain)


def test_digit_tokens_cannot_keep_the_labels_of_hidden_values(backbone):
    _, processor, config = backbone
    assert not ChatTokenizer(processor, config).can_keep_labels
