"""The dataset card and its sample picture."""

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
from huggingface_hub import DatasetCard, DatasetCardData
from PIL import Image

from vla0_trl import __version__
from vla0_trl.actions import NormStats
from vla0_trl.config import CONFIG_NAME, VLAConfig
from vla0_trl.data.episodes import SourceInfo
from vla0_trl.hub import is_hub_id
from vla0_trl.schema import one_line
from vla0_trl.templating import CARD, render

SAMPLE_NAME = "sample.png"
_TAGS = ("vla0_trl", "VLA", "robotics", "imitation-learning", "trl")
# The Hub's size categories: the first upper bound that a dataset's rows stay below.
_SIZES = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")]
_SAMPLE_FRAMES = 6
_SAMPLE_HEIGHT = 192  # px, of one frame in the picture


def write_card(
    directory: Path,
    sample: list[list[bytes]],
    config: VLAConfig,
    info: SourceInfo,
    tasks: dict[str, int],
    frames: int,
    left_out: list[int],
    clipped: list[str],
    command: str,
    recipe: str,
) -> None:
    """Write README.md and the sample picture.

    Args:
        sample (`list[list[bytes]]`): image files of all cameras, frame by frame.
        tasks (`dict[str, int]`): instruction -> episodes of it.
        clipped (`list[str]`): which values the text does not reach.
        command, recipe (`str`): what made the dataset, and what trains on it.
    """
    sample_picture(sample).save(directory / SAMPLE_NAME)
    # No `configs` in the header: load_dataset finds data/train-* by itself, and with `configs` its cache would know a
    # local folder by its name alone: another folder of that name, or one converted again, would give the old rows.
    header = DatasetCardData(
        license=info.license,
        task_categories=["robotics"],
        tags=list(_TAGS),
        pretty_name=f"{one_line(info.source)} as chat",
        size_categories=[next((name for bound, name in _SIZES if frames < bound), "n>10M")],
        source_datasets=[info.source] if is_hub_id(info.source) else ["original"],
    )
    action = "action − state" if config.relative_actions else "action"
    body = render(
        "card.md",
        frames=frames,
        episodes=sum(tasks.values()),
        tasks=dict(sorted(tasks.items())),
        cameras=[(name, *Image.open(io.BytesIO(f)).size) for name, f in zip(config.cameras, sample[0], strict=True)],
        recipe=recipe,
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
    DatasetCard.from_template(header, template_str=CARD, body=body).save(directory / "README.md")


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
