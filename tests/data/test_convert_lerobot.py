"""LeRobotDatasets -> chat dataset."""

from __future__ import annotations

import fnmatch
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
from datasets import Image as ImageFeature
from datasets import List, load_dataset
from support.general import REPOSITORY, contents, load_script
from support.lerobot_files import (
    LENGTHS,
    Written,
    check_rows,
    frame_of,
    number_in,
    png,
)
from support.runs import run_main

from vla0_trl.config import VLAConfig
from vla0_trl.data.chat_dataset import load_chat_dataset
from vla0_trl.data.sources import lerobot_hub, video

ALL = range(len(LENGTHS))


@pytest.fixture(scope="module")
def script():
    return load_script("data_prep/convert_lerobot.py")


FORMATS = [("v2.1", None), ("v2.1", "h264"), ("v2.1", "libsvtav1"), ("v3.0", None), ("v3.0", "h264")]
FORMATS += [("v3.0", "libsvtav1")]


@pytest.mark.parametrize(("version", "codec"), FORMATS)
def test_every_frame_is_in_its_place(tmp_path, script, written, monkeypatch, version, codec):
    run_main(script, monkeypatch, "--source", written(version, codec), "--output_dir", tmp_path / "out")
    rows, config = load_chat_dataset(tmp_path / "out")
    check_rows(rows)
    assert (config.cameras, config.fps, config.robot) == (["top", "wrist"], 30, "so100")
    assert (config.action_dim, config.state_dim, config.use_state, config.relative_actions) == (2, 3, True, False)
    assert (config.chunk_size, config.num_bins, config.gripper) == (8, 511, None)
    raw = rows.cast_column("images", List(ImageFeature(decode=False)))
    if codec is None:  # untouched
        assert raw[5]["images"][1]["bytes"] == png(frame_of(1, 0, 1))
    else:
        assert raw[5]["images"][1]["bytes"].startswith(b"\xff\xd8")


@pytest.mark.parametrize("codec", ["h264", "libsvtav1"])
def test_pixels_are_those_of_a_decoder_that_counts_frames(tmp_path, script, written, monkeypatch, codec):
    root = written("v3.0", codec)
    flags = ["--image_format", "png", "--cameras", "wrist"]
    run_main(script, monkeypatch, "--source", root, "--output_dir", tmp_path / "out", *flags)
    decoded = []
    for path in sorted(root.glob("videos/observation.images.wrist/**/*.mp4")):
        with av.open(path) as container:
            decoded += [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    rows = load_dataset(str(tmp_path / "out"), split="train")
    assert len(rows) == len(decoded) == sum(LENGTHS)
    assert all(np.array_equal(row["images"][0], pixels) for row, pixels in zip(rows, decoded, strict=True))


def test_fixtures_are_as_awkward_as_real_files(written):
    with av.open(next(written("v3.0", "h264").glob("videos/*top/*/file-000.mp4"))) as container:
        assert min(packet.dts for packet in container.demux(video=0) if packet.dts is not None) < 0
    with av.open(next(written("v3.0", "libsvtav1").glob("videos/*top/*/file-000.mp4"))) as container:
        assert container.streams.video[0].codec_context.name == "libdav1d"


def test_colours_survive(tmp_path, script, written, monkeypatch):
    run_main(script, monkeypatch, "--source", written(), "--episodes", "2:3", "--output_dir", tmp_path / "out")
    image = load_dataset(str(tmp_path / "out"), split="train")[1]["images"][0]
    assert np.abs(np.asarray(image).astype(int) - frame_of(2, 1, 0)).mean() < 6
    assert image.layers == 3
    assert {layer[1:3] for layer in image.layer} == {(1, 1)}  # no colour is subsampled


def test_each_file_is_opened_once_and_each_frame_decoded_once(tmp_path, script, written, monkeypatch):
    opened, decoded = Counter(), Counter()
    really_open, really_decode = video.VideoReader._open, video.VideoReader._decode

    def count_open(reader):
        opened[reader.path] += 1
        really_open(reader)

    def count_decode(reader):
        for frame in really_decode(reader):
            decoded[reader.path] += 1
            yield frame

    monkeypatch.setattr(video.VideoReader, "_open", count_open)
    monkeypatch.setattr(video.VideoReader, "_decode", count_decode)
    run_main(script, monkeypatch, "--source", written(), "--output_dir", tmp_path / "out")
    assert set(opened.values()) == {1}
    assert len(opened) == 3 + 4
    assert sum(decoded.values()) == 2 * sum(LENGTHS)


@pytest.mark.parametrize("margin", [0.05, -0.3], ids=["seek", "an index that leads too far"])
@pytest.mark.parametrize("codec", ["h264", "libsvtav1"])
def test_seeking_over_what_is_not_wanted_is_exact(tmp_path, script, written, monkeypatch, codec, margin):
    monkeypatch.setattr(video, "_SEEK_AHEAD", 0.1)
    monkeypatch.setattr(video, "_SEEK_MARGIN", margin)
    flags = ["--source", written("v3.0", codec), "--output_dir", tmp_path / "out", "--tasks", "1"]
    run_main(script, monkeypatch, *flags)
    rows = load_dataset(str(tmp_path / "out"), split="train")
    check_rows(rows, episodes=[1, 3, 5])


@pytest.mark.slow
def test_processes_make_no_difference(tmp_path, written):
    command = [sys.executable, str(REPOSITORY / "data_prep/convert_lerobot.py"), "--source", str(written())]
    for num_proc in ("1", "2"):
        flags = ["--output_dir", str(tmp_path / num_proc), "--num_proc", num_proc]
        subprocess.run([*command, *flags], check=True, timeout=120, capture_output=True)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


@pytest.mark.slow
def test_killed_conversion_continues(tmp_path, script, monkeypatch, capsys):
    root = Written(tmp_path / "long", lengths=(200,) * 12).write()
    output_dir = tmp_path / "out"
    command = [sys.executable, script.__file__, "--source", str(root), "--output_dir", str(output_dir)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list((tmp_path / "out.partial/episodes").glob("*.parquet"))) < 2:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    assert not output_dir.exists()
    run_main(script, monkeypatch, *command[2:])
    read_now = int(capsys.readouterr().out.split("rejected; ")[1].split(" of ")[0])
    assert 0 < read_now <= 10
    run_main(script, monkeypatch, "--source", root, "--output_dir", tmp_path / "whole")
    assert contents(output_dir) == contents(tmp_path / "whole")


def test_long_episodes_go_through_in_pieces(tmp_path, script, monkeypatch):
    """Three pieces: none is lost or repeated where one ends."""
    root = Written(tmp_path / "long", version="v2.1", lengths=(230, 9)).write()
    run_main(script, monkeypatch, "--source", root, "--output_dir", tmp_path / "out")
    rows = load_dataset(str(tmp_path / "out"), split="train")
    assert [number_in(row["images"][1]) for row in rows] == [(0, i, 1) for i in range(230)] + [
        (1, i, 1) for i in range(9)
    ]
    actions = np.array(rows["raw_action"]).reshape(-1, 8, 2)
    assert np.array_equal(actions[99:102, 1], actions[100:103, 0])


# -- which episodes, which features


@pytest.mark.parametrize(
    ("flags", "episodes"),
    [
        (["--episodes", "2:4"], [2, 3]),
        (["--tasks", "the DRAWER"], [1, 3, 5]),
        (["--tasks", "0", "--episodes", "1:5"], [2, 4]),
        (["--tasks", "0,1", "--episodes", ":2"], [0, 1]),
    ],
)
def test_filters(tmp_path, script, written, monkeypatch, flags, episodes):
    run_main(script, monkeypatch, "--source", written("v3.0", None), "--output_dir", tmp_path / "out", *flags)
    check_rows(load_dataset(str(tmp_path / "out"), split="train"), episodes)
    card = (tmp_path / "out/README.md").read_text()
    assert all(f"{flag} {shlex.quote(value)}" in card for flag, value in zip(flags[::2], flags[1::2], strict=True))


def test_few_shot(tmp_path, script, written, monkeypatch):
    drawn = set()
    for seed in range(5):
        out = tmp_path / str(seed)
        flags = ["--max_episodes_per_task", "1", "--seed", seed, "--output_dir", out]
        run_main(script, monkeypatch, "--source", written("v2.1", None), *flags)
        episodes = sorted(set(load_dataset(str(out), split="train")["episode_index"]))
        assert sorted(episode % 2 for episode in episodes) == [0, 1]
        drawn.add(tuple(episodes))
    assert len(drawn) > 1


def test_cameras_are_chosen_and_ordered(tmp_path, script, written, monkeypatch):
    flags = ["--source", written(), "--episodes", "1:3", "--no-use_state"]
    run_main(script, monkeypatch, *flags, "--cameras", "wrist,top", "--output_dir", tmp_path / "out")
    rows, config = load_chat_dataset(tmp_path / "out")
    assert (config.cameras, config.gripper, config.use_state) == (["wrist", "top"], None, False)
    check_rows(rows, [1, 2], cameras=(1, 0))


def test_names_of_openpi(tmp_path, script, monkeypatch):
    names = ("image", "wrist_image", "state", "actions")
    root = Written(tmp_path / "libero", "v2.1", None, names=names).write()
    run_main(script, monkeypatch, "--source", root, "--output_dir", tmp_path / "out")
    rows, config = load_chat_dataset(tmp_path / "out")
    assert config.cameras == ["image", "wrist_image"]
    assert (config.state_names, config.action_names) == (["pan", "lift", "grip"], None)
    check_rows(rows)


def test_keys_may_be_given(tmp_path, script, monkeypatch):
    names = ("left.rgb", "right.rgb", "joints", "targets")
    root = Written(tmp_path / "odd", codec=None, names=names).write()
    flags = ["--source", root, "--output_dir", tmp_path / "out"]
    with pytest.raises(SystemExit, match=r"has no action: say which of .*'targets'.* with --action_key"):
        run_main(script, monkeypatch, *flags)
    with pytest.raises(SystemExit, match=r"--state_key: .*/meta/info.json has no feature 'nope'"):
        run_main(script, monkeypatch, *flags, "--action_key", "targets", "--state_key", "nope")
    with pytest.raises(SystemExit, match=r"--image_keys: 'joints' is float32, not image or video"):
        run_main(script, monkeypatch, *flags, "--action_key", "targets", "--image_keys", "joints")
    run_main(script, monkeypatch, *flags, "--action_key", "targets", "--image_keys", "right.rgb")
    config = VLAConfig.from_pretrained(tmp_path / "out")
    assert (config.cameras, config.state_dim, config.use_state) == (["right.rgb"], 0, False)


def test_statistics_are_our_own(tmp_path, script, written, monkeypatch):
    run_main(script, monkeypatch, "--source", written("v3.0", None), "--output_dir", tmp_path / "out")
    config = VLAConfig.from_pretrained(tmp_path / "out")
    states = np.concatenate([Written(Path()).vectors(episode)[0] for episode in range(len(LENGTHS))])
    assert config.state_stats.max == states.max(0).tolist()
    assert np.allclose(config.state_stats.q01, np.quantile(states, 0.01, axis=0, method="inverted_cdf"), atol=1e-3)


# -- the Hub, faked at huggingface_hub.snapshot_download


@pytest.fixture
def hub(tmp_path, written, monkeypatch):
    """lerobot/test on a Hub that is a folder; gives the calls."""
    calls = []
    commit = "0123456789abcdef" * 2 + "01234567"
    snapshot = tmp_path / "cache" / commit

    def snapshot_download(repo_id, *, repo_type, revision, allow_patterns, dry_run=False):
        if dry_run:
            return []
        calls.append((repo_id, repo_type, revision, allow_patterns))
        root = written()
        for path in root.rglob("*"):
            name = str(path.relative_to(root))
            if path.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, snapshot / name)
        (snapshot / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# A dataset\n")
        return str(snapshot)

    monkeypatch.setattr(lerobot_hub, "snapshot_download", snapshot_download)
    return calls, commit, snapshot


def test_only_what_is_needed_is_fetched(tmp_path, script, monkeypatch, hub):
    calls, commit, snapshot = hub
    flags = ["--source", "lerobot/test", "--revision", "v3.0", "--episodes", "4:6", "--cameras", "wrist"]
    run_main(script, monkeypatch, *flags, "--output_dir", tmp_path / "out")
    check_rows(load_dataset(str(tmp_path / "out"), split="train"), [4, 5], cameras=[1])
    assert [call[:3] for call in calls] == [("lerobot/test", "dataset", "v3.0"), ("lerobot/test", "dataset", commit)]
    fetched = [str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file()]
    assert sorted(name for name in fetched if not name.startswith("meta/")) == [
        "README.md",
        "data/chunk-000/file-001.parquet",
        "videos/observation.images.wrist/chunk-000/file-002.mp4",
    ]
    config = VLAConfig.from_pretrained(tmp_path / "out")
    assert (config.source, config.source_revision) == ("lerobot/test", commit)
    assert "license: cc-by-4.0" in (tmp_path / "out/README.md").read_text()


def test_all_episodes_are_fetched_by_a_few_patterns(tmp_path, script, monkeypatch, hub):
    calls, _, _ = hub
    run_main(script, monkeypatch, "--source", "lerobot/test", "--output_dir", tmp_path / "out")
    videos = [f"videos/observation.images.{name}/chunk-*/file-*.mp4" for name in ("top", "wrist")]
    assert calls[1][3] == ["data/chunk-*/file-*.parquet", *videos]
    check_rows(load_dataset(str(tmp_path / "out"), split="train"))


def test_no_such_dataset(tmp_path, script, monkeypatch):
    def snapshot_download(*args, **kwargs):
        raise lerobot_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(lerobot_hub, "snapshot_download", snapshot_download)
    with pytest.raises(SystemExit, match="error: no folder 'me/none' here, and the Hub's dataset of that name can't"):
        run_main(script, monkeypatch, "--source", "me/none", "--output_dir", tmp_path / "out")
