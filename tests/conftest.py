"""Small real things that tests share: a dataset of a dot that walks to the centre, processors, a nano backbone."""

import logging
import os
import shutil
import signal
import tempfile
from pathlib import Path

from support.backbones import QWEN, SMOLVLM, TINY
from support.episodes import DotSource

# Before anything imports them: no test reaches the Hub, or leaves files in the user's cache.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="vla0_trl-datasets-")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from support.general import shared_path

from vla0_trl.actions import NormStats
from vla0_trl.config import VLAConfig
from vla0_trl.data.convert import convert
from vla0_trl.models.loading import load_processor
from vla0_trl.models.nano import NanoConfig, build_nano

# Tiny models on all cores mostly wait for their threads, the more the busier the machine is.
torch.set_num_threads(1)
# What a shell starts in the background ignores Ctrl-C, and hands that on to every process of these tests.
signal.signal(signal.SIGINT, signal.default_int_handler)
# It misses a kernel that no test needs, and would say so behind pytest's summary.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def pytest_configure(config: pytest.Config) -> None:
    # Our own decoding and forward pass must not give way unnoticed, which would also make tests of them say little.
    config.addinivalue_line("filterwarnings", "error::vla0_trl.internals.FallbackWarning")


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
    from support.lerobot_files import Library  # needs the extra [convert]

    return Library(tmp_path_factory.mktemp("lerobot"))


@pytest.fixture
def v2(tmp_path, written) -> Path:
    """A LeRobotDataset v2.1 of images, to change."""
    return Path(shutil.copytree(written("v2.1", None), tmp_path / "v2"))


@pytest.fixture
def v3(tmp_path, written) -> Path:
    """A LeRobotDataset v3.0 of images, to change."""
    return Path(shutil.copytree(written("v3.0", None), tmp_path / "v3"))
