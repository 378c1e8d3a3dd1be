"""What a LeRobotDataset says in two places: the order of frames, their times, the tasks of episodes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from support.general import load_script
from support.lerobot_files import (
    FPS,
    LENGTHS,
    TASKS,
    check_episodes,
    edit_info,
    edit_lines,
    replace_column,
    rewrite,
    source,
)
from support.runs import run_main

from vla0_trl.data.convert import Selection
from vla0_trl.data.episodes import EpisodeError
from vla0_trl.data.sources.lerobot import LeRobotSource
from vla0_trl.data.sources.lerobot_meta import read_meta
from vla0_trl.data.staging import ConversionError

TOP = "observation.images.top"
DATA_3, DATA_2 = "data/chunk-000/file-000.parquet", "data/chunk-000/episode_000001.parquet"
EPISODES_3, EPISODES_2 = "meta/episodes/chunk-000/file-000.parquet", "meta/episodes.jsonl"
TASKS_3, TASKS_2 = "meta/tasks.parquet", "meta/tasks.jsonl"


# -- order


def test_rows_sorted_by_time_over_several_episodes(v3):
    for path in v3.glob("data/*/*.parquet"):
        rewrite(path, lambda t: t.take(np.argsort(t["frame_index"].to_numpy(), kind="stable")))
    check_episodes(source(v3))
    first = source(v3).episode(1)
    stored = pq.read_table(v3 / DATA_3)
    own = [row[TOP]["bytes"] for row in stored.to_pylist() if row["episode_index"] == 1]
    assert list(first.images["top"]) == own


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.take(np.arange(len(t))[::-1].copy()), "in the file 31 follows 32: sort its rows"),
        (lambda t: t.take(np.array([*range(len(t) - 1), 4])), "4 is there twice"),
        (lambda t: t.take(np.array([*range(len(t) - 1), 0])), "0 is there twice"),
        (lambda t: replace_column(t, "frame_index", pa.array(np.arange(33) + 3)), "0 is missing"),
        (lambda t: replace_column(t, "frame_index", pa.array(np.arange(33) + (np.arange(33) > 9))), "10 is missing"),
        (
            lambda t: replace_column(t, "frame_index", pa.array([None] * 33, pa.int64())),
            "frame_index is int64 with 33 n",
        ),
        (lambda t: replace_column(t, "frame_index", pa.array(np.arange(33) + 0.5)), "holds 0.5, wanted whole numbers"),
        (
            lambda t: replace_column(t, "task_index", pa.array(["a"] * 33)),
            "task_index is string .* wanted whole numbers",
        ),
        (lambda t: t.drop_columns(["frame_index"]), "has no column 'frame_index'"),
    ],
)
def test_frames_out_of_order_missing_or_twice_are_refused(v2, change, message):
    rewrite(v2 / DATA_2, change)
    with pytest.raises(EpisodeError, match=rf"v2, episode 1: .*episode_000001.parquet.*{message}"):
        source(v2).episode(1)
    source(v2).episode(2)


def test_index_columns_may_be_floats_and_lists_of_one(v2):
    rewrite(v2 / DATA_2, lambda t: replace_column(t, "frame_index", t["frame_index"].cast(pa.float64())))
    times = [[time] for time in pq.read_table(v2 / DATA_2)["timestamp"].to_pylist()]
    rewrite(v2 / DATA_2, lambda t: replace_column(t, "timestamp", pa.array(times, pa.list_(pa.float32(), 1))))
    check_episodes(source(v2))


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_an_episode_listed_twice_is_refused(request, version):
    root = request.getfixturevalue(version)
    if version == "v2":
        lines = (root / EPISODES_2).read_text()
        (root / EPISODES_2).write_text(lines + lines.split("\n")[4] + "\n")
    else:
        rewrite(root / EPISODES_3, lambda t: pa.concat_tables([t, t.slice(2, 1)]))
    with pytest.raises(ConversionError, match=rf"meta lists episode {4 if version == 'v2' else 2} twice"):
        read_meta(root)


def test_fewer_episodes_than_info_says_are_warned_about(v2):
    edit_info(v2, total_episodes=9)
    with pytest.warns(UserWarning, match="total_episodes is 9, meta lists 7 episodes"):
        read_meta(v2)


# -- times


def at(times: np.ndarray):
    return lambda t: replace_column(t, "timestamp", pa.array(times.astype(np.float32)))


@pytest.mark.parametrize("codec", [None, "h264"])
def test_timestamps_that_contradict_fps_are_refused_for_images_as_for_videos(tmp_path, written, codec):
    root = Path(shutil.copytree(written("v2.1", codec), tmp_path / "ten_hz"))
    rewrite(root / DATA_2, at(np.arange(33) / 10))
    message = (
        r"episode 1, frame 1: its timestamp is 0.1000 s after .* 30 fps of .* would be 0.0333 s: .*--trust_timest"
    )
    with pytest.raises(EpisodeError, match=message):
        source(root).episode(1)
    trusted = source(root, trust_timestamps=True).episode(1)
    if codec is None:
        assert len(list(trusted.images["top"])) == 33
    else:  # the video has other times still
        with pytest.raises(EpisodeError, match=r"has no frame at 0\.1000 s"):
            list(trusted.images["top"])


def test_timestamps_may_jitter_and_begin_anywhere(v2):
    jitter = np.random.default_rng(0).uniform(-0.2, 0.2, 33)
    jitter[0] = 0
    rewrite(v2 / DATA_2, at(5 + (np.arange(33) + jitter) / FPS))
    assert len(list(source(v2).episode(1).images["top"])) == 33
    rewrite(v2 / DATA_2, at(np.where(np.arange(33) == 7, np.nan, np.arange(33) / FPS)))
    with pytest.raises(EpisodeError, match="episode 1, frame 7: its timestamp is nan"):
        source(v2).episode(1)


# -- tasks

LISTED = {
    "absent": lambda line: line.pop("tasks"),
    "null": lambda line: line.update(tasks=None),
    "empty": lambda line: line.update(tasks=[]),
    "a string": lambda line: line.update(tasks=TASKS[1]),
    "numbers": lambda line: line.update(tasks=[1]),
    "another": lambda line: line.update(tasks=[TASKS[0]]),
}


@pytest.mark.filterwarnings("ignore:meta/episodes says")
@pytest.mark.parametrize("change", LISTED.values(), ids=LISTED)
def test_episodes_are_chosen_by_the_task_of_their_frames(v2, change):
    for line in range(1, len(LENGTHS), 2):
        edit_lines(v2 / EPISODES_2, change, line)
    check_episodes(source(v2))
    assert Selection(tasks=[TASKS[1]]).indices(source(v2)) == [1, 3, 5]
    few = Selection(max_episodes_per_task=1).indices(source(v2))
    assert sorted(index % 2 for index in few) == [0, 1]


def test_no_tasks_in_the_episodes_of_v3(v3):
    for path in v3.glob("meta/episodes/*/*.parquet"):
        rewrite(path, lambda t: t.drop_columns(["tasks"]))
    check_episodes(source(v3))


def test_a_listed_task_that_frames_contradict_is_warned_about(v2):
    edit_lines(v2 / EPISODES_2, LISTED["another"])
    with pytest.warns(UserWarning, match=f"meta/episodes says '{TASKS[0]}' where the frames say '{TASKS[1]}'"):
        source(v2).episode(1)


def test_an_episode_whose_task_cannot_be_read_is_bad_and_not_left_out(v2):
    rewrite(v2 / DATA_2, lambda t: replace_column(t, "task_index", pa.array(np.arange(33) % 2)))
    assert Selection(tasks=[TASKS[1]]).indices(source(v2)) == [1, 3, 5]
    assert Selection(tasks=[TASKS[0]]).indices(source(v2)) == [0, 1, 2, 4, 6]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_the_text_column_of_tasks_is_found_by_what_it_is(v3, kind):
    text = pa.array(TASKS).cast(kind)
    tables = [
        {"n": [5, 6], "task_index": [0, 1], "task": text, "comment": ["a", "b"]},
        {"success": [0.5, 1.0], "__index_level_0__": text, "task_index": [0, 1]},
        {"what": text, "task_index": [0, 1]},
    ]
    for columns in tables:
        pq.write_table(pa.table(columns), v3 / TASKS_3)
        assert read_meta(v3).tasks == dict(enumerate(TASKS))
    pq.write_table(pa.table({"task_index": [0, 1], "a": text, "b": text}), v3 / TASKS_3)
    with pytest.raises(ConversionError, match=r"tasks.parquet: the columns of text are \['a', 'b'\], wanted one"):
        read_meta(v3)


def test_a_task_index_with_two_texts_is_refused(v2):
    edit_lines(v2 / TASKS_2, lambda line: line.update(task_index=0))
    with pytest.raises(
        ConversionError, match=r"tasks\.jsonl: task_index 0 is both 'pick up the red cube' and 'open the"
    ):
        read_meta(v2)


def test_of_the_hub_an_episode_is_chosen_by_its_listed_task_and_refused_if_its_frames_have_another(v2):
    edit_lines(v2 / EPISODES_2, LISTED["another"])
    edit_lines(v2 / EPISODES_2, LISTED["null"], 2)
    hub = LeRobotSource(replace(read_meta(v2), hub_id="me/data"))
    assert [hub.listed_task(index) for index in range(3)] == [TASKS[0], TASKS[0], None]
    with pytest.warns(UserWarning, match="meta/episodes says"):
        hub.episode(1)
    assert Selection(tasks=[TASKS[0]]).indices(hub) == [0, 1, 2, 4, 6]  # 2 by its frames
    with pytest.raises(
        EpisodeError, match=f"frames' task is '{TASKS[1]}', meta/episodes, by which it was chosen, says"
    ):
        hub.episode(1)


# -- a subset


def test_num_episodes_are_drawn_from_all_that_is_left_whatever_their_tasks(v2):
    episodes = source(v2)
    drawn = [Selection(slice(1, None), seed=seed, num_episodes=3).indices(episodes) for seed in range(8)]
    assert drawn == [Selection(slice(1, None), seed=seed, num_episodes=3).indices(episodes) for seed in range(8)]
    assert all(len(set(indices)) == 3 and min(indices) >= 1 and indices == sorted(indices) for indices in drawn)
    assert len(set(map(tuple, drawn))) > 3
    assert len({sum(index % 2 for index in indices) for indices in drawn}) > 1
    with pytest.raises(ConversionError, match="--num_episodes 8: there are 7 to draw from"):
        Selection(num_episodes=8).indices(episodes)


def test_every_converter_takes_num_episodes(tmp_path, v2, monkeypatch):
    script = load_script("data_prep/convert_lerobot.py")
    run_main(script, monkeypatch, "--source", v2, "--num_episodes", "3", "--seed", "1", "--output_dir", tmp_path / "o")
    rows = load_dataset(str(tmp_path / "o"), split="train")
    assert sorted(set(rows["episode_index"])) == Selection(seed=1, num_episodes=3).indices(source(v2))
    assert "--num_episodes 3" in (tmp_path / "o/README.md").read_text()
    for name in ("convert_libero_hdf5", "convert_pusht_zarr"):
        arguments = load_script(f"data_prep/{name}.py").Arguments(source=[v2], output_dir=tmp_path, num_episodes=2)
        assert arguments.selection().num_episodes == 2
