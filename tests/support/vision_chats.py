"""A small vision chat dataset: questions about coloured squares, of no image, one, or several of other sizes."""

from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
TURNS = List({"role": Value("string"), "content": Value("string")})


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def square(color: str, side: int = 20) -> PILImage.Image:
    return PILImage.fromarray(np.full((side, side + 7, 3), COLORS[color], np.uint8))


def chat_rows(count: int = 6) -> list[dict]:
    """Rows of 0, 1, 2, 0, 1, 2, … images; those of two are conversations of two questions."""
    rows = []
    for index in range(count):
        names = [list(COLORS)[(index + place) % 3] for place in range(index % 3)]
        messages = [turn("user", "Which color?"), turn("assistant", names[0] if names else "none")]
        if len(names) == 2:
            messages += [turn("user", "And the other one?"), turn("assistant", names[1])]
        rows.append({"images": [square(name, 20 + 9 * index) for name in names], "messages": messages})
    return rows


def save_chats(folder: Path, rows: list[dict], columns: tuple[str, ...] = ("messages",), images=True) -> str:
    """A folder that `load_dataset` takes."""
    features = Features(dict.fromkeys(columns, TURNS) | ({"images": List(Image())} if images else {}))
    folder.mkdir(parents=True)
    rows = [{name: row[name] for name in features} for row in rows]
    Dataset.from_list(rows, features=features).to_parquet(folder / "train.parquet")
    return str(folder)
