"""Files from outside that are wrong: one line for each mistake, with file, field, what was found and wanted."""

import json
from pathlib import Path

import numpy as np
import pytest

from vla0_trl.config import VLAConfig
from vla0_trl.data.chat_dataset import check_loadable
from vla0_trl.data.sources.lerobot_meta import LeRobotMeta
from vla0_trl.data.sources.lerobot_schema import filled
from vla0_trl.data.staging import ConversionError
from vla0_trl.evaluation.report.summary import load_runs
from vla0_trl.policy.policy import resolve_device
from vla0_trl.stats import NormStats

STATS = NormStats.from_array(np.array([[0.0, 0.0], [1.0, 1.0]]))

# -- vla_config.json: field -> a value that it can't have, and what is said of it
CONFIG = [
    ("cameras", "image", "cameras is 'image', wanted a list of 1 to 16 values"),
    ("cameras", [], "cameras is [], wanted a list of 1 to 16 values"),
    ("cameras", [1], "cameras is [1], wanted a list of 1 to 16 values, each a line of text"),
    ("cameras", [["a"]], "each a line of text"),
    ("cameras", ["a\nb"], "each a line of text"),
    ("cameras", [""], "each a line of text"),
    ("cameras", ["a"] * 10_000, "wanted a list of 1 to 16 values"),
    ("cameras", {"a": 1}, "wanted a list"),
    ("cameras", None, "cameras is null"),
    ("action_dim", 0, "action_dim is 0, wanted a whole number from 1 to 4096"),
    ("action_dim", 10**9, "from 1 to 4096"),
    ("action_dim", "2", "action_dim is '2'"),
    ("action_dim", 3, "action_stats has 2 dimensions, action_dim=3"),
    ("state_dim", -1, "state_dim is -1, wanted a whole number from 0 to 4096"),
    ("state_dim", 2.5, "state_dim is 2.5"),
    ("chunk_size", 10**9, "chunk_size is 1000000000, wanted a whole number from 1 to 1000"),
    ("chunk_size", "8", "chunk_size is '8'"),
    ("chunk_size", True, "chunk_size is True"),
    ("chunk_size", [8], "chunk_size is [8]"),
    ("waypoints", "all", "waypoints is 'all', wanted a list"),
    ("waypoints", [0, "7"], "each a whole number"),
    ("waypoints", [0, 10**9], "must be increasing steps from 0 to 7"),
    ("n_action_steps", 0, "n_action_steps is 0"),
    ("n_action_steps", "3", "n_action_steps is '3'"),
    ("n_action_steps", 9, "more than chunk_size=8"),
    ("ensemble_size", "4", "ensemble_size is '4'"),
    ("ensemble_size", 10**12, "ensemble_size is 1000000000000"),
    ("ensemble_decay", "fast", "ensemble_decay is 'fast', wanted a number"),
    ("temperature", "warm", "temperature is 'warm', wanted a number from 0 to 100"),
    ("temperature", None, "temperature is null, wanted a number from 0 to 100"),
    ("temperature", -0.1, "temperature is -0.1, wanted a number from 0 to 100"),
    ("temperature", float("nan"), "temperature is nan, wanted a number from 0 to 100"),
    ("temperature", 1e300, "temperature is 1e+300, wanted a number from 0 to 100"),
    ("waypoints", [7, 0], "must be increasing steps from 0 to 7"),
    ("waypoints", [0, 3], "must be increasing steps from 0 to 7"),
    ("waypoints", [0, 7.5], "each a whole number"),
    ("ensemble_weights", 3, "ensemble_weights is 3"),
    ("image_size", 10**6, "image_size is 1000000, wanted a whole number from 1 to 2048"),
    ("image_size", [512, 512], "image_size is [512, 512]"),
    ("image_size", 51.5, "image_size is 51.5"),
    ("crop_ratio", 0, "crop_ratio is 0, wanted a number above 0, at most 1"),
    ("crop_ratio", "0.9", "crop_ratio is '0.9'"),
    ("crop_ratio", 1.5, "crop_ratio is 1.5"),
    ("image_jitter", 0.2, "image_jitter is 0.2, wanted a list of 4 values"),
    ("image_jitter", [0.2], "wanted a list of 4 values"),
    ("image_jitter", [0.2, 0.2, 0.2, "x"], "each a number from 0"),
    ("image_jitter", [0.2, 0.2, 0.2, -1], "each a number from 0"),
    ("tile_images", "false", "tile_images is 'false', wanted true or false"),
    ("use_state", 1, "use_state is 1, wanted true or false"),
    ("relative_actions", None, "relative_actions is null, wanted true or false"),
    ("use_system_prompt", "no", "wanted true or false"),
    ("num_bins", 10**9, "num_bins is 1000000000, wanted a whole number from 1 to 65535"),
    ("num_bins", 10**400, "num_bins is 1000"),
    ("num_bins", -1, "num_bins is -1"),
    ("num_bins", "511", "num_bins is '511'"),
    ("normalization", 3, "normalization=3 must be min_max, quantile or [low, high]"),
    ("normalization", ["0", "1"], "finite numbers"),
    ("normalization", [0, 1, 2], "finite numbers"),
    ("gripper", True, "gripper is True"),
    ("gripper", "open", "gripper='open' must be 'sign'"),
    ("fps", "10", "fps is '10', wanted a number above 0"),
    ("fps", 0, "fps is 0"),
    ("fps", float("nan"), "fps is nan"),
    ("fps", float("inf"), "fps is inf"),
    ("base_model", "a\nb", "wanted a line of text"),
    ("base_model", 5, "base_model is 5, wanted a line of text"),
    ("base_model", "a\nb", "base_model is 'a\\nb', wanted a line of text"),
    ("source", {"a": 1}, "source is {'a': 1}, wanted text"),
    ("robot", ["arm"], "robot is ['arm']"),
    ("action_stats", [1, 2], "action_stats is [1, 2], wanted an object"),
    ("action_stats", {}, "action_stats: statistics: min is absent"),
    ("action_stats", STATS.__dict__ | {"min": 0}, "min is 0, wanted a list with a number for each dimension"),
    ("action_stats", STATS.__dict__ | {"min": ["0", "0"]}, "min of dimension 0 is 0, not a finite number"),
    ("action_stats", STATS.__dict__ | {"min": [5.0, 0.0]}, "dimension 0 runs from 5 down to 1: min is above max"),
    ("action_stats", STATS.__dict__ | {"q99": [1e300, 1.0]}, "to 1e+300, too wide for a float32"),
    ("action_stats", STATS.__dict__ | {"q01": [5.0, 0.0]}, "q01 is above q99"),
    ("action_stats", STATS.__dict__ | {"std": [1.0]}, "std has 1 dimensions, min has 2"),
    ("action_stats", STATS.__dict__ | {"count": "many"}, "count is 'many', wanted a whole number"),
    ("action_stats", STATS.__dict__ | {"q01": [[0.0], [0.0]]}, "q01 of dimension 0 is [0.0]"),
    ("chunk_sise", 8, "unknown fields ['chunk_sise']"),
]
# -- what is not JSON object at all
TEXTS = [
    (b"", "is not JSON"),
    (b'{"chunk_size": ', "is not JSON"),
    (b"\xff\xfe\x00", "is not JSON"),
    (b"[1, 2]", "found [1, 2], wanted an object with fields"),
    (b"null", "found null, wanted an object with fields"),
    (b'{"a":' * 100_000, "is nested too deep"),
    (b'{"num_bins": ' + b"1" * 10_000 + b"}", "is not JSON"),
]


@pytest.fixture
def config_file(tmp_path) -> Path:
    VLAConfig(state_dim=2, action_stats=STATS, state_stats=STATS).save_pretrained(tmp_path)
    return tmp_path / "vla_config.json"


@pytest.mark.parametrize(("field", "value", "message"), CONFIG, ids=lambda value: repr(value)[:30])
def test_a_config_with_a_wrong_field(config_file, field, value, message):
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {field: value}))
    with pytest.raises(ValueError) as error:
        VLAConfig.from_pretrained(config_file.parent)
    lines = str(error.value).split("\n")
    assert all(line.startswith(f"{config_file}: ") for line in lines)
    assert any(message in line for line in lines)


@pytest.mark.parametrize(("data", "message"), TEXTS, ids=range(len(TEXTS)))
def test_a_config_that_is_no_record(config_file, data, message):
    config_file.write_bytes(data)
    with pytest.raises(ValueError) as error:
        VLAConfig.from_pretrained(config_file.parent)
    assert str(error.value).startswith(f"{config_file}: {message}") and "\n" not in str(error.value)


def test_every_wrong_field_has_a_line(config_file):
    wrong = {"num_bins": "many", "image_size": 0, "use_state": 1}
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | wrong))
    with pytest.raises(ValueError) as error:
        VLAConfig.from_pretrained(config_file.parent)
    found = {line.removeprefix(f"{config_file}: ").split()[0] for line in str(error.value).split("\n")}
    assert found == wrong.keys()


@pytest.mark.parametrize(
    "template",
    [
        "../{episode_index}.parquet",
        "/etc/{episode_index}.parquet",
        "data/../../{episode_index}.parquet",
        "data/{episode_index:0999999999d}.parquet",
        "data/{episode_index:999999999}.parquet",
        "data/{episode_index:{episode_index}d}.parquet",
        "data/{episode_index.__class__}.parquet",
        "data/{episode_index[0]}.parquet",
        "data/{episode_index!r:>99999999}.parquet",
        "data/{}.parquet",
        "data/{0}.parquet",
        "data/{episode.parquet",
        "data/\n{episode_index}.parquet",
        None,
        7,
    ],
    ids=repr,
)
def test_a_path_stays_inside_its_dataset(template):
    with pytest.raises(
        ConversionError, match=r"data_path is .*, wanted a path with {episode_index}, inside the dataset"
    ):
        filled("info.json", "data_path", template, episode_index=3)


def test_a_link_out_of_a_dataset_is_not_followed(tmp_path):
    """The Hub's cache links a snapshot's files to blobs beside the snapshots: these are the dataset's own."""
    root = tmp_path / "cache/snapshots/abc"
    for folder in (root, tmp_path / "cache/blobs"):
        folder.mkdir(parents=True)
    (tmp_path / "cache/blobs/1").touch()
    (tmp_path / "secret").touch()
    (root / "cached").symlink_to("../../blobs/1")
    (root / "out").symlink_to(tmp_path / "secret")
    meta = LeRobotMeta(root, {}, {}, "", [], "", "mit")
    assert meta.path("cached") == root / "cached"
    with pytest.raises(ConversionError, match=f"out leads to {tmp_path}/secret, outside the dataset"):
        meta.path("out")


@pytest.mark.parametrize("name", ["a[0]", "a]", "a::b", "a\nb", "a*", "a?"], ids=repr)
def test_a_folder_that_would_be_read_as_a_pattern_is_refused(name):
    with pytest.raises(ValueError, match="rename it"):
        check_loadable(f"data/{name}")


@pytest.mark.parametrize("device", ["", "gpu", "cuda:99", "cuda:x", "cpu cpu", "meta", "mps"])
def test_an_unknown_device_is_one_line(device):
    with pytest.raises(ValueError, match=f"--device .*{device}"):
        resolve_device(device)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "results.json: is not JSON"),
        ("[]", "wanted an object with fields"),
        ("{}", "success_rate is absent, wanted a number from 0 to 1"),
        ('{"success_rate": 1.5}', "success_rate is 1.5"),
        ('{"success_rate_interval": [0]}', "wanted a list of 2 values"),
        ('{"num_episodes": -1}', "num_episodes is -1, wanted a whole number"),
    ],
)
def test_damaged_results(tmp_path, text, message):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError) as error:
        load_runs([tmp_path])
    assert message in str(error.value)
