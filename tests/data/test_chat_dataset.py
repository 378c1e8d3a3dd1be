"""Conversion to a chat dataset on disk, and reading it back."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import Image, List, Value, load_dataset
from huggingface_hub import DatasetCard
from support.episodes import SmallSource, small_config, small_episode
from support.general import contents

from vla0_trl.actions import NormStats
from vla0_trl.config import VLAConfig
from vla0_trl.data import shards
from vla0_trl.data.chat_dataset import align_config, load_chat_dataset
from vla0_trl.data.convert import Selection, convert
from vla0_trl.data.episodes import EpisodeError, SourceInfo, action_windows
from vla0_trl.data.staging import ConversionError
from vla0_trl.run_folder import FolderError


@pytest.fixture(scope="module")
def small_dataset(tmp_path_factory) -> Path:
    return convert(SmallSource(), small_config(), tmp_path_factory.mktemp("small") / "dataset")


# -- the contract


def test_columns_types_and_order(small_dataset):
    dataset = load_dataset(str(small_dataset), split="train")
    messages, floats = List({"role": Value("string"), "content": Value("string")}), List(Value("float32"))
    assert dataset.features == {
        "images": List(Image()),
        **dict.fromkeys(("task", "state", "action"), Value("string")),
        **dict.fromkeys(("prompt", "completion"), messages),
        **dict.fromkeys(("episode_index", "frame_index"), Value("int64")),
        **dict.fromkeys(("raw_state", "raw_action"), floats),
    }
    assert dataset["episode_index"] == [i for i in range(5) for _ in range(5 + i)]
    assert dataset["frame_index"] == [frame for i in range(5) for frame in range(5 + i)]
    row, episode = dataset[8], small_episode(1, frames=6)
    assert (row["episode_index"], row["frame_index"], row["task"]) == (1, 3, "task 1")
    for camera, image in zip(("front", "wrist"), row["images"], strict=True):
        assert np.array_equal(np.asarray(image), episode.images[camera][3])
    assert row["raw_action"] == action_windows(episode.actions, 4)[3].ravel().tolist()
    assert row["raw_state"] == episode.states[3].tolist()


def test_config_has_exact_statistics_and_origin(small_dataset):
    config = VLAConfig.from_pretrained(small_dataset)
    episodes = [small_episode(i, frames=5 + i) for i in range(5)]
    windows = np.concatenate([action_windows(e.actions, 4).reshape(-1, 2) for e in episodes])
    assert config.action_stats.count == len(windows)
    assert config.action_stats.min == windows.min(0).tolist()
    assert np.allclose(config.action_stats.mean, windows.mean(0))
    assert config.state_stats.max == np.concatenate([e.states for e in episodes]).max(0).tolist()
    assert (config.source, config.source_revision, config.robot, config.fps) == ("small source", "1", "none", 10.0)


def test_card(tmp_path):
    output_dir = convert(
        SmallSource(rejected=(1, 3)),
        small_config(),
        tmp_path / "d",
        command="python x.py --y 1",
        recipe="recipes/z.py",
    )
    front_matter, card = (output_dir / "README.md").read_text().removeprefix("---\n").split("---\n\n", 1)
    header = yaml.safe_load(front_matter)
    assert header["license"] == "mit"
    assert header["size_categories"] == ["n<1K"] and header["source_datasets"] == ["original"]
    for text in (
        "python x.py --y 1",
        "21 frames of 3 episodes at 10 Hz",
        "2 (1, 3)",
        "| state[2] |",
        "Made up for",
        "launch recipes/z.py ",
    ):
        assert text in card
    rows = {"| camera | front, 20 × 16 px |", "| camera | wrist, 8 × 8 px |", "| task 0 | 3 |"}
    assert rows | {"| units | as in the source |"} <= {*card.splitlines()}
    assert (output_dir / "sample.png").read_bytes().startswith(b"\x89PNG")


def test_no_name_or_licence_adds_to_the_cards_header_or_leaves_its_table(tmp_path):
    class Evil(SmallSource):
        @property
        def info(self) -> SourceInfo:
            evil = "mit\nconfigs:\n- config_name: default\n---\n# | <b>own</b> |"
            return replace(super().info, license=evil, source=evil, robot=evil, revision=evil)

    card = DatasetCard.load(convert(Evil(), small_config(), tmp_path / "d") / "README.md")
    known = {"license", "task_categories", "tags", "pretty_name", "size_categories", "source_datasets"}
    assert card.data.to_dict().keys() == known
    assert card.data.license == Evil().info.license
    shown = r"mit configs: - config_name: default --- # \| &lt;b>own&lt;/b> \|"
    rows = {f"| {name} | {shown} |" for name in ("source", "robot", "licence")}
    assert rows | {f"# {shown} as chat"} <= {*card.text.splitlines()}


def test_several_shards_and_row_groups(tmp_path, small_dataset, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 30_000)
    monkeypatch.setattr(shards, "ROW_GROUP_ROWS", 4)
    output_dir = convert(SmallSource(), small_config(), tmp_path / "dataset")
    names = sorted(path.name for path in (output_dir / "data").iterdir())
    assert len(names) > 1
    assert names == [f"train-{i:05d}-of-{len(names):05d}.parquet" for i in range(len(names))]
    assert load_dataset(str(output_dir), split="train")[:] == load_dataset(str(small_dataset), split="train")[:]


@pytest.mark.slow
def test_processes_make_no_difference(tmp_path, small_dataset, capsys):
    output_dir = convert(SmallSource(), small_config(), tmp_path / "dataset", num_proc=2)
    assert contents(output_dir) == contents(small_dataset)
    printed = capsys.readouterr().out
    assert "5 episodes kept, 0 rejected; 5 of 5 read now" in printed
    assert f"inspect_dataset.py --dataset {output_dir}" in printed


def test_selection():
    source = SmallSource(count=10)
    assert Selection(slice(2, 5)).indices(source) == [2, 3, 4]
    two_each = Selection(max_episodes_per_task=2, seed=1).indices(source)
    assert two_each == sorted(two_each)
    assert sorted(index % 2 for index in two_each) == [0, 0, 1, 1]
    assert two_each == Selection(max_episodes_per_task=2, seed=1).indices(source)
    assert any(two_each != Selection(max_episodes_per_task=2, seed=s).indices(source) for s in range(2, 5))
    with pytest.raises(ConversionError, match="no episode is left of the 10"):
        Selection(slice(10, 20)).indices(source)


# -- what goes wrong


@pytest.mark.parametrize("num_proc", [1, 2])
def test_bad_episode_leaves_nothing_under_the_final_name(tmp_path, num_proc):
    broken = replace(small_episode(), actions=np.full((7, 2), np.nan), name="small source, episode 3")
    source = SmallSource(broken=broken, broken_index=3)
    with pytest.raises(EpisodeError, match=r"small source, episode 3, frame 0: action\[0\] is nan"):
        convert(source, small_config(), tmp_path / "dataset", num_proc=num_proc)
    assert not (tmp_path / "dataset").exists()


def test_another_image_size_in_one_episode(tmp_path):
    images = {name: frames[:, :, :8] for name, frames in small_episode().images.items()}
    source = SmallSource(broken=replace(small_episode(), images=images, name="small, 2"), broken_index=2)
    with pytest.raises(EpisodeError, match=r"small, 2: frames are .*'front': \(8, 16\).* first episode .*\(20, 16\)"):
        convert(source, small_config(), tmp_path / "dataset")
    assert not (tmp_path / "dataset").exists()


def test_all_rejected(tmp_path):
    with pytest.raises(ConversionError, match="all 2 episodes of small source were rejected"):
        convert(SmallSource(count=2, rejected=(0, 1)), small_config(), tmp_path / "dataset")


def test_finished_dataset_is_reused_or_left_alone(tmp_path, capsys):
    output_dir = convert(SmallSource(), small_config(), tmp_path / "dataset")
    before = {path: path.stat().st_mtime_ns for path in output_dir.rglob("*")}
    convert(SmallSource(), small_config(), output_dir)
    assert "already converted" in capsys.readouterr().out
    with pytest.raises(FolderError, match=r"config.num_bins: 511 there, 255 here.*--overwrite"):
        convert(SmallSource(), small_config(num_bins=255), output_dir)
    with pytest.raises(FolderError, match=r"staging.source.revision: 1 there, 2 here"):
        convert(SmallSource(revision="2"), small_config(), output_dir)
    broken = SmallSource(broken=replace(small_episode(), task=""), broken_index=0)
    with pytest.raises(EpisodeError, match="task is empty"):
        convert(broken, small_config(), output_dir, overwrite=True)
    assert {path: path.stat().st_mtime_ns for path in output_dir.rglob("*")} == before
    shutil.rmtree(tmp_path / "dataset.partial")

    convert(SmallSource(), small_config(num_bins=255), output_dir, overwrite=True)
    assert VLAConfig.from_pretrained(output_dir).num_bins == 255
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]


def test_a_folder_of_something_else_is_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(FolderError, match="is not a dataset made by data_prep"):
        convert(SmallSource(), small_config(), tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_rest_of_another_conversion(tmp_path):
    broken = SmallSource(broken=replace(small_episode(), task=""), broken_index=2)
    with pytest.raises(EpisodeError):
        convert(broken, small_config(), tmp_path / "dataset")
    with pytest.raises(FolderError, match=r"another unfinished run \(cameras: .*--overwrite to start again"):
        convert(SmallSource(), small_config(cameras=["wrist"]), tmp_path / "dataset")
    convert(SmallSource(), small_config(cameras=["wrist"]), tmp_path / "dataset", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]


# -- the Hub, and reading


def test_loading_never_gives_the_rows_of_another_dataset_of_that_name(tmp_path):
    for parent, count in (("a", 1), ("b", 2)):
        convert(SmallSource(count=count), small_config(), tmp_path / parent / "dataset")
        assert len(load_chat_dataset(tmp_path / parent / "dataset")[0]) == (5, 11)[count - 1]
    convert(SmallSource(count=3), small_config(), tmp_path / "a/dataset", overwrite=True)
    assert len(load_chat_dataset(tmp_path / "a/dataset")[0]) == 18


def test_load_needs_config_and_columns(tmp_path, small_dataset):
    dataset, config = load_chat_dataset(small_dataset)
    assert len(dataset) == 35
    assert config.cameras == ["front", "wrist"]
    with pytest.raises(FileNotFoundError, match=r"vla_config\.json"):
        load_chat_dataset(tmp_path)
    config.save_pretrained(tmp_path)
    (tmp_path / "data").mkdir()
    dataset.remove_columns(["raw_action", "task"]).to_parquet(tmp_path / "data/train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"columns \['raw_action', 'task'\] are missing"):
        load_chat_dataset(tmp_path)


def test_align_keeps_statistics_unless_they_change(small_dataset):
    dataset, config = load_chat_dataset(small_dataset)
    aligned = align_config(
        dataset, config, num_bins=1000, normalization="quantile", use_state=False, cameras=["wrist"], image_size=64
    )
    assert aligned.action_stats == config.action_stats
    assert (aligned.num_bins, aligned.normalization, aligned.cameras) == (1000, "quantile", ["wrist"])
    assert align_config(dataset, config) == config


@pytest.mark.parametrize("batch", [10_000, 8])
@pytest.mark.parametrize("changes", [{"relative_actions": True}, {"chunk_size": 2}])
def test_align_takes_the_statistics_that_a_conversion_would(tmp_path, small_dataset, monkeypatch, changes, batch):
    monkeypatch.setattr("vla0_trl.data.chat_dataset._STATS_BATCH", batch)
    dataset, config = load_chat_dataset(small_dataset)
    aligned = align_config(dataset, config, **changes)
    converted = VLAConfig.from_pretrained(convert(SmallSource(), small_config(**changes), tmp_path / "dataset"))
    assert aligned.replace(action_stats=None) == converted.replace(action_stats=None)
    for name in ("min", "max", "q01", "q99", "mean", "std"):
        assert np.allclose(getattr(aligned.action_stats, name), getattr(converted.action_stats, name))
    assert aligned.action_stats.count == converted.action_stats.count
    assert align_config(dataset, aligned, relative_actions=False, chunk_size=2).action_stats.count == 35 * 2


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"chunk_size": 8}, "chunk_size=8, but the dataset stores chunks of 4: convert it again with --chunk_size 8"),
        ({"cameras": ["wrist", "top"]}, r"cameras=\['wrist', 'top'\], but the dataset has \['front', 'wrist'\]"),
        ({"action_dim": 3}, "action_dim=3, but the dataset was recorded with action_dim=2"),
        ({"state_dim": 5}, "state_dim=5, but the dataset was recorded with state_dim=3"),
        ({"fps": 20.0}, "fps=20.0, but the dataset was recorded with fps=10.0"),
        ({"n_action_steps": 5}, "n_action_steps=5 is more than chunk_size=4"),
    ],
)
def test_align_names_what_the_data_cannot_give(small_dataset, asked, message):
    dataset, config = load_chat_dataset(small_dataset)
    with pytest.raises(ValueError, match=message):
        align_config(dataset, config, **asked)


def test_align_without_a_state(tmp_path):
    config = small_config(state_dim=0, use_state=False)
    dataset, config = load_chat_dataset(convert(SmallSource(), config, tmp_path / "dataset"))
    assert dataset[0]["raw_state"] == []
    assert align_config(dataset, config, chunk_size=1).action_stats == NormStats.from_array(
        np.array([row[:2] for row in dataset["raw_action"]], np.float32)
    )
    with pytest.raises(ValueError, match="relative_actions=True needs a state"):
        align_config(dataset, config, relative_actions=True)


def test_record_of_the_conversion(small_dataset):
    record = json.loads((small_dataset / "conversion.json").read_text())
    assert record["episodes"] == [0, 1, 2, 3, 4]
    assert record["staging"]["source"] == {"name": "small source", "revision": "1", "options": {}}
    assert record["rejected"] == []
