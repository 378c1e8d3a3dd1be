"""The dataset card, its sample picture, and the upload to the Hub."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
from huggingface_hub import HfApi
from PIL import Image

from vla0_trl import __version__
from vla0_trl.config import CONFIG_NAME, VLAConfig
from vla0_trl.data.episodes import SourceInfo

SAMPLE_NAME = "sample.png"
_SAMPLE_FRAMES = 6
_SAMPLE_HEIGHT = 192  # px, of one frame in the picture

# No `configs` in the header: load_dataset finds data/train-* by itself, and with `configs` its cache would know a
# local folder by its name alone: another folder of that name, or one converted again, would give the old rows.
_CARD = """\
---
license: {info.license}
task_categories: [robotics]
tags: [vla0_trl, VLA, robotics, imitation-learning, trl]
---

# {info.source} as chat

{frames} frames of {episodes} episodes at {config.fps:g} Hz, as chat rows for training vision-language-action models
that answer in plain text ([VLA-0](https://arxiv.org/abs/2510.13054)); made with vla0_trl {version}.

![{sample_frames} frames of one episode, in order]({sample})

## How it was made

{info.how}

| | |
|---|---|
| source | {info.source} |
| revision | `{info.revision}` |
| licence | {info.license} |
| robot | {info.robot} |
| cameras | {cameras} |
| action text | {action_text} |
| episodes left out | {left_out} |

```
{command}
```

## Statistics

{stats}

## Use

```python
from datasets import load_dataset

rows = load_dataset("PATH_OR_HUB_ID", split="train")
```

One row a frame. `images` (one a camera), `task`, `state` and `action` as text; `prompt` and `completion` hold the same
as messages, so that plain TRL trains on them; `raw_state` and `raw_action` (time-major, absolute) are in environment
units; `episode_index` counts the source's episodes. `{config_name}` holds what turns text into actions.
"""


def write_card(
    directory: Path,
    sample: list[list[bytes]],
    config: VLAConfig,
    info: SourceInfo,
    episodes: int,
    frames: int,
    left_out: list[int],
    command: str,
) -> None:
    """Write README.md and the sample picture.

    Args:
        sample (`list[list[bytes]]`): image files of all cameras, frame by frame.
        episodes, frames (`int`): in the dataset.
        command (`str`): how the conversion was called.
    """
    sample_picture(sample).save(directory / SAMPLE_NAME)
    card = _CARD.format(
        frames=frames,
        episodes=episodes,
        version=__version__,
        sample_frames=_SAMPLE_FRAMES,
        sample=SAMPLE_NAME,
        info=info,
        config=config,
        cameras=", ".join(config.cameras),
        action_text=f"{config.chunk_size} steps × {config.action_dim} dimensions, integers 0…{config.num_bins}, "
        f"{config.normalization}, {'relative to the state' if config.relative_actions else 'absolute'}",
        left_out=f"{len(left_out)} ({', '.join(map(str, left_out))})" if left_out else 0,
        command=command or "vla0_trl.data.convert(…)",
        stats=_stats_table(config),
        config_name=CONFIG_NAME,
    )
    (directory / "README.md").write_text(card)


def sampled_frames(pieces: Iterable[pa.Table], frames: int) -> list[list[bytes]]:
    """Evenly spaced frames of an episode of `frames` rows, which come piece by piece: image files of all cameras."""
    wanted = np.linspace(0, frames - 1, _SAMPLE_FRAMES).astype(int)
    sample, start = [], 0
    for piece in pieces:
        inside = wanted[(wanted >= start) & (wanted < start + len(piece))] - start
        sample += piece["images"].take(inside).to_pylist()
        start += len(piece)
    return [[image["bytes"] for image in frame] for frame in sample]


def sample_picture(sample: list[list[bytes]]) -> Image.Image:
    """Frames side by side, one line a camera."""
    lines = []
    for files in zip(*sample, strict=True):
        frames = [Image.open(io.BytesIO(file)) for file in files]
        width = round(frames[0].width * _SAMPLE_HEIGHT / frames[0].height)
        lines.append([frame.resize((width, _SAMPLE_HEIGHT)) for frame in frames])
    picture = Image.new("RGB", (max(sum(f.width for f in line) for line in lines), _SAMPLE_HEIGHT * len(lines)))
    for row, line in enumerate(lines):
        for column, frame in enumerate(line):
            picture.paste(frame, (column * frame.width, row * _SAMPLE_HEIGHT))
    return picture


def _stats_table(config: VLAConfig) -> str:
    lines = ["| | min | 1 % | mean | 99 % | max | std |", "|---|---|---|---|---|---|---|"]
    action = "action − state" if config.relative_actions else "action"
    for name, stats in ((action, config.action_stats), ("state", config.state_stats)):
        if stats is not None:
            rows = zip(stats.min, stats.q01, stats.mean, stats.q99, stats.max, stats.std, strict=True)
            lines += [f"| {name}[{dim}] | {' | '.join(f'{x:.4g}' for x in row)} |" for dim, row in enumerate(rows)]
    return "\n".join(lines)


def push_dataset(directory: Path, repo_id: str, public: bool = False) -> None:
    """Upload a finished dataset folder; an existing repository gets a new commit and keeps its visibility."""
    api = HfApi()
    api.create_repo(repo_id, repo_type="dataset", private=not public, exist_ok=True)
    api.upload_folder(repo_id=repo_id, repo_type="dataset", folder_path=directory)
    print(f"uploaded: https://huggingface.co/datasets/{repo_id}")
