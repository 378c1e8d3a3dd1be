"""Chat rows <-> token ids, built from the processor's own chat template.

Numbers are looked up in a table, prompts are cached by task: in the steady state a row costs no template, tokenizer or
image-processor call. The same object serves the collator and the policy, so training and inference can't differ.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from PIL import Image
from transformers import ProcessorMixin

from vla0_trl.actions import join_integers
from vla0_trl.config import VLAConfig
from vla0_trl.processing.chat import MAX_TASK, task_mistake
from vla0_trl.processing.template_check import chat_frame, chat_turns, fill

IGNORED = -100  # torch's cross-entropy leaves such labels out
MASK_CANDIDATES = ("?", "_", "*", "#")
_KEPT_PROMPTS = 4096  # tasks whose prompts are kept; a robot may be told any number of them


class ChatTokenizer:
    """Token ids of prompts and answers.

    Args:
        processor (`ProcessorMixin`): with a chat template; made for the config by [`models.loading.load_processor`].
        config ([`VLAConfig`]): cameras, bins and prompt options.

    Attributes:
        end_of_turn_id (`int`): first token of what the template puts after an answer; generation stops there.
        prefix (`str`): what the template puts before an answer: "" or " " (as in SmolVLM's "Assistant: 524").
        mask_id (`int`): an existing token that stands for a hidden value, with the space before it where numbers have
            theirs inside.
        pad_id (`int`): padding.
        special_tokens (`set[str]`): that no task may hold.
        extra_keys (`set[str]`): what the processor returns per token beside ids and mask (Qwen's `mm_token_type_ids`).
    """

    def __init__(self, processor: ProcessorMixin, config: VLAConfig):
        self.processor, self.config = processor, config
        self.tokenizer = processor.tokenizer
        self.num_images = 1 if config.tile_images else len(config.cameras)
        self._around_task, self.prefix, self._suffix = chat_frame(processor, config, self.num_images)
        suffix_ids = self._ids(self._suffix)
        self.end_of_turn_id = suffix_ids[0]
        self.image_token_id: int = processor.image_token_id
        self.pad_id = self.tokenizer.pad_token_id
        if self.pad_id is None:
            raise ValueError(f"the tokenizer of {config.base_model or 'this model'} has no pad token: set one")
        self._suffix_ids = suffix_ids
        added = self.tokenizer.added_tokens_decoder.values()
        self.special_tokens = {token.content for token in added if token.special} | {processor.image_token}
        numbers = list(map(str, range(config.num_bins + 1)))
        self._numbers = self._after_a_number(numbers)
        self._first = self._numbers if self.prefix else [self._ids(number) for number in numbers]
        # Where " 524" is one token, so is what hides it; else its space stays a token of its own.
        self._space = [] if all(len(ids) == 1 for ids in self._numbers) else self._ids(" ")
        self.mask_id = self._single_token([mask if self._space else f" {mask}" for mask in MASK_CANDIDATES])
        # A dict, because an `lru_cache` does not pickle, as worker processes that are not forked need it.
        self._prompts: dict[str, tuple[list[int], list[int]]] = {}
        self._chat_turns: dict[tuple, tuple[list[str], bool]] = {}  # by a conversation's roles and parts
        self.extra_keys: set[str] = set()
        self.encode_prompt("task", np.zeros(config.state_dim, np.int64))  # finds extra_keys
        self._check_table()

    # -- prompts

    def render(self, task: str, state: str = "", action: str | None = None) -> str:
        """The chat as the model's template writes it, images as placeholders; without `action`, up to the answer."""
        before, after = self._around_state(task)
        prompt = f"{before} {state}{after}" if self.config.use_state else before
        return prompt if action is None else f"{prompt}{self.prefix}{action}{self._suffix}"

    def _around_state(self, task: str) -> tuple[str, str]:
        """A prompt's text before and after the state and the space before it, which belongs to the first number.

        Without a state, all is in the first.
        """
        before, between, after = self._around_task
        return before + task + between, after

    def encode_prompt(self, task: str, state: Sequence[int] | np.ndarray = ()) -> list[int]:
        """Ids up to where the answer begins, image placeholders expanded; `state` (state_dim,) integers if used."""
        head, tail = self._head_and_tail(task)
        if not self.config.use_state:
            return [*head, *tail]
        if len(state) != self.config.state_dim:
            raise ValueError(f"expected a state of {self.config.state_dim} integers, got {len(state)}")
        return [*head, *(token for number in state for token in self._numbers[number]), *tail]

    def _head_and_tail(self, task: str) -> tuple[list[int], list[int]]:
        """Ids before and after the state text; all in the first if there is none."""
        if task in self._prompts:
            return self._prompts[task]
        if mistake := task_mistake(task, self.special_tokens):
            raise ValueError(f"the task {mistake}")
        before, after = self._around_state(task)
        ids = self._expand(before), self._expand(after)
        if len(task) <= MAX_TASK:  # longer ones, most of which a model refuses, would fill the memory
            if len(self._prompts) >= _KEPT_PROMPTS:
                self._prompts.clear()
            self._prompts[task] = ids
        return ids

    def _expand(self, text: str) -> list[int]:
        """Ids of a part of a prompt; if the images are in it, with as many placeholders as they take."""
        if self.processor.image_token not in text:
            return self._ids(text) if text else []
        side = self.config.image_size
        width = side * len(self.config.cameras) if self.config.tile_images else side
        blank = Image.new("RGB", (width, side))
        images = [[blank] * text.count(self.processor.image_token)]
        encoded = self.processor(text=[text], images=images, add_special_tokens=False)
        self.extra_keys = {"mm_token_type_ids", "token_type_ids"} & encoded.keys()
        return list(encoded["input_ids"][0])

    def token_types(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """What some models want to know of each token beside its id: 1 for images, else 0 (Qwen2.5-VL's positions)."""
        return {key: (input_ids == self.image_token_id).to(torch.int64) for key in sorted(self.extra_keys)}

    # -- answers

    def encode_answer(
        self,
        integers: Sequence[int] | np.ndarray,
        hidden: np.ndarray | None = None,
        keep_labels: bool = False,
    ) -> tuple[list[int], list[int]]:
        """Ids and labels of an answer, from the prefix through the end of the turn.

        Args:
            integers: (n,) in 0…num_bins.
            hidden (`np.ndarray`, *optional*): bool (n,): values to replace by one mask token each. Not even their
                number of digits is left; separators stay.
            keep_labels (`bool`): hidden values are trained on all the same, see `can_keep_labels`.
        """
        ids: list[int] = []
        labels: list[int] = []
        for position, number in enumerate(integers):
            spelled = self.spellings(position)
            if hidden is not None and hidden[position]:
                placeholder = self.placeholder(position)
                ids += placeholder
                labels += spelled[number] if keep_labels else [*placeholder[:-1], IGNORED]
            else:
                ids += spelled[number]
                labels += spelled[number]
        return ids + self._suffix_ids, labels + self._suffix_ids

    def encode_beginning(self, integers: Sequence[int] | np.ndarray) -> list[int]:
        """Ids of an answer's first numbers, (n,) in 0…num_bins, spelled as by `encode_answer`; nothing of the next."""
        return [t for place, number in enumerate(integers) for t in self.spellings(place)[number]]

    def spellings(self, position: int) -> list[list[int]]:
        """Ids of each number 0…num_bins at this place of an answer, with what separates it from the one before."""
        return self._numbers if position else self._first

    def placeholder(self, position: int) -> list[int]:
        """Ids that stand at this place of an answer where its number is hidden."""
        return [*(self._space if position or self.prefix else []), self.mask_id]

    @property
    def can_keep_labels(self) -> bool:
        """Whether a hidden value takes as many tokens as any number does, so that its label fits in its place."""
        first = {len(ids) for ids in self._first} <= {len(self._space if self.prefix else []) + 1}
        return first and {len(ids) for ids in self._numbers} == {len(self._space) + 1}

    def hide_characters(
        self, ids: list[int], labels: list[int], fraction: float, rng: np.random.Generator
    ) -> tuple[list[int], list[int]]:
        """VLA-0's own masking, to compare with: each digit of an answer is hidden with probability `fraction`.

        Unlike hidden values, hidden digits still show how many there are, and their neighbours.
        """
        hide = np.isin(ids, self._digit_ids) & (rng.random(len(ids)) < fraction)
        return (
            [self.mask_id if hidden else token for token, hidden in zip(ids, hide, strict=True)],
            [IGNORED if hidden else label for label, hidden in zip(labels, hide, strict=True)],
        )

    # -- other conversations

    def encode_chat(self, messages: Sequence[dict], targets_from: int = 0) -> tuple[list[int], list[int]]:
        """Ids and labels of any conversation; what the template writes of an assistant's turn is its label.

        Args:
            messages: with content parts, as TRL's `prepare_multimodal_messages` gives them.
            targets_from (`int`): turns before this one are no targets.

        `ValueError`: see [`chat_turns`].
        """
        turns, trims = self.chat_turns(messages, targets_from)
        texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
        ids: list[int] = []
        labels: list[int] = []
        for number, turn in enumerate(turns):
            tokens = self._ids(fill(turn, texts, trims))
            expanded = (self.image_ids if token == self.image_token_id else [token] for token in tokens)
            found = list(chain.from_iterable(expanded))
            ids += found
            labels += found if number % 2 else [IGNORED] * len(found)
        return ids, labels

    def chat_turns(self, messages: Sequence[dict], targets_from: int = 0) -> tuple[list[str], bool]:
        """What the template writes around the texts of such a conversation; see [`template_check.chat_turns`]."""
        kind = (targets_from, *((m["role"], *(part["type"] for part in m["content"])) for m in messages))
        if kind not in self._chat_turns:
            self._chat_turns[kind] = chat_turns(self.processor, messages, targets_from)
        return self._chat_turns[kind]

    @cached_property
    def image_ids(self) -> list[int]:
        """What stands for one image of the config's size."""
        return self._expand(self.processor.image_token)

    # -- construction

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _after_a_number(self, numbers: list[str]) -> list[list[int]]:
        """Ids of " 524" as they come after another number (some tokenizers treat the start of a text differently)."""
        anchor = self._ids("0")
        pieces = self.tokenizer([f"0 {number}" for number in numbers], add_special_tokens=False)["input_ids"]
        alone = self.tokenizer([f" {number}" for number in numbers], add_special_tokens=False)["input_ids"]
        return [
            piece[len(anchor) :] if piece[: len(anchor)] == anchor else fallback
            for piece, fallback in zip(pieces, alone, strict=True)
        ]

    def _single_token(self, candidates: Sequence[str]) -> int:
        for text in candidates:
            ids = self._ids(text)
            if len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id:
                return ids[0]
        raise ValueError(f"none of {candidates} is a single token of this tokenizer: no token can stand for a mask")

    @cached_property
    def _digit_ids(self) -> list[int]:
        ids = [self._ids(str(digit)) for digit in range(10)]
        if any(len(i) != 1 for i in ids) or any(
            len(self._numbers[value]) != len(self._space) + len(str(value)) for value in self._samples()
        ):
            raise ValueError("character masking needs a tokenizer with one token per digit: use whole-value masking")
        return [i[0] for i in ids]

    def _samples(self) -> range:
        return range(0, self.config.num_bins + 1, max(1, self.config.num_bins // 16))

    def _check_table(self) -> None:
        """The table must spell what `join_integers` writes, or training would teach a text that never decodes."""
        values = self._samples()
        ids, _ = self.encode_answer(values)
        text = self.tokenizer.decode(ids[: len(ids) - len(self._suffix_ids)], clean_up_tokenization_spaces=False)
        if text.strip() != join_integers(values):
            raise ValueError(f"this tokenizer writes {text!r} where {join_integers(values)!r} is meant")
