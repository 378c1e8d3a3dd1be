"""The dataset card, its sample picture, and the upload to the Hub."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import yaml
from huggingface_hub import HfApi
from PIL import Image

from vla0_trl import __version__
from vla0_trl.actions import NormStats
from vla0_trl.config import CONFIG_NAME, VLAConfig
from vla0_trl.episodes import SourceInfo

SAMPLE_NAME = "sample.png"
_SAMPLE_FRAMES = 6
_SAMPLE_HEIGHT = 192  # px, of one frame in the picture

_CARD = """\
# {title}

{frames} frames of {episodes} episodes at {fps:g} Hz, as chat rows for training vision-language-action models that
answer in plain text ([VLA-0](https://arxiv.org/abs/2510.13054)); made with vla0_trl {version}.

![{sample_frames} frames of one episode, in order]({sample})

## How it was made

{how}

| | |
|---|---|
| source | {source} |
| revision | `{revision}` |
| licence | {license} |
| robot | {robot} |
| cameras | {cameras} |
| action text | {chunk_size} steps × {action_dim} dimensions, integers 0…{num_bins}, {normalization}, {kind} |
| episodes left out | {rejected} |

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
    sample: dict[str, list[bytes]],
    config: VLAConfig,
    info: SourceInfo,
    episodes: int,
    frames: int,
    rejected: list[int],
    command: str,
) -> None:
    """Write README.md and the sample picture.

    Args:
        sample (`dict[str, list[bytes]]`): camera -> the image files to show.
        episodes, frames (`int`): in the dataset.
        command (`str`): how the conversion was called.
    """
    sample_picture(sample, config.cameras).save(directory / SAMPLE_NAME)
    # No `configs` here: load_dataset finds data/train-* by itself, and with `configs` its cache would know a local
    # folder by its name alone: another folder of that name, or one converted again, would give the old rows.
    header = {
        "license": info.license,
        "task_categories": ["robotics"],
        "tags": ["vla0_trl", "VLA", "robotics", "imitation-learning", "trl"],
    }
    card = _CARD.format(
        title=f"{info.source} as chat",
        frames=frames,
        episodes=episodes,
        fps=config.fps,
        version=__version__,
        sample_frames=_SAMPLE_FRAMES,
        sample=SAMPLE_NAME,
        how=info.how,
        source=info.source,
        revision=info.revision,
        license=info.license,
        robot=info.robot,
        cameras=", ".join(config.cameras),
        chunk_size=config.chunk_size,
        action_dim=config.action_dim,
        num_bins=config.num_bins,
        normalization=config.normalization,
        kind="relative to the state" if config.relative_actions else "absolute",
        rejected=f"{len(rejected)} ({', '.join(map(str, rejected))})" if rejected else 0,
        command=command or "vla0_trl.conversion.convert(…)",
        stats=_stats_table(config),
        config_name=CONFIG_NAME,
    )
    front_matter = yaml.safe_dump(header, sort_keys=False)
    (directory / "README.md").write_text(f"---\n{front_matter}---\n\n{card}")


def sampled_frames(pieces: Iterable[dict[str, list[bytes]]], frames: int) -> dict[str, list[bytes]]:
    """Evenly spaced frames of an episode's `frames`, which come piece by piece: camera -> image files."""
    wanted = np.linspace(0, frames - 1, _SAMPLE_FRAMES).astype(int)
    sample: dict[str, list[bytes]] = {}
    start = 0
    for piece in pieces:
        for camera, encoded in piece.items():
            inside = wanted[(wanted >= start) & (wanted < start + len(encoded))]
            sample.setdefault(camera, []).extend(encoded[position - start] for position in inside)
        start += len(encoded)
    return sample


def sample_picture(sample: dict[str, list[bytes]], cameras: list[str]) -> Image.Image:
    """Frames side by side, one line a camera."""
    lines = []
    for camera in cameras:
        chosen = [Image.open(io.BytesIO(frame)) for frame in sample[camera]]
        width = round(chosen[0].width * _SAMPLE_HEIGHT / chosen[0].height)
        lines.append([frame.convert("RGB").resize((width, _SAMPLE_HEIGHT)) for frame in chosen])
    picture = Image.new("RGB", (max(sum(f.width for f in line) for line in lines), _SAMPLE_HEIGHT * len(lines)))
    for row, line in enumerate(lines):
        for column, frame in enumerate(line):
            picture.paste(frame, (column * frame.width, row * _SAMPLE_HEIGHT))
    return picture


def _stats_table(config: VLAConfig) -> str:
    lines = ["| | min | 1 % | mean | 99 % | max | std |", "|---|---|---|---|---|---|---|"]
    action = "action − state" if config.relative_actions else "action"
    for name, stats in ((action, config.action_stats), ("state", config.state_stats)):
        lines += _stats_lines(name, stats) if stats else []
    return "\n".join(lines)


def _stats_lines(name: str, stats: NormStats) -> list[str]:
    columns = zip(stats.min, stats.q01, stats.mean, stats.q99, stats.max, stats.std, strict=True)
    return [f"| {name}[{dim}] | " + " | ".join(f"{x:.4g}" for x in row) + " |" for dim, row in enumerate(columns)]


def push_dataset(directory: Path, repo_id: str, public: bool = False) -> None:
    """Upload a finished dataset folder; an existing repository gets a new commit and keeps its visibility."""
    api = HfApi()
    api.create_repo(repo_id, repo_type="dataset", private=not public, exist_ok=True)
    api.upload_folder(repo_id=repo_id, repo_type="dataset", folder_path=directory)
    print(f"uploaded: https://huggingface.co/datasets/{repo_id}")
