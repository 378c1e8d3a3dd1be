"""What a machine does to a program: a closed pipe, another locale, a home that can't be written, no ffmpeg."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import config as datasets_config
from support.general import REPOSITORY, load_script
from support.runs import run_main

from vla0_trl.data.chat_dataset import load_chat_dataset
from vla0_trl.evaluation.metrics import aggregate

TASK = "Schiebe das „T“ …"


@pytest.fixture
def evaluation(tmp_path) -> Path:
    run = {"checkpoint": "run", "checkpoint_hash": "abcdef0123456789", "protocol": {"success_coverage": 0.95}}
    row = {"task": TASK, "seed": 0, "success": True, "steps": 20, "seconds": 1.0, "model_seconds": 0.5}
    row |= {"model_calls": 4, "max_coverage": 0.5, **run}
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/episodes.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "eval/results.json").write_text(json.dumps(run | aggregate([row])))
    return tmp_path / "eval"


def summarize(evaluation: Path, stdout: int = subprocess.PIPE, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "eval/summarize.py", evaluation, "--title", TASK]
    env = os.environ | env
    return subprocess.run(
        command, cwd=REPOSITORY, env=env, stdout=stdout, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )


def test_a_reader_that_has_gone_costs_nothing(evaluation):
    """As with `summarize.py … | head`: the files are there, and it ends as `cat` would."""
    read, write = os.pipe()
    os.close(read)
    done = summarize(evaluation, stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "")
    assert {path.name for path in evaluation.iterdir()} >= {"summary.md", "success.png", "report.html"}


def test_all_text_is_utf8_whatever_the_locale(evaluation):
    done = summarize(evaluation, LC_ALL="C", PYTHONUTF8="0", PYTHONIOENCODING="")
    assert (done.returncode, done.stderr) == (0, "")
    assert "20.7 – 100.0" in done.stdout  # the interval's dash
    assert TASK in (evaluation / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("code", "redirected", "status", "said"),
    [
        ("print(1)", ">/dev/full", 1, "error: what was printed can't be written: [Errno 28] No space left on device"),
        ("print(1, flush=True)", ">/dev/full", 1, "error: [Errno 28] No space left on device"),
        ("raise OSError(28, 'No space left on device', 'a')", "", 1, "error: [Errno 28] No space left on device: 'a'"),
        ("open('/proc/x', 'w')", "", 1, "error: [Errno 2] No such file or directory: '/proc/x'"),
        ("print(open('/dev/null').fileno() > 2, file=sys.stderr)", "<&- >&-", 0, "True"),
        ("print(1), print(1, file=sys.stderr), sys.stdin.read()", "<&- >&- 2>&-", 0, ""),
    ],
)
def test_a_full_disk_and_closed_streams(code, redirected, status, said):
    code = f"import sys; from vla0_trl.streams import prepare_streams; prepare_streams(); {code}"
    command = ["sh", "-c", f'exec "$0" -c "$1" {redirected}', sys.executable, code]
    env = os.environ | {"PYTHONUNBUFFERED": ""}
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (status, said)


@pytest.mark.parametrize("cache", ["/proc/home/datasets", "/dev/null/datasets"])
def test_a_home_that_can_not_be_written_is_one_line(dot_dataset, monkeypatch, cache):
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", cache)
    with pytest.raises(OSError, match=f"^{cache}, the datasets' cache, can't be written: set HF_HOME to a folder"):
        load_chat_dataset(dot_dataset)


def test_without_ffmpeg_episodes_count_and_are_not_filmed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/absent/ffmpeg")
    flags = ["--model_name_or_path", REPOSITORY / "recipes/pusht/checkpoint", "--output_dir", tmp_path / "eval"]
    run_main(load_script("eval/eval_pusht.py"), monkeypatch, *flags, "--num_episodes", 1, "--max_steps", 2)
    assert json.loads((tmp_path / "eval/results.json").read_text())["num_episodes"] == 1
    assert "warning: no episode will be filmed, there is no ffmpeg" in capsys.readouterr().err
    assert not (tmp_path / "eval/videos").exists()
