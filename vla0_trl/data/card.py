"""The dataset card, its sample picture, and the upload to the Hub."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
from huggingface_hub import DatasetCard, DatasetCardData, HfApi
from PIL import Image

from vla0_trl import __version__
from vla0_trl.actions import NormStats
from vla0_trl.config import CONFIG_NAME, VLAConfig
from vla0_trl.data.episodes import SourceInfo
from vla0_trl.templating import render

SAMPLE_NAME = "sample.png"
_TAGS = ("vla0_trl", "VLA", "robotics", "imitation-learning", "trl")
_SAMPLE_FRAMES = 6
_SAMPLE_HEIGHT = 192  # px, of one frame in the picture


def write_card(
    directory: Path,
    sample: list[list[bytes]],
    config: VLAConfig,
    info: SourceInfo,
    episodes: int,
    frames: int,
    left_out: list[int],
    clipped: list[str],
    command: str,
) -> None:
    """Write README.md and the sample picture.

    Args:
        sample (`list[list[bytes]]`): image files of all cameras, frame by frame.
        episodes, frames (`int`): in the dataset.
        clipped (`list[str]`): which values the text does not reach.
        command (`str`): how the conversion was called.
    """
    sample_picture(sample).save(directory / SAMPLE_NAME)
    # No `configs` in the header: load_dataset finds data/train-* by itself, and with `configs` its cache would know a
    # local folder by its name alone: another folder of that name, or one converted again, would give the old rows.
    header = DatasetCardData(license=info.license, task_categories=["robotics"], tags=list(_TAGS))
    action = "action − state" if config.relative_actions else "action"
    body = render(
        "card.md",
        frames=frames,
        episodes=episodes,
        version=__version__,
        sample_frames=_SAMPLE_FRAMES,
        sample=SAMPLE_NAME,
        info=info,
        config=config,
        left_out=left_out,
        clipped=clipped,
        command=command or "vla0_trl.data.convert(…)",
        statistics=[(action, _per_dimension(config.action_stats)), ("state", _per_dimension(config.state_stats))],
        config_name=CONFIG_NAME,
    )
    DatasetCard(f"---\n{header.to_yaml()}\n---\n\n{body}").save(directory / "README.md")


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
    """Frames side by side, one line per camera."""
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


def _per_dimension(stats: NormStats | None) -> list[tuple[float, ...]]:
    """Least value, 1 % quantile, mean, 99 % quantile, largest value and standard deviation of each dimension."""
    if stats is None:
        return []
    return list(zip(stats.min, stats.q01, stats.mean, stats.q99, stats.max, stats.std, strict=True))


def push_dataset(directory: Path, repo_id: str, public: bool = False) -> None:
    """Upload a finished dataset folder; an existing repository gets a new commit and keeps its visibility."""
    api = HfApi()
    api.create_repo(repo_id, repo_type="dataset", private=not public, exist_ok=True)
    api.upload_folder(repo_id=repo_id, repo_type="dataset", folder_path=directory)
    print(f"uploaded: https://huggingface.co/datasets/{repo_id}")
