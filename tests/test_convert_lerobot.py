"""LeRobotDatasets -> chat dataset."""

from __future__ import annotations

import fnmatch
import json
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
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Image as ImageFeature
from datasets import List, load_dataset
from helpers import REPOSITORY, load_script
from lerobot_fixtures import (
    LENGTHS,
    TASKS,
    Written,
    cut,
    edit_info,
    first_video,
    frame_of,
    no_bytes,
    number_in,
    png,
    replace_column,
    rewrite,
    shifted_span,
    two_tasks,
    wide_actions,
    wrong_span,
)
from test_chat_dataset import contents
from test_data_prep import run_main

from vla0_trl.chat_dataset import load_chat_dataset
from vla0_trl.config import VLAConfig
from vla0_trl.sources import lerobot_hub, video

ALL = range(len(LENGTHS))


@pytest.fixture(scope="module")
def script():
    return load_script("data_prep/convert_lerobot.py")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Datasets, each written once: written(version, codec) -> folder that nobody may change."""
    made: dict[tuple, Path] = {}

    def get(version="v3.0", codec="h264") -> Path:
        if (version, codec) not in made:
            root = tmp_path_factory.mktemp("lerobot") / f"{version}-{codec}"
            made[version, codec] = Written(root, version, codec).write()
        return made[version, codec]

    return get


def check_rows(rows, episodes=ALL, cameras=(0, 1)) -> None:
    """Every frame, first to last of every episode, is where it belongs, and so are vectors and text."""
    expected = [(episode, frame) for episode in episodes for frame in range(LENGTHS[episode])]
    assert list(zip(rows["episode_index"], rows["frame_index"], strict=True)) == expected
    for row, (episode, frame) in zip(rows, expected, strict=True):
        assert [number_in(image) for image in row["images"]] == [(episode, frame, camera) for camera in cameras]
        states, actions = Written(Path()).vectors(episode)
        assert row["raw_state"] == states[frame].tolist()
        assert row["raw_action"][:2] == actions[frame].tolist()
        assert row["task"] == TASKS[episode % 2]


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


def test_processes_make_no_difference(tmp_path, written):
    command = [sys.executable, str(REPOSITORY / "data_prep/convert_lerobot.py"), "--source", str(written())]
    for num_proc in ("1", "2"):
        flags = ["--output_dir", str(tmp_path / num_proc), "--num_proc", num_proc]
        subprocess.run([*command, *flags], check=True, timeout=120, capture_output=True)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


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
    flags = ["--source", written(), "--episodes", "1:3", "--gripper", "sign", "--no-use_state"]
    run_main(script, monkeypatch, *flags, "--cameras", "wrist,top", "--output_dir", tmp_path / "out")
    rows, config = load_chat_dataset(tmp_path / "out")
    assert (config.cameras, config.gripper, config.use_state) == (["wrist", "top"], "sign", False)
    check_rows(rows, [1, 2], cameras=(1, 0))


def test_names_of_openpi(tmp_path, script, monkeypatch):
    names = ("image", "wrist_image", "state", "actions")
    root = Written(tmp_path / "libero", "v2.1", None, names=names).write()
    run_main(script, monkeypatch, "--source", root, "--output_dir", tmp_path / "out")
    rows, config = load_chat_dataset(tmp_path / "out")
    assert config.cameras == ["image", "wrist_image"]
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

    def snapshot_download(repo_id, *, repo_type, revision, allow_patterns):
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
        raise lerobot_hub.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(lerobot_hub, "snapshot_download", snapshot_download)
    with pytest.raises(SystemExit, match="error: no folder 'me/none' here, and the Hub's dataset of that name can't"):
        run_main(script, monkeypatch, "--source", "me/none", "--output_dir", tmp_path / "out")


# -- bad input: one clear error, or one skipped episode


TASKS_FILE, DATA = "meta/tasks.parquet", "data/chunk-000/file-000.parquet"
DATA_2, EPISODES = "data/chunk-000/episode_000001.parquet", "meta/episodes/chunk-000/file-000.parquet"
TOP = "observation.images.top"
# What is done to which dataset, with which flags, and what is said then.
BAD = {
    "version": (
        ("v3.0", None),
        lambda r: edit_info(r, codebase_version="v9.9"),
        "",
        "'v9.9' is unknown, this reads v2",
    ),
    "old version": (
        ("v2.1", None),
        lambda r: edit_info(r, codebase_version="v2.0"),
        "",
        "'v2.0' is unknown, this reads v2.1, v3.0: convert the dataset with LeRobot's own scripts",
    ),
    "no dataset": (
        ("v3.0", None),
        lambda r: shutil.rmtree(r / "meta"),
        "",
        "is no LeRobotDataset: it has no meta/info",
    ),
    "meta file": (
        ("v3.0", None),
        lambda r: (r / TASKS_FILE).unlink(),
        "",
        "meta/tasks.parquet is missing: the copy is",
    ),
    "half info": (
        ("v3.0", None),
        lambda r: cut(r / "meta/info.json", 0.5),
        "",
        "info.json is no JSON, fetch it again",
    ),
    "camera": (
        ("v3.0", None),
        lambda r: None,
        "--cameras top,left",
        "there is no 'left', the source has .'top', 'wri",
    ),
    "tasks": (
        ("v3.0", None),
        lambda r: None,
        "--tasks banana",
        r"choose by number .*\n  0 pick up the red cube\n  1 op",
    ),
    "revision": (("v3.0", None), lambda r: None, "--revision main", "is a folder, revisions are the Hub's"),
    "cut mp4": (
        ("v2.1", "h264"),
        lambda r: cut(r / f"videos/chunk-000/{TOP}/episode_000001.mp4", 0.7),
        "",
        r"h264, episode 1, camera 'top': .*episode_000001.mp4 does not decode at frame 0 of 33",
    ),
    "no mp4": (
        ("v3.0", "h264"),
        lambda r: first_video(r).unlink(),
        "",
        r"episode 0, camera 'top': .*file-000.mp4 does not decode .*: it is absent",
    ),
    "video short": (
        ("v2.1", "h264"),
        lambda r: shutil.copy(
            r / f"videos/chunk-000/{TOP}/episode_000004.mp4", r / f"videos/chunk-000/{TOP}/episode_000001.mp4"
        ),
        "",
        r"episode 1, camera 'top': .* has no frame at 0.2333 s for row 7 of 33, the video ends before it",
    ),
    "video long": (
        ("v2.1", "libsvtav1"),
        lambda r: shutil.copy(
            r / f"videos/chunk-000/{TOP}/episode_000003.mp4", r / f"videos/chunk-000/{TOP}/episode_000002.mp4"
        ),
        "",
        r"episode 2, camera 'top': .* goes on after the 4 frames of the parquet, with one at 0.1333 s",
    ),
    "span": (("v3.0", "h264"), lambda r: rewrite(r / EPISODES, wrong_span), "", r"which is 7.0 frames; .* has 5 rows"),
    "shift": (
        ("v3.0", "h264"),
        lambda r: rewrite(r / EPISODES, shifted_span),
        "",
        "next one is at 0.0333 s: it is cut",
    ),
    "rows": (
        ("v3.0", "h264"),
        lambda r: rewrite(r / DATA, lambda table: table.slice(0, len(table) - 2)),
        "",
        r"episode 3: .*file-000.parquet has 10 rows of it, meta/episodes says length 12",
    ),
    "no parquet": (
        ("v2.1", None),
        lambda r: (r / DATA_2).unlink(),
        "",
        "episode 1: .*000001.parquet can't be read, it",
    ),
    "cut parquet": (
        ("v2.1", None),
        lambda r: cut(r / DATA_2, 0.5),
        "",
        "episode 1: .*000001.parquet can't be read, it",
    ),
    "no column": (
        ("v3.0", None),
        lambda r: rewrite(r / DATA, lambda table: table.drop_columns([TOP])),
        "",
        f"episode 0, camera 'top': .* has no column '{TOP}'",
    ),
    "no timestamp": (
        ("v2.1", None),
        lambda r: rewrite(r / DATA_2, lambda table: table.drop_columns(["timestamp"])),
        "",
        "episode 1: .* has no column 'timestamp'",
    ),
    "no bytes": (
        ("v3.0", None),
        lambda r: rewrite(r / DATA, no_bytes),
        "",
        "frame 0: .* holds no image in observation",
    ),
    "no text": (
        ("v3.0", None),
        lambda r: rewrite(r / TASKS_FILE, lambda t: replace_column(t, "__index_level_0__", [[TASKS[0], " "]])),
        "",
        "episode 1: task_index 1 has no text in .*meta/tasks.parquet: write the instruction there",
    ),
    "two tasks": (("v3.0", None), lambda r: rewrite(r / DATA, two_tasks), "", r"has 2 tasks \(task_index .0, 1.\)"),
    "width": (
        ("v2.1", None),
        lambda r: rewrite(r / DATA_2, wide_actions),
        "",
        r"action has .'3'. dimensions and 0 empty",
    ),
}


@pytest.mark.parametrize(("dataset", "spoil", "flags", "message"), BAD.values(), ids=BAD)
def test_bad_input(tmp_path, script, written, monkeypatch, dataset, spoil, flags, message):
    root = shutil.copytree(written(*dataset), tmp_path / written(*dataset).name)
    spoil(root)
    with pytest.raises(SystemExit, match=f"(?s)^error: .*{message}"):
        run_main(script, monkeypatch, "--source", root, "--output_dir", tmp_path / "out", *flags.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("codec", ["h264", "libsvtav1"])
def test_faststart_mp4_that_breaks_off_spares_what_is_before(tmp_path, script, monkeypatch, capsys, codec):
    root = Written(tmp_path / "fast", codec=codec, options=("movflags=faststart",)).write()
    path = root / "videos/observation.images.top/chunk-000/file-001.mp4"  # episodes 3, 4, 5
    with av.open(path) as container:  # ends inside a frame of episode 5
        packet = list(container.demux(video=0))[LENGTHS[3] + LENGTHS[4] + 12]
    path.write_bytes(path.read_bytes()[: packet.pos + packet.size // 2])
    flags = ["--source", root, "--output_dir", tmp_path / "out"]
    message = (
        r"fast, episode 5, camera 'top': .*file-001.mp4 (has no frame at .* ends before it|does not decode at fr)"
    )
    with pytest.raises(SystemExit, match=message):
        run_main(script, monkeypatch, *flags)
    run_main(script, monkeypatch, *flags, "--skip_bad_episodes")
    printed = capsys.readouterr().out
    assert "6 episodes kept, 0 rejected; 2 of 7 read now" in printed
    assert "1 episodes skipped as bad:\n  fast, episode 5, camera 'top'" in printed
    check_rows(load_dataset(str(tmp_path / "out"), split="train"), [0, 1, 2, 3, 4, 6])
    record = json.loads((tmp_path / "out/conversion.json").read_text())
    assert list(record["skipped"]) == ["5"]
    assert "| episodes left out | 1 (5) |" in (tmp_path / "out/README.md").read_text()


def test_images_damaged_on_disk_spare_the_other_episodes(tmp_path, script, written, monkeypatch, capsys):
    """A page in the middle of a file of four episodes, each a row group."""
    root = shutil.copytree(written("v3.0", None), tmp_path / "data")
    columns = pq.read_metadata(root / DATA).row_group(1)
    names = [columns.column(at).path_in_schema for at in range(columns.num_columns)]
    start = columns.column(names.index(f"{TOP}.bytes")).data_page_offset
    data = bytearray((root / DATA).read_bytes())
    data[start : start + 400] = b"\xff" * 400
    (root / DATA).write_bytes(data)
    run_main(script, monkeypatch, "--source", root, "--output_dir", tmp_path / "out", "--skip_bad_episodes")
    assert "data, episode 1, camera 'top': " in capsys.readouterr().out
    check_rows(load_dataset(str(tmp_path / "out"), split="train"), [0, 2, 3, 4, 5, 6])


def test_skipped_episodes_come_back_without_the_flag(tmp_path, script, written, monkeypatch, capsys):
    root = shutil.copytree(written("v2.1", None), tmp_path / "data")
    whole = (root / DATA_2).read_bytes()
    cut(root / DATA_2, 0.5)
    flags = ["--source", root, "--output_dir", tmp_path / "out", "--normalization", "quantile"]
    for path in root.glob("data/*/*.parquet"):  # a dimension that never moves stops the conversion after its staging
        if path.name != Path(DATA_2).name:
            rewrite(path, lambda t: replace_column(t, "action", pa.array([[0.0, 0.0]] * len(t))))
    with pytest.raises(SystemExit, match="action: dimension 0 has zero range"):
        run_main(script, monkeypatch, *flags, "--skip_bad_episodes", "--ignore_stats")
    with pytest.raises(SystemExit, match=r"episode 1: .* can't be read"):
        run_main(script, monkeypatch, *flags, "--ignore_stats")
    (root / DATA_2).write_bytes(whole)
    flags[-1] = "-20,20"
    run_main(script, monkeypatch, *flags, "--ignore_stats")
    assert "7 episodes kept, 0 rejected; 1 of 7 read now" in capsys.readouterr().out


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_statistics_that_contradict_the_data(tmp_path, script, written, monkeypatch, version):
    root = shutil.copytree(written(version, None), tmp_path / "data")
    name = "meta/stats.json" if version == "v3.0" else "meta/episodes_stats.jsonl"
    lines = [json.loads(line) for line in (root / name).read_text().splitlines()]
    stats = lines[0]["stats"] if version == "v2.1" else lines[0]
    stats["action"]["max"][1] = -5.0
    (root / name).write_text("\n".join(json.dumps(line) for line in lines))
    flags = ["--source", root, "--output_dir", tmp_path / "out"]
    message = r"data, episode 0, frame \d: action\[1\] is .*, meta's statistics say .* to -5: .*--ignore_stats"
    with pytest.raises(SystemExit, match=message):
        run_main(script, monkeypatch, *flags)
    run_main(script, monkeypatch, *flags, "--ignore_stats")
    check_rows(load_dataset(str(tmp_path / "out"), split="train"))

    stats["action"] = {"min": [0.0], "max": [1.0]}
    (root / name).write_text("\n".join(json.dumps(line) for line in lines))
    with pytest.raises(SystemExit, match="statistics of action have 1 dimensions, the data 2"):
        run_main(script, monkeypatch, "--source", root, "--output_dir", tmp_path / "out2")


def test_no_pyav_says_how_to_install(tmp_path, script, written, monkeypatch):
    monkeypatch.setitem(sys.modules, "vla0_trl.sources.video", None)
    with pytest.raises(SystemExit, match=r'reading videos needs PyAV: pip install -e "\.\[convert\]"'):
        run_main(script, monkeypatch, "--source", written(), "--output_dir", tmp_path / "out")
