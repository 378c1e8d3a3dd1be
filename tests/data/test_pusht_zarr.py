"""Zarrs of PushT demonstrations that are damaged, not complete, or none."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from support.general import PUSHT_ZARR, load_script, shared_path, short_words
from support.runs import run_main

from vla0_trl.data.episodes import EpisodeError
from vla0_trl.data.staging import ConversionError


@pytest.fixture(scope="module")
def script():
    return load_script("data_prep/convert_pusht_zarr.py")


@pytest.fixture
def small(tmp_path) -> Path:
    """Two episodes of three frames, in chunks of four."""
    path = tmp_path / "small.zarr"
    vectors = np.arange(1, 13, dtype=np.float32).reshape(6, 2)
    frames = np.full((6, 8, 8, 3), 7, np.float32)
    group = zarr.create_group(path)
    for name, values in (("img", frames), ("state", np.hstack([vectors, vectors])), ("action", vectors)):
        group.create_array(f"data/{name}", data=values, chunks=(4, *values.shape[1:]))
    group.create_array("meta/episode_ends", data=np.array([3, 6]))
    return path


def test_a_whole_one_is_read(small, script):
    source = script.PushTZarr(small, "agent")
    assert [len(list(source.episode(index).images["image"])) for index in range(2)] == [3, 3]
    assert source.episode(1).actions.tolist() == [[7, 8], [9, 10], [11, 12]]


@pytest.mark.parametrize("array", ["data/img", "data/state", "data/action", "meta/episode_ends"])
def test_absent_chunks_are_no_black_frames_and_no_zeros(small, script, array):
    chunks = sorted(path for path in (small / array / "c").rglob("*") if path.is_file())
    chunks[-1].unlink()
    with pytest.raises(
        ConversionError, match=rf"small.zarr: {array} has \d of its \d chunks, absent ones would read as"
    ):
        script.PushTZarr(small, "agent")


def test_an_absent_chunk_of_the_human_demonstrations(tmp_path, script):
    path = Path(shutil.copytree(shared_path(PUSHT_ZARR), tmp_path / "human.zarr"))
    next(file for file in sorted((path / "data/img").iterdir()) if file.name[0].isdigit()).unlink()
    with pytest.raises(ConversionError, match=r"human\.zarr: data/img has 159 of its 160 chunks"):
        script.PushTZarr(path, "agent")


def test_damaged_chunks_are_one_line(small, script):
    for array, error in (("data/img", EpisodeError), ("data/action", ConversionError)):
        chunk = next(path for path in (small / array / "c").rglob("*") if path.is_file())
        chunk.write_bytes(chunk.read_bytes()[:10])
        with pytest.raises(error, match="damaged, fetch it again"):
            list(script.PushTZarr(small, "agent").episode(0).images["image"])


def test_lengths_that_contradict_episode_ends(small, script):
    zarr.open_group(small)["meta/episode_ends"][:] = [3, 5]
    with pytest.raises(ConversionError, match=r"have \[6\] frames, meta/episode_ends says \[5\]"):
        script.PushTZarr(small, "agent")


def test_a_damaged_frame(tmp_path, small, script, monkeypatch):
    zarr.open_group(small)["data/img"][4, 2, 2, 1] = np.nan
    with pytest.raises(SystemExit, match=r"error: small\.zarr, episode 1, frame 1: img holds values"):
        run_main(script, monkeypatch, "--source", small, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_none(tmp_path, small, script, monkeypatch):
    with pytest.raises(SystemExit, match="not a zarr of PushT demonstrations"):
        run_main(script, monkeypatch, "--source", tmp_path, "--output_dir", tmp_path / "out")
    shutil.rmtree(small / "data/action")
    with pytest.raises(ConversionError, match=r"small\.zarr has no array data/action"):
        script.PushTZarr(small, "agent")


def test_no_zarr_says_how_to_install(small, script, monkeypatch):
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(ConversionError, match=r'pip install -c requirements.lock -e "\.\[convert\]"'):
        script.PushTZarr(small, "agent")


VECTORS = np.arange(1, 13, dtype=np.float32).reshape(6, 2)
ARRAYS = {
    "data/img": np.full((6, 8, 8, 3), 7, np.float32),
    "data/state": np.hstack([VECTORS, VECTORS]),
    "data/action": VECTORS,
    "meta/episode_ends": np.array([3, 6]),
}
ZARRS = [
    ("data/img", None, "has no array data/img"),
    ("data/img", "group", "has no array data/img"),
    ("data/img", ARRAYS["data/img"][:, 0], "data/img is float32 of shape (6, 8, 3), wanted numbers in 4 dimensions"),
    ("data/img", np.full((6, 8, 8, 3), "x"), "data/img is <U1"),
    ("data/img", ARRAYS["data/img"][:5], "have [5, 6] frames"),
    ("data/img", {"shape": (6, 60_000, 60_000, 3), "chunks": (1, 100, 100, 3)}, "has 0 of its 2160000 chunks"),
    ("data/img", {"shape": (6, 60_000, 60_000, 3), "chunks": (1, 60_000, 60_000, 3)}, "at most 256 MiB are read"),
    ("data/state", VECTORS[:, :1], "data/state has 1 values per frame, wanted 2"),
    ("data/state", VECTORS[:, 0], "wanted numbers in 2 dimensions"),
    ("data/state", VECTORS.astype(complex), "data/state is complex128"),
    ("data/action", VECTORS[:, :1], "data/action has 1 values per frame, wanted 2"),
    ("data/action", {"shape": (10**12, 2), "chunks": (1000, 2)}, "at most 1000000 long"),
    ("data/action", {"shape": (10**6, 200), "chunks": (10**6, 200)}, "at most 256 MiB are read"),
    ("meta/episode_ends", None, "has no array meta/episode_ends"),
    ("meta/episode_ends", np.array([3, 7]), "meta/episode_ends says [7]"),
    ("meta/episode_ends", np.array([3, 5]), "meta/episode_ends says [5]"),
    ("meta/episode_ends", np.array([6, 3]), "meta/episode_ends says [3]"),
    ("meta/episode_ends", np.array([3, 2, 6]), "fetch it again"),
    ("meta/episode_ends", np.array([3, 3, 6]), "fetch it again"),
    ("meta/episode_ends", np.array([-1, 6]), "fetch it again"),
    ("meta/episode_ends", np.array([0, 6]), "fetch it again"),
    ("meta/episode_ends", np.array([3.0, 6.0]), "wanted whole numbers in 1 dimensions"),
    ("meta/episode_ends", np.array([[3, 6]]), "wanted whole numbers in 1 dimensions"),
]


@pytest.mark.parametrize(("key", "value", "message"), ZARRS, ids=short_words)
def test_a_zarr_that_can_not_be_read(small, script, key, value, message):
    group = zarr.open_group(small)
    del group[key]
    if isinstance(value, dict):
        group.create_array(key, dtype="f4", **value)
    elif isinstance(value, str):
        group.create_group(key)
    elif value is not None:
        group.create_array(key, data=value)
    with pytest.raises(ConversionError) as error:
        script.PushTZarr(small, "agent")
    assert message in str(error.value) and "small.zarr" in str(error.value) and "\n" not in str(error.value)


METADATA = [
    "{",
    "[]",
    "3",
    "{}",
    '{"zarr_format": 3}',
    json.dumps({"zarr_format": 3, "node_type": "array"}),
    "\0",
    "[" * 50_000,
]


@pytest.mark.parametrize("text", METADATA, ids=lambda text: text[:30])
def test_damaged_metadata_of_a_zarr(small, script, text):
    (small / "data/img/zarr.json").write_text(text)
    with pytest.raises(ConversionError, match=r"small\.zarr"):
        script.PushTZarr(small, "agent")


def test_a_zarr_does_not_read_outside_of_itself(small, script):
    chunk = next(path for path in (small / "data/img/c").rglob("*") if path.is_file())
    chunk.unlink()
    chunk.symlink_to("/etc/passwd")
    with pytest.raises(ConversionError, match="leads to /etc/passwd, outside the zarr"):
        script.PushTZarr(small, "agent")
