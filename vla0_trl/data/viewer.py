"""Pictures and pages of chat rows, for a person to check that a dataset says what its episodes showed."""

import base64
import io
import textwrap
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from vla0_trl.config import VLAConfig
from vla0_trl.envs.pusht.env import TASK as PUSHT_TASK
from vla0_trl.envs.pusht.env import WORKSPACE
from vla0_trl.processing.chat_tokenizer import IGNORED
from vla0_trl.processing.collator import VLADataCollator
from vla0_trl.templating import render

Row = dict[str, Any]
PICTURE_SIDE = 320  # px, of a frame on the page
_GAP = 6  # px, between cameras
_OVERSAMPLE = 3  # PIL draws without anti-aliasing: draw larger, then shrink


def row_picture(row: Row, config: VLAConfig) -> Image.Image:
    """The row's frames, enlarged, with what its action text says: drawn onto the frame (PushT) or plotted below."""
    frames = row["images"]
    state = np.asarray(row["raw_state"], np.float32)
    chunk = config.action_tokenizer().decode(row["action"], state)
    if row["task"] == PUSHT_TASK and config.action_dim == 2:
        start = state[:2] if len(state) else chunk[0]
        return _with_trajectory(frames[0], np.vstack([start, chunk]))
    width = PICTURE_SIDE if len(frames) == 1 else PICTURE_SIDE * 3 // 4
    frames = [frame.resize((width, round(frame.height * width / frame.width))) for frame in frames]
    plot = _chunk_plot(chunk, config, (width + _GAP) * len(frames) - _GAP)
    picture = Image.new("RGB", (plot.width, max(f.height for f in frames) + plot.height), "white")
    for column, frame in enumerate(frames):
        picture.paste(frame, (column * (width + _GAP), 0))
    picture.paste(plot, (0, picture.height - plot.height))
    return picture


def _with_trajectory(frame: Image.Image, points: np.ndarray) -> Image.Image:
    """Positions (n, 2) in pixels of the workspace as a line from yellow (now) to red (the chunk's end)."""
    side = PICTURE_SIDE * _OVERSAMPLE
    picture = frame.resize((side, side), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    points = points / WORKSPACE * side
    for i in range(len(points) - 1):
        progress = i / max(1, len(points) - 2)
        color = (235, round(170 * (1 - progress)), 0)
        draw.line([*points[i], *points[i + 1]], fill=color, width=2 * _OVERSAMPLE)
        draw.circle(points[i + 1].tolist(), 3 * _OVERSAMPLE, fill=color)
    draw.circle(points[0].tolist(), 5 * _OVERSAMPLE, outline="black", width=_OVERSAMPLE)
    return picture.resize((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)


def _chunk_plot(chunk: np.ndarray, config: VLAConfig, width: int) -> Image.Image:
    """One small curve per dimension over the chunk's steps; the grey band is the range that the integers span."""
    low, high = config.action_stats.bounds(config.normalization)
    columns = min(4, config.action_dim)
    rows = -(-config.action_dim // columns)
    figure = Figure(figsize=(width / 100, 0.9 * rows + 0.1), dpi=100, layout="constrained")
    for dim in range(config.action_dim):
        axes = figure.add_subplot(rows, columns, dim + 1)
        if not config.relative_actions:
            axes.axhspan(low[dim], high[dim], color="#eeeeee")
        axes.plot(chunk[:, dim], color="#c33", marker=".", markersize=4, linewidth=1)
        axes.set_title(f"action[{dim}]", fontsize=7, pad=2)
        axes.tick_params(labelsize=6, length=2)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return Image.open(buffer).convert("RGB")


def contact_sheet(rows: list[Row], config: VLAConfig) -> Image.Image:
    """The rows' pictures with captions, up to four side by side."""
    pictures = [row_picture(row, config) for row in rows]
    font = ImageFont.load_default(13)
    gap, line = 12, 17
    cell_width, picture_height = pictures[0].width + gap, max(picture.height for picture in pictures)
    captions = [_caption(row, int(pictures[0].width / font.getlength("0"))) for row in rows]
    cell_height = picture_height + line * max(map(len, captions)) + 2 * gap
    columns = min(4, len(rows))
    sheet = Image.new("RGB", (columns * cell_width + gap, -(-len(rows) // columns) * cell_height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = gap + i % columns * cell_width, gap + i // columns * cell_height
        sheet.paste(picture, (left, top))
        for number, text in enumerate(caption):
            color = "black" if number == 0 else "#555555"
            draw.text((left, top + picture.height + 4 + number * line), text, fill=color, font=font)
    return sheet


def _caption(row: Row, columns: int) -> list[str]:
    texts = [f"episode {row['episode_index']}, frame {row['frame_index']}", row["task"]]
    texts += [f"{name} {row[name]}" for name in ("state", "action") if row[name]]
    return [line for text in texts for line in textwrap.wrap(text, columns)]


def html_page(rows: list[Row], config: VLAConfig, title: str, collator: VLADataCollator | None = None) -> str:
    """A page that needs no other file; with a collator, also each row's prompt and tokens as it makes them."""
    shown = [_shown(row, config, collator) for row in rows]
    kind = "relative to the state" if config.relative_actions else "absolute"
    summary = {
        "source": f"{config.source} ({config.source_revision})",
        "robot": f"{config.robot}, {config.fps:g} Hz, cameras {', '.join(config.cameras)}",
        "action text": f"{config.chunk_size} steps × {config.action_dim}, 0…{config.num_bins}, {kind}",
    }
    return render("dataset.html", title=title, summary=summary, legend=collator is not None, rows=shown)


def _shown(row: Row, config: VLAConfig, collator: VLADataCollator | None) -> dict[str, Any]:
    """What the page shows of a row."""
    buffer = io.BytesIO()
    row_picture(row, config).save(buffer, "PNG")
    terms = {
        "task": row["task"],
        "state": row["state"] or "none",
        "action": row["action"],
        "decoded": f"at most {decoding_error(row, config):.2f} half bins from the stored chunk (up to 1: rounding)",
    }
    shown = {
        "name": f"episode {row['episode_index']}, frame {row['frame_index']}",
        "picture": base64.b64encode(buffer.getvalue()).decode(),
        "terms": terms,
        "tokens": [],
    }
    if collator is not None:
        state, _ = collator.integers(row)
        shown["prompt"] = collator.chat_tokenizer.render(row["task"], " ".join(map(str, state)))
        shown["tokens"] = list(_shortened(token_spans(row, collator)))
    return shown


def decoding_error(row: Row, config: VLAConfig) -> float:
    """Largest distance between decoded text and stored chunk, in half bins: more than 1 only where it was clipped."""
    tokenizer = config.action_tokenizer()
    chunk = tokenizer.decode(row["action"], np.asarray(row["raw_state"]))
    stored = np.reshape(row["raw_action"], chunk.shape)
    half_bin = (tokenizer.quantizer.high - tokenizer.quantizer.low) / config.num_bins / 2
    return float((np.abs(chunk - stored) / half_bin).max())


def token_spans(row: Row, collator: VLADataCollator) -> list[tuple[str, str]]:
    """The row's tokens as the model is trained on them: (text, "label" | "masked" | "ignored")."""
    batch = collator([row])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    answer = labels.index(next(label for label in labels if label != IGNORED))
    spans = []
    for position, (token, label) in enumerate(zip(ids, labels, strict=True)):
        hidden = position >= answer - 1 and token == collator.chat_tokenizer.mask_id
        kind = "label" if label != IGNORED else "masked" if hidden else "ignored"
        spans.append((collator.chat_tokenizer.tokenizer.decode([token]), kind))
    return spans


def _shortened(spans: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Hundreds of equal image tokens say no more than their number does; equal digits stay apart."""
    for (text, kind), group in groupby(spans):
        count = len(list(group))
        text = text.replace("\n", "⏎")
        yield from [(f"{text} × {count}", kind)] if count > 4 else [(text, kind)] * count
