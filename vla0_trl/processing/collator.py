"""Chat rows -> a training batch: completion-only labels, whole-value masking, seeded crops."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import ProcessorMixin

from vla0_trl.actions import parse_integers
from vla0_trl.config import VLAConfig
from vla0_trl.processing.branches import BranchedAnswer, PassToken
from vla0_trl.processing.chat_tokenizer import IGNORED, ChatTokenizer
from vla0_trl.processing.images import (
    crop,
    draw_jitter,
    fit_images,
    model_inputs,
    row_image,
    stack_cameras,
)

Row = dict[str, Any]
MASK_UNITS = ("value", "character")
MASK_LABELS = ("ignore", "keep")


@dataclass(eq=False, repr=False)
class VLADataCollator:
    """Rows of a chat dataset -> what the model's `forward` takes.

    Masking keeps the model from completing numbers out of numbers instead of looking (VLA-0-Smol: 57.8 → 78.1 % on
    PushT). With probability `mask_skip` a sample is left alone; otherwise a fraction of its values, drawn from
    U(0, `mask_max`), is hidden: the whole value becomes one token in the input, whose label is ignored. Separators and
    the end of the turn are never hidden.

    From random weights, where numbers are far easier to continue than to see, most samples should hide all of their
    values (`mask_full`) and learn them all the same (`mask_labels="keep"`): each is then predicted from what is seen.

    What is drawn depends on seed, epoch, episode and frame alone: not on workers, batch order or where a run resumed.

    Args:
        processor (`ProcessorMixin`): of the model, made by [`models.loading.load_processor`].
        config ([`VLAConfig`]): with statistics; how rows become text.
        mask_max (`float`, *optional*, defaults to `0.4`): upper end of the fraction of hidden values.
        mask_skip (`float`, *optional*, defaults to `0.1`): share of samples without masking.
        mask_full (`float`, *optional*, defaults to `0.0`): share of the other samples of which all values are hidden.
        mask_branches (`float`, *optional*, defaults to `0.0`): share of all samples that train parallel decoding: all
            values are hidden, and each one's digits are a branch behind the answer, see [`branches`]. The batch then
            has `position_ids` and `branches`, from which training makes the mask.
        mask_labels (`str`, *optional*, defaults to `"ignore"`): `"keep"` makes hidden values targets all the same;
            needs a tokenizer that writes every number as one token.
        train (`bool`, *optional*, defaults to `True`): `False` for evaluation: no masking, central crop.
        mask_unit (`str`, *optional*, defaults to `"value"`): `"character"` hides digits instead, as VLA-0 does.
        seed (`int`, *optional*, defaults to `0`): of crops and masks.
        defer_images (`bool`, *optional*, defaults to `False`): leave images uint8 under `"images"`, in a tenth of
            the bytes: [`VLATrainer.prepare_batch`] calls [`images.model_inputs`] on the training device.
        stored_cameras (`list[str]`, *optional*): the cameras of the rows, if the config takes only some of them.
        pad_to_multiple_of (`int`, *optional*): round up the length of every batch.
        static_tasks (`list[str]`, *optional*): all tasks there are. Every batch is then as long as the longest text
            that a row with one of them can have: a single length, as `torch.compile` wants it.
    """

    processor: ProcessorMixin
    config: VLAConfig
    mask_max: float = 0.4
    mask_skip: float = 0.1
    mask_full: float = 0.0
    mask_branches: float = 0.0
    mask_labels: str = "ignore"
    train: bool = True
    mask_unit: str = "value"
    seed: int = 0
    defer_images: bool = False
    stored_cameras: Sequence[str] | None = None
    pad_to_multiple_of: int | None = None
    static_tasks: Sequence[str] = ()

    def __post_init__(self):
        for name in ("mask_max", "mask_skip", "mask_full", "mask_branches"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1]")
        for name, known in (("mask_unit", MASK_UNITS), ("mask_labels", MASK_LABELS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {known}")
        config, self.keep_labels = self.config, self.mask_labels == "keep"
        self.chat_tokenizer = ChatTokenizer(self.processor, config)
        self._check_tokens()
        if not self.train:
            self.mask_branches = 0.0
        self.stored_cameras = list(self.stored_cameras or config.cameras)
        self.branched = BranchedAnswer(self.chat_tokenizer)
        self.action_tokenizer, self.state_quantizer = config.action_tokenizer(), config.state_quantizer()
        self._min_length = max(map(self.longest_text, self.static_tasks), default=0)
        if self.static_tasks and self.mask_branches:
            longest = max(len(self.branched.branch(1, number)) for number in range(config.num_bins + 1))
            self._min_length += config.num_values * longest + 1
        # Shared memory: the trainer turns the epoch while worker processes live on.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def _check_tokens(self) -> None:
        """`ValueError` for a kind of masking that this tokenizer or this model can't do."""
        if self.keep_labels and (self.mask_unit != "value" or not self.chat_tokenizer.can_keep_labels):
            raise ValueError(
                "mask_labels='keep' needs whole values of one token each, for one mask token stands in a value's "
                "place: with digit tokens, or mask_unit='character', use mask_labels='ignore'"
            )
        if self.mask_branches and self.chat_tokenizer.can_keep_labels:
            raise ValueError(
                f"mask_branches={self.mask_branches}: with one token per number a branch has no tokens of its own: "
                "use mask_full and mask_labels='keep'"
            )
        if self.mask_branches and self.chat_tokenizer.extra_keys:
            raise ValueError(
                f"mask_branches={self.mask_branches}: this model takes positions or attention from "
                f"{', '.join(sorted(self.chat_tokenizer.extra_keys))}, which branches don't have: use 0, or SmolVLM"
            )

    def set_epoch(self, epoch: int) -> None:
        """Draw other crops and masks from now on, in worker processes, too."""
        self._epoch.fill_(epoch)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """B rows -> `input_ids`, `attention_mask`, `labels` (B, L), padded on the right, and the images.

        Rows of [`data.vision_chat.VisionChats`] may follow those of a chat dataset: they are not masked or cropped.
        """
        encoded, images, jitter, others = [], [], [], []
        for row in rows:
            if "chat" in row:
                encoded.append((*self.chat_tokenizer.encode_chat(row["chat"], row["targets_from"]), None))
                others += (row_image(row, index) for index in range(len(row["images"])))
                continue
            place = (row.get("episode_index", 0), row.get("frame_index", 0))
            rng = np.random.default_rng((self.seed, self._epoch.item(), *place)) if self.train else None
            encoded.append(self._encode(row, rng))
            seen = row_images(row, self.stored_cameras, self.config.cameras)
            images.append([crop(image, self.config.crop_ratio, rng) for image in seen])
            if rng is not None and self.config.image_jitter:
                jitter.append([draw_jitter(self.config.image_jitter, rng) for _ in self.config.cameras])
        batch = self._pad(encoded)
        pixels = {"cameras": stack_cameras(images, self.config.cameras)}
        if jitter:
            pixels["jitter"] = torch.from_numpy(np.array(jitter))
        if others:
            pixels["others"] = fit_images(others, self.config)
        if self.defer_images:
            return batch | {"images": pixels}
        return batch | model_inputs(self.processor.image_processor, config=self.config, **pixels)

    def integers(self, row: Row) -> tuple[np.ndarray, np.ndarray]:
        """State and action of a row as integers, from its raw columns, or from its text where there are none."""
        config, state = self.config, np.zeros(0, np.int64)
        if "raw_action" not in row:
            if config.use_state:
                state = parse_integers(row["state"], config.state_dim, config.num_bins)
            return state, parse_integers(row["action"], config.num_values, config.num_bins)
        raw_state = np.asarray(row["raw_state"], np.float64)
        # Rows may hold longer chunks than this config asks for.
        actions = np.asarray(row["raw_action"], np.float64).reshape(-1, config.action_dim)[: config.chunk_size]
        if self.state_quantizer is not None:
            state = self.state_quantizer.encode(raw_state)
        return state, self.action_tokenizer.to_integers(actions, raw_state)

    def _encode(self, row: Row, rng: np.random.Generator | None) -> tuple[list[int], list[int], PassToken | None]:
        """Ids and labels of one row, not yet padded, and its answer's tokens if it has branches."""
        state, action = self.integers(row)
        prompt = self.chat_tokenizer.encode_prompt(row["task"], state)
        if self.mask_branches and rng.random() < self.mask_branches:
            answer, labels = self.branched.row(action, len(prompt))
            return prompt + answer.token_id.tolist(), [IGNORED] * len(prompt) + labels, answer
        fraction = 0.0
        if rng is not None and rng.random() >= self.mask_skip:
            full = self.mask_full > 0 and rng.random() < self.mask_full
            fraction = 1.0 if full else rng.uniform(0, self.mask_max)
        hidden = None
        if fraction and self.mask_unit == "value":
            hidden = np.zeros(len(action), bool)
            hidden[rng.permutation(len(action))[: round(fraction * len(action))]] = True
        answer, labels = self.chat_tokenizer.encode_answer(action, hidden, self.keep_labels)
        if fraction and self.mask_unit == "character":
            answer, labels = self.chat_tokenizer.hide_characters(answer, labels, fraction, rng)
        return prompt + answer, [IGNORED] * len(prompt) + labels, None

    def longest_text(self, task: str) -> int:
        """Tokens of a row with this task, if all of its numbers are as long as they can be."""
        config, chat = self.config, self.chat_tokenizer
        widest = max(range(config.num_bins + 1), key=lambda number: len(chat.encode_answer([0, number])[0]))
        state, action = ([widest] * count for count in (config.state_dim, config.num_values))
        return len(chat.encode_prompt(task, state)) + len(chat.encode_answer(action)[0])

    def _pad(self, encoded: list[tuple[list[int], list[int], PassToken | None]]) -> dict[str, torch.Tensor]:
        length = max(self._min_length, *(len(ids) for ids, *_ in encoded))
        multiple = self.pad_to_multiple_of or 1
        length = math.ceil(length / multiple) * multiple
        shape = (len(encoded), length)
        input_ids = np.full(shape, self.chat_tokenizer.pad_id)
        labels = np.full(shape, IGNORED)
        attention_mask = np.zeros(shape, np.int64)
        position_ids = np.tile(np.arange(length), (len(encoded), 1))
        branches = np.stack([position_ids, position_ids], -1)
        for row, (ids, label, answer) in enumerate(encoded):
            input_ids[row, : len(ids)] = ids
            labels[row, : len(ids)] = label
            attention_mask[row, : len(ids)] = 1
            if answer is not None:
                begin = len(ids) - len(answer.token_id)
                position_ids[row, begin : len(ids)] = begin + answer.position
                branches[row, begin : len(ids)] = np.stack([answer.visible_until, answer.visible_from], -1)
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        if self.mask_branches:
            batch |= {"position_ids": position_ids, "branches": branches}
        tensors = {key: torch.from_numpy(value) for key, value in batch.items()}
        return tensors | self.chat_tokenizer.token_types(tensors["input_ids"])


def row_images(row: Row, stored_cameras: list[str], cameras: list[str]) -> list[np.ndarray]:
    """Some of a row's cameras, uint8 (H, W, 3) each."""
    if len(row["images"]) != len(stored_cameras):
        raise ValueError(
            f"episode {row.get('episode_index')}, frame {row.get('frame_index')}: {len(row['images'])} images, "
            f"but the dataset has the cameras {stored_cameras}"
        )
    return [row_image(row, stored_cameras.index(name)) for name in cameras]


def row_observation(row: Row, stored_cameras: list[str], config: VLAConfig) -> dict[str, Any]:
    """A row with its raw columns as the policy would observe it."""
    images = dict(zip(config.cameras, row_images(row, stored_cameras, config.cameras), strict=True))
    return {"images": images, "state": np.asarray(row["raw_state"], np.float32), "task": row["task"]}
