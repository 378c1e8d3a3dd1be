"""What the fields and columns of a LeRobotDataset may be, and what is said of those that are something else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from support.lerobot_files import (
    LENGTHS,
    TASKS,
    Written,
    check_episodes,
    edit_info,
    edit_lines,
    replace_column,
    rewrite,
    source,
)

from vla0_trl.data.episodes import EpisodeError
from vla0_trl.data.sources.lerobot_meta import read_meta
from vla0_trl.data.staging import ConversionError

TOP, WRIST = "observation.images.top", "observation.images.wrist"
DATA_2 = "data/chunk-000/episode_000001.parquet"
EPISODES_3, EPISODES_2, TASKS_2 = "meta/episodes/chunk-000/file-000.parquet", "meta/episodes.jsonl", "meta/tasks.jsonl"


FIELDS = {
    "fps null": ({"fps": None}, "info.json: fps is null, wanted a number above 0"),
    "fps text": ({"fps": "30"}, "info.json: fps is '30', wanted a number above 0"),
    "fps zero": ({"fps": 0}, "info.json: fps is 0, wanted a number above 0"),
    "features": ({"features": []}, r"info.json: features is \[\], wanted an object with a feature or more"),
    "feature": ({"features": {"action": None}}, "info.json: features: action: found null, wanted an object"),
    "dtype": ({"features": {"action": {"shape": [2]}}}, "features: action: dtype is absent, wanted text"),
    "shape": (
        {"features": {"action": {"dtype": "float32", "shape": ["x"]}}},
        r"action: shape is \['x'\], wanted a list",
    ),
    "path": (
        {"data_path": "data/{chunk_index}"},
        "data_path is 'data/{chunk_index}', wanted a path with {episode_index}",
    ),
    "path null": ({"data_path": None}, "info.json: data_path is null, wanted a line of text"),
    "chunks_size": ({"chunks_size": "many"}, "info.json: chunks_size is 'many', wanted a whole number"),
}


@pytest.mark.parametrize(("changes", "message"), FIELDS.values(), ids=FIELDS)
def test_a_wrong_field_is_one_line_with_file_field_found_and_wanted(v2, changes, message):
    edit_info(v2, **changes)
    with pytest.raises(ConversionError, match=message):
        read_meta(v2)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            EPISODES_2,
            lambda line: line.pop("length"),
            "episodes.jsonl, line 2: length is absent, wanted a whole number",
        ),
        (EPISODES_2, lambda line: line.update(episode_index=None), "line 2: episode_index is null, wanted a whole"),
        (EPISODES_2, lambda line: line.update(length=3.5), "line 2: length is 3.5, wanted a whole number"),
        (TASKS_2, lambda line: line.update(task=7), "tasks.jsonl, line 2: task is 7, wanted text"),
        (TASKS_2, lambda line: line.pop("task_index"), "tasks.jsonl, line 2: task_index is absent"),
        ("meta/episodes_stats.jsonl", lambda line: line.update(stats=[1]), "line 2: stats is .1., wanted an object"),
    ],
)
def test_a_wrong_line_is_named(v2, name, change, message):
    edit_lines(v2 / name, change)
    with pytest.raises(ConversionError, match=message):
        read_meta(v2)


def test_a_wrong_row_of_v3_is_named(v3):
    rewrite(v3 / EPISODES_3, lambda t: replace_column(t, "length", pa.array([5, None, 4], pa.int64())))
    with pytest.raises(ConversionError, match=r"file-000.parquet, row 1: length is null, wanted a whole number"):
        read_meta(v3)
    rewrite(v3 / EPISODES_3, lambda t: t.drop_columns(["data/file_index"]))
    with pytest.raises(ConversionError, match="row 0: data/file_index is absent"):
        read_meta(v3)


def test_fields_may_be_null_absent_or_floats(v2):
    edit_info(v2, fps=30.0, chunks_size=None, robot_type=None, video_path=None)
    edit_lines(v2 / EPISODES_2, lambda line: line.update(length=33.0, episode_index=1.0))
    edit_lines(v2 / "meta/episodes_stats.jsonl", lambda line: line.update(stats=None))
    edit_lines(v2 / "meta/episodes_stats.jsonl", lambda line: line["stats"].update(action={"min": None}), 2)
    info = json.loads((v2 / "meta/info.json").read_text())
    info["features"]["action"]["shape"] = 2
    for feature in info["features"].values():
        feature.update(info=None)
    edit_info(v2, features=info["features"])
    check_episodes(source(v2))
    assert source(v2).info.robot == "unknown"


def test_json_lines_end_with_line_feeds_alone(v2):
    text = "pick up\u2028the \u0085 red\x0bcube"
    lines = [{"task_index": 0, "task": text}, {"task_index": 1, "task": TASKS[1]}]
    (v2 / TASKS_2).write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    assert read_meta(v2).tasks[0] == text


# -- vectors


@pytest.mark.parametrize("value", [pa.float16(), pa.float32(), pa.float64()])
@pytest.mark.parametrize("kind", ["list", "large_list", "fixed", "list_view", "tensor", "rows of one"])
def test_every_kind_of_vector_is_read(v3, kind, value):
    kinds = {
        "list": pa.list_(value),
        "large_list": pa.large_list(value),
        "fixed": pa.list_(value, 2),
        "list_view": pa.list_(value),
        "tensor": pa.fixed_shape_tensor(value, [2]),
        "rows of one": pa.list_(pa.list_(value)),
    }

    def change(table: pa.Table) -> pa.Table:
        values = np.array(table["action"].to_pylist()).astype(value.to_pandas_dtype())
        flat = pa.array(values.ravel(), value)
        if kind in ("fixed", "tensor"):
            column = pa.FixedSizeListArray.from_arrays(flat, 2)
            if kind == "tensor":
                column = pa.ExtensionArray.from_storage(kinds[kind], column)
        else:
            kind_of = pa.LargeListArray if kind == "large_list" else pa.ListArray
            column = kind_of.from_arrays(np.arange(len(values) + 1) * 2, flat)
            if kind == "rows of one":
                column = pa.ListArray.from_arrays(np.arange(len(values) + 1), column)
        return replace_column(table, "action", column)

    for path in v3.glob("data/*/*.parquet"):
        rewrite(path, change)
    reader = source(v3, check_stats=False)
    for index in range(len(LENGTHS)):
        expected = Written(Path()).vectors(index)[1].astype(value.to_pandas_dtype()).astype(np.float32)
        assert np.array_equal(reader.episode(index).actions, expected)


@pytest.mark.parametrize(
    ("values", "kind", "found"),
    [
        ([[0.0, 1.0]] * 32 + [None], pa.list_(pa.float32()), "2 values in a row of type list<.*>, 1 of them null"),
        ([[0.0, 1.0]] * 32 + [[0.0, None]], pa.list_(pa.float32()), "2 values .*, 1 of them null"),
        ([[0.0, 1.0]] * 32 + [[0.0]], pa.list_(pa.float32()), "1 or 2 values in a row"),
        (["a"] * 33, pa.string(), "1 values in a row of type string"),
        ([[["a", "b"]]] * 33, pa.list_(pa.list_(pa.string())), "2 values in a row of type list<.*list<.*string"),
    ],
)
def test_a_vector_that_is_none_is_one_line(v2, values, kind, found):
    rewrite(v2 / DATA_2, lambda t: replace_column(t, "action", pa.array(values, kind)))
    with pytest.raises(EpisodeError, match=f"episode 1: .*: action has {found}.*meta/info.json wants 2 numbers"):
        source(v2).episode(1)


# -- cameras

DEPTH = [
    {"info": {"is_depth_map": True}},
    {"info": {"video.is_depth_map": True}},
    {"video_info": {"is_depth_map": True}},
    {"video_info": {"video.is_depth_map": True}},
]


@pytest.mark.parametrize("spelling", DEPTH, ids=str)
def test_depth_maps_are_no_cameras_unless_they_are_named(v2, spelling):
    features = json.loads((v2 / "meta/info.json").read_text())["features"]
    features[WRIST].update(spelling)
    edit_info(v2, features=features)
    assert source(v2).cameras == {"top": TOP}
    assert source(v2, image_keys=[WRIST]).cameras == {"wrist": WRIST}


def test_an_image_column_of_another_type_is_one_line(v2):
    rewrite(v2 / DATA_2, lambda t: replace_column(t, TOP, pa.array(["x.png"] * 33)))
    with pytest.raises(EpisodeError, match=f"{TOP} is string, wanted struct<bytes"):
        list(source(v2).episode(1).images["top"])


# -- joints of an arm


def test_units_of_joints_are_said_and_checked(v2):
    """Degrees and −100…100 both convert; numbers that can't be what was said are refused, and so is a mix."""
    rewrite(v2 / DATA_2, lambda table: replace_column(table, "action", pa.array([[0.0, 101.0]] * len(table))))
    options = {"check_stats": False, "trust_timestamps": True}
    degrees, normalized = (source(v2, units=units, **options) for units in ("degrees", "normalized"))
    assert [source(v2, **options).info.units, degrees.info.units, normalized.info.units] == [
        *("as in the source", "degrees", "normalized")
    ]
    assert degrees.episode(1).actions.max() == 101 and len(normalized.episode(0).actions) == LENGTHS[0]
    with pytest.raises(EpisodeError, match="episode 1: action reaches 101, which no joint in normalized does"):
        normalized.episode(1)


@pytest.mark.parametrize("names", [["pan", "gripper"], ["gripper", "pan"], None])
def test_a_mix_of_units_in_one_recording_is_refused(v2, names):
    """One episode ends at exactly 100, as only −100…100 does, another goes on, as only degrees do."""
    for path, largest in ((DATA_2, [0.0, 100.0]), (DATA_2.replace("000001", "000000"), [100.0, 120.0])):
        rewrite(v2 / path, lambda t, v=largest: replace_column(t, "action", pa.array([v] * len(t))))
    features = json.loads((v2 / "meta/info.json").read_text())["features"]
    edit_info(v2, features=features | {"action": features["action"] | {"names": names}})
    arm = source(v2, units="degrees", check_stats=False, trust_timestamps=True)
    arm.refuse_mixed_units([1])
    source(v2, check_stats=False, trust_timestamps=True).refuse_mixed_units([0, 1])
    if names == ["gripper", "pan"]:
        mix = r"episode 0: action goes beyond 100, .* episode 1: action ends at exactly 100, .* a mix of units"
        with pytest.raises(ConversionError, match=mix):
            arm.refuse_mixed_units([0, 1])
    else:  # the second joint is a gripper, whose 100 means nothing
        arm.refuse_mixed_units([0, 1])
