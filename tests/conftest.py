"""Small real things that tests share: a dataset of a dot that walks to the centre, processors, a nano backbone."""

import logging
import os
import signal
import tempfile

# Before anything imports them: no test reaches the Hub, or leaves files in the user's cache.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="vla0_trl-datasets-")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pytest
import torch
from helpers import shared_path

from vla0_trl.actions import NormStats
from vla0_trl.config import VLAConfig
from vla0_trl.conversion.convert import convert
from vla0_trl.episodes import Episode, SourceInfo
from vla0_trl.modeling import load_processor
from vla0_trl.nano import NanoConfig, build_nano

# Tiny models on all cores mostly wait for their threads, the more the busier the machine is.
torch.set_num_threads(1)
# What a shell starts in the background ignores Ctrl-C, and hands that on to every process of these tests.
signal.signal(signal.SIGINT, signal.default_int_handler)
# It misses a kernel that no test needs, and would say so behind pytest's summary.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

TASK = "Move the dot to the centre."
TINY = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "vision_hidden_size": 64, "vision_layers": 1}
TINY |= {"image_size": 48, "patch_size": 12}
SMOLVLM, QWEN = "SmolVLM2-500M-Video-Instruct", "Qwen2.5-VL-3B-Instruct"


class DotSource:
    """Episodes of a white dot on a 48 px image that walks to the centre: state = position, action = next position."""

    def __init__(self, num_episodes: int = 6, steps: int = 10):
        self.num_episodes, self.steps = num_episodes, steps
        self.info = SourceInfo("dots", "1", "apache-2.0", "dot", 10.0, "Computed.", {"steps": steps})

    def __len__(self) -> int:
        return self.num_episodes

    def task(self, index: int) -> str:
        return TASK

    def episode(self, index: int) -> Episode:
        start = np.random.default_rng(index).uniform(4, 44, 2)
        path = np.linspace(start, [24, 24], self.steps + 1).astype(np.float32)
        frames = np.zeros((self.steps, 48, 48, 3), np.uint8)
        for frame, (x, y) in zip(frames, path.astype(int), strict=False):
            frame[y - 2 : y + 3, x - 2 : x + 3] = 255
        return Episode(TASK, path[1:], {"image": frames}, path[:-1], f"dots, episode {index}")


@pytest.fixture(scope="session")
def dot_config() -> VLAConfig:
    """How the dots are converted."""
    return VLAConfig(
        action_dim=2, state_dim=2, chunk_size=4, image_size=48, use_state=True, relative_actions=True, num_bins=511
    )


@pytest.fixture(scope="session")
def dot_dataset(dot_config, tmp_path_factory) -> str:
    """A chat dataset on disk."""
    return str(convert(DotSource(), dot_config, tmp_path_factory.mktemp("data") / "dots"))


@pytest.fixture(scope="session")
def tiny_nano(tmp_path_factory) -> str:
    """A saved nano backbone of 0.2 M parameters."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model, processor = build_nano(NanoConfig(**TINY))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def example_config() -> VLAConfig:
    """A config with statistics, in which integers are easy to read: bin k is the value k."""
    stats = NormStats([0.0, 0.0], [511.0, 511.0], [0.0, 0.0], [511.0, 511.0], [0.0, 0.0], [1.0, 1.0], 9)
    return VLAConfig(
        action_dim=2, state_dim=2, chunk_size=3, use_state=True, image_size=48, action_stats=stats, state_stats=stats
    )


@pytest.fixture(params=["nano", SMOLVLM, QWEN])
def backbone(request, example_config, tiny_nano):
    """(name, processor, config) of the nano backbone and of the two real ones."""
    if request.param == "nano":
        return "nano", load_processor(tiny_nano, example_config), example_config
    config = example_config.replace(image_size=224 if request.param == QWEN else 512)
    return request.param, load_processor(shared_path(f"data/models/{request.param}"), config), config


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """LeRobotDatasets by version and codec, each written once."""
    from lerobot_fixtures import Library  # needs the extra [convert]

    return Library(tmp_path_factory.mktemp("lerobot"))
