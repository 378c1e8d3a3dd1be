"""The nano backbone's processor: SmolVLM's, with a tokenizer of bytes, or of whole numbers and words besides."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

SPECIAL_TOKENS = (
    "<|pad|>",
    "<|im_start|>",
    "<end_of_utterance>",
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
)
# SmolVLM's template without the newline behind a turn.
_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}<image>{% endif %}{% endfor %}<end_of_utterance>{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
# No names of roles; the image behind the text, so that image, state and answer are within a few tokens.
_BRIEF_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{% if message['role'] == 'assistant' %} {% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    "<end_of_utterance>{% endfor %}"
)
_MASK = " ?"  # a token that ChatTokenizer can put in a number's place
# Words take the space before them along, as numbers do.
_WORDS = Regex(r" ?[^\s]+|\s")


def nano_processor(
    image_size: int,
    image_tokens: int,
    image_mean: Sequence[float],
    image_std: Sequence[float],
    largest_number: int | None = None,
    texts: Sequence[str] = (),
) -> SmolVLMProcessor:
    """A processor for images of `image_size` px, each of which becomes `image_tokens` tokens.

    Args:
        largest_number (`int`, *optional*): integers from 0 to this are one token each, with the space before them;
            the chat template is a brief one. Without it, text is bytes alone.
        texts: whose words are one token each, too.
    """
    brief = largest_number is not None
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    entries = [*SPECIAL_TOKENS, *alphabet]
    if brief:
        splitter = pre_tokenizers.Sequence([pre_tokenizers.Split(_WORDS, "isolated"), bytes_only])
        words = [word for text in [*texts, _MASK] for word, _ in splitter.pre_tokenize_str(text)]
        entries += [*(f"Ġ{number}" for number in range(largest_number + 1)), *words]  # " 524" is one token
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(entries))}
    # What is in the vocabulary is one token, all else bytes: there are no merges to learn.
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=brief))
    backend.pre_tokenizer = splitter if brief else bytes_only
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        additional_special_tokens=list(SPECIAL_TOKENS[3:]),
        clean_up_tokenization_spaces=False,
    )
    side = {"longest_edge": image_size}
    return SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(
            size=side,
            max_image_size=side,
            do_image_splitting=False,
            resample=3,
            image_mean=list(image_mean),
            image_std=list(image_std),
        ),
        tokenizer=tokenizer,
        video_processor=SmolVLMVideoProcessor(),
        image_seq_len=image_tokens,
        chat_template=_BRIEF_TEMPLATE if brief else _TEMPLATE,
    )
