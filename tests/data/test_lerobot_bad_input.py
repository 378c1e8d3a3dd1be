"""LeRobotDatasets that are damaged: one clear error, or one skipped episode."""

from __future__ import annotations

import json
import shutil
import sys

import av
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from support.general import load_script
from support.lerobot_files import (
    LENGTHS,
    TASKS,
    Written,
    check_rows,
    cut,
    edit_info,
    first_video,
    no_bytes,
    replace_column,
    rewrite,
    shifted_span,
    two_tasks,
    wide_actions,
    wrong_span,
)
from support.runs import run_main


@pytest.fixture(scope="module")
def script():
    return load_script("data_prep/convert_lerobot.py")


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
        "is not a LeRobotDataset: it has no meta/info",
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
        "info.json: is not JSON .*: correct it, or get the file again",
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
        r"action has 3 values in a row of type list.*meta/info.json wants 2 numbers",
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
    flags = ["--source", root, "--output_dir", tmp_path / "out", "--normalization", "-1,1"]
    with pytest.raises(SystemExit, match=r"action.0.: .* and clipped"):  # which stops the conversion after its staging
        run_main(script, monkeypatch, *flags, "--skip_bad_episodes", "--ignore_stats")
    with pytest.raises(SystemExit, match=r"episode 1: .* can't be read"):
        run_main(script, monkeypatch, *flags, "--ignore_stats")
    (root / DATA_2).write_bytes(whole)
    flags[-1] = "min_max"
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
    monkeypatch.setitem(sys.modules, "vla0_trl.data.sources.video", None)
    with pytest.raises(SystemExit, match=r'needs PyAV: pip install -c requirements.lock -e "\.\[convert\]"'):
        run_main(script, monkeypatch, "--source", written(), "--output_dir", tmp_path / "out")
