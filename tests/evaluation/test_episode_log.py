"""Intervals, the episode log and everything that can happen to it, videos, tables."""

import json
import signal
import subprocess
import sys

import imageio.v3 as iio
import numpy as np
import pytest
from support.episodes import RUN, small_result

from vla0_trl import run_folder
from vla0_trl.evaluation import episode_log as results
from vla0_trl.evaluation import metrics
from vla0_trl.evaluation.episode_log import EpisodeLog, read_episodes, video_name
from vla0_trl.evaluation.metrics import aggregate, wilson_interval
from vla0_trl.models.fingerprint import checkpoint_hash
from vla0_trl.run_folder import FolderError


@pytest.mark.parametrize(("successes", "n"), [(50, 64), (1, 2), (0, 16), (16, 16)])
def test_wilson_interval_ends_where_the_score_test_rejects(successes, n):
    # its definition: the rates p at which |p̂ − p| is 1.96 standard deviations √(p(1−p)/n)
    low, high = wilson_interval(successes, n)
    rate = successes / n
    assert 0 <= low <= rate <= high <= 1
    for end in {low, high} - {0.0, 1.0}:
        assert abs(rate - end) == pytest.approx(1.96 * (end * (1 - end) / n) ** 0.5)


def test_wilson_interval_of_nothing_and_of_failures_only():
    assert wilson_interval(0, 0) == (0, 1)
    assert wilson_interval(0, 16) == (0, pytest.approx(1.96**2 / (16 + 1.96**2)))


def test_bootstrap_interval_agrees_with_the_normal_one_where_that_holds():
    values = np.random.default_rng(1).normal(0.5, 0.1, 400)
    half = 1.96 * values.std() / 20
    interval = metrics.bootstrap_interval(values)
    assert interval == pytest.approx((values.mean() - half, values.mean() + half), abs=1e-3)
    assert interval == metrics.bootstrap_interval(values)
    assert metrics.bootstrap_interval(np.array([0.25])) == (0.25, 0.25)


def test_a_line_holds_all_that_the_contract_names(tmp_path):
    with EpisodeLog(tmp_path / "new" / "folder", RUN) as log:
        log.append(small_result(7, success=True))
    [row] = read_episodes(tmp_path / "new" / "folder")
    assert row == {
        "task": "push",
        "seed": 7,
        "success": True,
        "max_coverage": 0.25,
        "return": 3.5,
        "steps": 40,
        "seconds": 1.0,
        "model_seconds": 0.4,
        "model_calls": 8,
        **RUN,
    }


def test_a_second_run_sees_what_is_missing(tmp_path):
    with EpisodeLog(tmp_path, RUN) as log:
        assert log.missing([1, 2, 3]) == [1, 2, 3]
        log.append(small_result(2))
    with EpisodeLog(tmp_path, RUN) as log:
        assert log.missing([1, 2, 3, 4]) == [1, 3, 4]
        assert [row["seed"] for row in log.episodes] == [2]


def test_a_half_line_is_dropped_and_not_glued_to_the_next(tmp_path):
    with EpisodeLog(tmp_path, RUN) as log:
        log.append(small_result(1))
        log.append(small_result(2))
    path = tmp_path / "episodes.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert [row["seed"] for row in read_episodes(tmp_path)] == [1]
    with EpisodeLog(tmp_path, RUN) as log:
        assert log.missing([1, 2]) == [2]
        log.append(small_result(2))
    assert [row["seed"] for row in read_episodes(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"checkpoint": "runs/b", "checkpoint_hash": "bb" * 32},
            r"checkpoint: runs/a \(aaaaaaaa\) there, runs/b \(bbbbbbbb\) here",
        ),
        ({"protocol": {"env": "PushT", "n_action_steps": 1}}, r"n_action_steps: 5 there, 1 here"),
    ],
)
def test_the_folder_of_another_run_is_refused_and_kept(tmp_path, change, words):
    with EpisodeLog(tmp_path, RUN) as log:
        log.append(small_result(1))
    before = (tmp_path / "episodes.jsonl").read_bytes()
    with pytest.raises(FolderError, match=rf"belongs to another run \({words}\): .*--overwrite"):
        EpisodeLog(tmp_path, RUN | change)
    assert (tmp_path / "episodes.jsonl").read_bytes() == before


def test_the_same_checkpoint_elsewhere_is_the_same_run(tmp_path):
    with EpisodeLog(tmp_path, RUN) as log:
        log.append(small_result(1))
    with EpisodeLog(tmp_path, RUN | {"checkpoint": "/moved/a"}) as log:
        assert log.missing([1]) == []


def test_overwrite_deletes_the_evaluation_and_nothing_else(tmp_path):
    with EpisodeLog(tmp_path, RUN) as log:
        log.append(small_result(1))
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "episode_000001_failure.mp4").write_text("")
    (tmp_path / "notes.txt").write_text("mine")
    with EpisodeLog(tmp_path, RUN | {"checkpoint_hash": "cc" * 32}, overwrite=True) as log:
        assert log.episodes == []
    kept = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert kept == ["episodes.jsonl", "notes.txt"]


def test_two_commands_cannot_write_into_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "_SHORT_WAIT", 0.1)
    for first, second in ((None, None), (None, "b"), ("a", None), ("a", "b")):
        with (
            EpisodeLog(tmp_path / "out", RUN, launch=first, rank=0),
            pytest.raises(FolderError, match="is at work in"),
        ):
            EpisodeLog(tmp_path / "out", RUN, overwrite=True, launch=second, rank=1)


def test_the_processes_of_a_launch_delete_what_was_there_once_all_shards_of_it(tmp_path):
    """With 4 processes, then 2 of another checkpoint: an old shard left over was counted with the new ones."""
    for rank in range(4):
        with EpisodeLog(tmp_path, RUN, launch="old", rank=rank) as log:
            log.append(small_result(rank, success=True))
    film = tmp_path / "videos" / "episode_000003_success.mp4"
    film.parent.mkdir()
    film.write_text("")
    (tmp_path / "videos" / "episode_000009_success.mp4").write_text("a stranger's")
    other = RUN | {"checkpoint_hash": "bb" * 32}
    for rank in (1, 0):  # 1 is through before 0 begins
        with EpisodeLog(tmp_path, other, overwrite=True, launch="new", rank=rank) as log:
            (film.parent / video_name(log.append(small_result(rank)))).write_text("")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "episodes-new-0.jsonl",
        "episodes-new-1.jsonl",
        "videos",
    ]
    films = ["episode_000000_failure.mp4", "episode_000001_failure.mp4", "episode_000009_success.mp4"]
    assert sorted(path.name for path in film.parent.iterdir()) == films
    assert [(row["seed"], row["success"]) for row in read_episodes(tmp_path)] == [(0, False), (1, False)]


def test_every_line_is_checked_not_the_first_alone(tmp_path):
    with EpisodeLog(tmp_path, RUN) as log:
        log.append(small_result(1))
    with (tmp_path / "episodes.jsonl").open("a") as file:
        file.write(json.dumps(read_episodes(tmp_path)[0] | {"seed": 2, "checkpoint_hash": "cc" * 32}) + "\n")
    with pytest.raises(FolderError, match="belongs to another run"):
        EpisodeLog(tmp_path, RUN)


def test_ranges_of_seeds_choose_the_episodes_that_were_asked_for(tmp_path):
    with EpisodeLog(tmp_path, RUN) as log:
        for seed in range(4):
            log.append(small_result(seed))
    assert results.seed_ranges([0, 1]) == {"": [0, 1]}
    assert [row["seed"] for row in read_episodes(tmp_path, {"": [0, 1]})] == [0, 1]
    pairs = [("libero_10", 3, 0), ("libero_10", 3, 1), ("libero_10", 4, 0)]
    assert results.seed_ranges(pairs) == {"libero_10 3": [0, 1], "libero_10 4": [0, 0]}


def test_a_full_disk_leaves_whole_lines(tmp_path):
    # a limit on the size of files stops the write in the middle of a line, as a full disk does
    code = f"""
import resource, sys
sys.path.insert(0, "tests")
from pathlib import Path
from support.episodes import RUN, small_result
from vla0_trl.evaluation.episode_log import EpisodeLog
with EpisodeLog(Path({str(tmp_path)!r}), RUN) as log:
    log.append(small_result(1))
    size = (log.folder / "episodes.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, size + 50))
    log.append(small_result(2))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"WriteError: could not write {tmp_path}/episodes.jsonl: File too large" in done.stderr
    assert (tmp_path / "episodes.jsonl").read_text().endswith("}\n")
    assert [row["seed"] for row in read_episodes(tmp_path)] == [1]


def test_a_killed_process_frees_the_folder(tmp_path):
    code = f"""
import sys, time
sys.path.insert(0, "tests")
from pathlib import Path
from support.episodes import RUN, small_result
from vla0_trl.evaluation.episode_log import EpisodeLog
log = EpisodeLog(Path({str(tmp_path)!r}), RUN)
log.append(small_result(1))
print("written", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
    with EpisodeLog(tmp_path, RUN) as log:
        assert log.missing([1, 2]) == [2]


def test_aggregate():
    rows = [
        {"task": "push", "seed": seed, "success": seed < 3, "max_coverage": seed / 10, "steps": 10 * seed}
        | {"seconds": 2.0, "model_seconds": 1.5, "model_calls": 5}
        for seed in range(4)
    ]
    summary = aggregate(rows)
    assert summary == aggregate(rows[::-1])
    assert summary["success_rate"] == 0.75
    assert summary["success_rate_interval"] == wilson_interval(3, 4)
    assert summary["mean_max_coverage"] == pytest.approx(0.15)
    assert summary["mean_steps"] == 15
    assert summary["seconds_per_episode"] == 2.0
    assert summary["ms_per_chunk"] == 300
    assert (summary["model_seconds"], summary["environment_seconds"], summary["model_calls"]) == (6, 2, 20)
    assert metrics.aggregate_by(metrics.task_label, [*rows, rows[0] | {"task": "lift"}])["lift"]["num_episodes"] == 1


def test_checkpoint_hash_covers_all_that_decides_an_answer_and_no_more(tmp_path):
    decide = ["config.json", "vla_config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    decide += ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"]
    decide += ["processor_config.json", "special_tokens_map.json", "merges.txt"]
    for name in decide:
        (tmp_path / name).write_text(name)
    first = checkpoint_hash(tmp_path)
    (tmp_path / "trainer_state.json").write_text("{}")
    (tmp_path / "optimizer.pt").write_text("")
    (tmp_path / "checkpoint.json").write_text("{}")
    assert checkpoint_hash(tmp_path) == first
    for name in decide:
        (tmp_path / name).write_text("changed")
        assert checkpoint_hash(tmp_path) != first
        (tmp_path / name).write_text(name)
    assert checkpoint_hash(tmp_path) == first


def test_a_folder_without_weights_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no \*\.safetensors"):
        checkpoint_hash(tmp_path)


def test_write_json_replaces_all_or_nothing(tmp_path):
    path = tmp_path / "results.json"
    results.write_json(path, {"n": 1})
    with pytest.raises(TypeError):
        results.write_json(path, {"n": object()})
    assert json.loads(path.read_text()) == {"n": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_provenance_names_machine_versions_and_commit():
    about = results.provenance("cpu", ("torch", "numpy"))
    assert about["versions"]["numpy"] == np.__version__
    assert about["machine"]["device"] == "cpu"
    assert about["machine"]["threads"] >= 1
    assert about["git_commit"] is None or len(about["git_commit"].removesuffix("-dirty")) == 40


def test_video_has_every_frame(tmp_path):
    frames = [np.full((64, 64, 3), value, np.uint8) for value in range(0, 250, 25)]
    results.write_video(tmp_path / "videos" / "a.mp4", frames, fps=10)
    back = iio.imread(tmp_path / "videos" / "a.mp4")
    assert back.shape == (10, 64, 64, 3)
    np.testing.assert_allclose(back.mean((1, 2, 3)), range(0, 250, 25), atol=4)
    assert [file.name for file in (tmp_path / "videos").iterdir()] == ["a.mp4"]


def test_a_video_that_cannot_be_written_is_an_error(tmp_path):
    frames = [np.zeros((63, 63, 3), np.uint8)]  # yuv420p needs even sides
    with pytest.raises(results.WriteError, match=r"ffmpeg could not write .*a\.mp4") as error:
        results.write_video(tmp_path / "a.mp4", frames, fps=10)
    assert list(tmp_path.iterdir()) == [] and "\n" not in str(error.value)


def test_what_a_kill_left_of_lines_and_films_goes(tmp_path):
    (tmp_path / "videos").mkdir()
    for name in (".results.json.7.partial", "videos/.a.mp4.7.partial", "videos/a.mp4"):
        (tmp_path / name).touch()
    with EpisodeLog(tmp_path, RUN):
        pass
    assert [file.name for file in (tmp_path / "videos").iterdir()] == ["a.mp4"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["episodes.jsonl", "videos"]
