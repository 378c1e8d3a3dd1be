"""TRL's vision chat datasets (questions about images, pointing, captions), to train on beside a policy's rows."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from datasets import Image, List
from trl import prepare_multimodal_messages

from vla0_trl.data.chat_dataset import load_rows
from vla0_trl.data.row_check import image_mistake
from vla0_trl.processing.chat_tokenizer import ChatTokenizer
from vla0_trl.schema import one_line

CHAT_EPISODE = -1  # in the place of an episode's index
_ROLES = ("system", "user", "assistant")
_TURN_TOKENS = 32  # more than a chat template writes around a turn
_MAX_TURNS = 100  # the template runs once per answer, over all that was before it
_BATCH = 10_000  # rows


class VisionChats:
    """The rows of a vision chat dataset, as [`processing.collator.VLADataCollator`] takes them.

    Columns as TRL documents them: `messages`, of which all the assistant's turns are learnt, or conversational
    `prompt` and `completion`; and `images` (any number per row), `image`, or none of the two.

    Args:
        name (`str`): a local folder or a Hub id, with a split `train`.

    Raises:
        FileNotFoundError: there is no such dataset.
        ValueError: its columns are others.
    """

    def __init__(self, name: str):
        self.name, self._dataset = name, load_rows(name)
        features = self._dataset.features
        self._texts = ["messages"] if "messages" in features else ["prompt", "completion"]
        if any("role" not in getattr(features.get(text), "feature", ()) for text in self._texts):
            raise ValueError(
                f"{name}: has columns {sorted(features)}, wanted messages, or prompt and completion, each a list of "
                "role and content"
            )
        self._images = next((column for column in ("images", "image") if column in features), None)
        kinds = {"images": List(Image()), "image": Image()}
        if self._images and features[self._images] != kinds[self._images]:
            raise ValueError(
                f"{name}: column {self._images} is {features[self._images]}, wanted {kinds[self._images]}: cast it, "
                "dataset.cast_column, and save it again"
            )
        if self._images:  # left encoded: `datasets` does not say in which row a damaged file is
            encoded = {"images": List(Image(decode=False)), "image": Image(decode=False)}
            self._dataset = self._dataset.cast_column(self._images, encoded[self._images])

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Rows with `chat` and `targets_from` (see [`ChatTokenizer.encode_chat`]) and `images`, still encoded."""
        rows = []
        for index, row in zip(indices, self._dataset.__getitems__(list(indices)), strict=True):
            images = row[self._images] if self._images else None
            images = images if isinstance(images, list) else [image for image in [images] if image is not None]
            chat, targets_from = self._conversation(row, len(images))
            rows.append({"chat": chat, "targets_from": targets_from, "images": images})
            rows[-1] |= {"episode_index": CHAT_EPISODE, "frame_index": index, "place": f"{self.name}: row {index}"}
        return rows

    def check(self, chat_tokenizer: ChatTokenizer, max_tokens: int) -> None:
        """Look at all rows, at images by their headers alone.

        `ValueError`: the first row that can't be trained on: dataset, row, what was found.
        """
        columns = self._dataset.select_columns([*self._texts, *([self._images] if self._images else [])])
        start = 0
        for rows in columns.with_format("arrow").iter(_BATCH):
            images = rows[self._images] if self._images else [None] * len(rows)
            for row, cell in zip(rows.select(self._texts).to_pylist(), images, strict=True):
                mistake = self._mistake(row, _files(cell), chat_tokenizer, max_tokens)
                if mistake:
                    raise ValueError(f"{self.name}: row {start}: {mistake}: repair the row, or leave it out")
                start += 1

    def _conversation(self, row: dict[str, Any], num_images: int) -> tuple[list[dict], int]:
        """Messages with content parts and a place for each image, and where the answers that are learnt begin."""
        messages = [message for text in self._texts for message in row[text]]
        for message in messages:
            if isinstance(message["content"], list):  # datasets adds the keys that a part lacks, as null
                parts = message["content"]
                message["content"] = [{key: v for key, v in part.items() if v is not None} for part in parts]
        prepared = prepare_multimodal_messages(messages, [None] * num_images)
        return prepared, 0 if self._texts == ["messages"] else len(row["prompt"])

    def _mistake(
        self, row: dict[str, Any], files: list[pa.Buffer | None], tokenizer: ChatTokenizer, max_tokens: int
    ) -> str | None:
        """What is wrong with a row."""
        for file in files:
            mistake = "holds a path in place of an image: embed it" if file is None else image_mistake(file)
            if mistake:
                return f"{self._images} {mistake}"
        for column in self._texts:
            for message in row[column] or ():
                if message is None:
                    return f"{column} has a turn that is null"
                if message["role"] not in _ROLES:
                    return f"{column} has the role {message['role']!r}, wanted one of {', '.join(_ROLES)}"
                if mistake := _content_mistake(message["content"], tokenizer.special_tokens):
                    return f"{column} {mistake}"
            if not row[column]:
                return f"{column} is empty"
        try:
            chat, targets_from = self._conversation(row, len(files))
            if chat[0]["role"] == "assistant":
                return "begins with the assistant: nothing was asked"
            if len(chat) > _MAX_TURNS:
                return f"has {len(chat)} turns, at most {_MAX_TURNS} are read"
            if all(message["role"] != "assistant" for message in chat[targets_from:]):
                return "the assistant says nothing, so there is nothing to learn"
            tokenizer.chat_turns(chat, targets_from)
            texts = [part["text"] for message in chat for part in message["content"] if part["type"] == "text"]
            # No tokenizer makes more tokens of a text than it has bytes, so that few rows have to be counted.
            at_most = sum(len(text.encode()) for text in texts) + _TURN_TOKENS * (len(chat) + 1)
            if at_most + len(files) * len(tokenizer.image_ids) > max_tokens:
                length = len(tokenizer.encode_chat(chat, targets_from)[0])
                if length > max_tokens:
                    return f"makes {length} tokens with its images, and the model reads {max_tokens}"
        except ValueError as error:  # of images without places, and of turns that a template forbids
            return one_line(error).rstrip(".")
        return None


def _files(cell: pa.Scalar | None) -> list[pa.Buffer | None]:
    """The image files in a cell of a table, which holds a list of images, one, or none; None: it is not in there."""
    if cell is None or not cell.is_valid:
        return []
    images = cell.values if isinstance(cell, pa.ListScalar) else [cell]
    return [image["bytes"].as_buffer() if image.is_valid else None for image in images]


def _content_mistake(content: Any, special_tokens: set[str]) -> str | None:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not parts:
        return "has a turn without content"
    for part in parts:
        if part is None or part["type"] not in ("text", "image"):
            return f"has a part of type {part and part['type']!r}, wanted text or image"
        if part["type"] == "text":
            text = part.get("text")
            if text is None:
                return "has a text that is null"
            if found := next((token for token in special_tokens if token in text), None):
                return f"says {text[:60]!r}, and {found!r} is a special token, by which it would change the prompt"
    return None
