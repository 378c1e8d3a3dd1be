"""One owner per folder: locks under real races, what is ever deleted, what counts as whole, what a kill leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.general import REPOSITORY, contents, load_script

from vla0_trl import run_folder
from vla0_trl.files import write_whole
from vla0_trl.manifest import CONVERSION_NAME, damage, files_of
from vla0_trl.run_folder import FolderError, RunFolder

WORK = {"format": 2, "source": {"name": "a"}}


def dataset(folder: Path, rows: str) -> Path:
    """Something that counts as a whole dataset."""
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train-00000-of-00001.parquet").write_text(rows)
    (folder / "vla_config.json").write_text("{}")
    (folder / CONVERSION_NAME).write_text(json.dumps({"files": files_of(folder)}))
    return folder


# -- the lock


def test_the_second_command_is_told_who_is_at_work(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "_SHORT_WAIT", 0.1)
    monkeypatch.setattr(sys, "argv", ["convert.py", "--output_dir", "a b"])
    with RunFolder(tmp_path / "out"):
        line = rf"at work in {tmp_path}/out: pid {os.getpid()} on .+ since 20.+: convert.py --output_dir 'a b': wait"
        with pytest.raises(FolderError, match=line):
            RunFolder(tmp_path / "out")
    with RunFolder(tmp_path / "out"):
        assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]
    assert list(tmp_path.iterdir()) == []


def test_processes_of_one_launch_share_and_keep_others_out(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "_SHORT_WAIT", 0.1)
    first = RunFolder(tmp_path / "out", "a")
    first.share()
    second = RunFolder(tmp_path / "out", "a")
    assert first.first and not second.first
    first.close()
    for other in (None, "b"):
        with pytest.raises(FolderError, match="another command is at work"):
            RunFolder(tmp_path / "out", other)
    second.close()
    with RunFolder(tmp_path / "out", "b"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_death_frees_the_folder_even_if_forked_children_live_on(tmp_path):
    code = f"""
import os, time
from vla0_trl.run_folder import RunFolder
folder = RunFolder({str(tmp_path / "out")!r})
child = os.fork()
if child: print(child, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        process.kill()
        process.wait()
        try:
            RunFolder(tmp_path / "out").close()
        finally:
            os.kill(child, signal.SIGKILL)


RACE = """
import sys
from pathlib import Path
from vla0_trl.run_folder import FolderError, RunFolder
import vla0_trl.run_folder as module
module._SHORT_WAIT = 60
counter = Path(sys.argv[1]) / "counter"
sys.stdin.readline()
for _ in range(int(sys.argv[2])):
    with RunFolder(Path(sys.argv[1]) / "out"):
        value = int(counter.read_text())
        counter.write_text(str(value + 1))
"""


@pytest.mark.slow
def test_two_processes_never_hold_the_lock_at_once_though_its_file_comes_and_goes(tmp_path):
    """Read, add one, write: a single overlap would lose a count."""
    (tmp_path / "counter").write_text("0")
    racers = [
        subprocess.Popen([sys.executable, "-c", RACE, str(tmp_path), "150"], stdin=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    assert [racer.wait(timeout=120) for racer in racers] == [0, 0, 0]
    assert (tmp_path / "counter").read_text() == "450"
    assert [path.name for path in tmp_path.iterdir()] == ["counter"]


# -- work beside the final name


def make(output_dir: Path, rows: str, overwrite: bool = False, inside: bool = False) -> None:
    with RunFolder(output_dir) as folder:
        if inside:  # as on a mount point
            folder.inside, folder.partial = True, output_dir / ".partial"
        folder.finish_publishing()
        folder.begin(WORK, overwrite)
        shutil.rmtree(folder.partial / "final", ignore_errors=True)
        dataset(folder.partial / "final", rows)
        folder.publish()


@pytest.mark.parametrize("inside", [False, True])
def test_replacing_a_dataset_keeps_what_the_user_put_there(tmp_path, inside):
    out = tmp_path / "out"
    out.mkdir()
    make(out, "old", inside=inside)
    (out / "notes.txt").write_text("mine")
    (out / "eval").mkdir()
    (out / "eval" / "results.json").write_text("mine, too")
    make(out, "new", overwrite=True, inside=inside)
    found = contents(out)
    assert found.pop("notes.txt") == b"mine" and found.pop("eval/results.json") == b"mine, too"
    assert found["data/train-00000-of-00001.parquet"] == b"new" and len(found) == 3
    assert damage(out) is None and [path.name for path in tmp_path.iterdir()] == ["out"]


class Killed(BaseException):
    """As if the process died there."""


@pytest.mark.parametrize("inside", [False, True])
def test_a_kill_at_any_step_of_replacing_ends_with_one_whole_dataset(tmp_path, monkeypatch, inside):
    """Every rename, unlink and rmdir of a replacement is the last one of some trial."""
    step = 0
    while True:
        out = tmp_path / str(step) / "out"
        out.mkdir(parents=True)
        make(out, "old", inside=inside)
        (out / "notes.txt").write_text("mine")
        left = [step]

        def dies(function, left=left):
            def wrapper(*args, **kwargs):
                if "partial" in str(args[0]) or "out" in str(args[0]):
                    if left[0] == 0:
                        raise Killed
                    left[0] -= 1
                return function(*args, **kwargs)

            return wrapper

        killed = False
        with monkeypatch.context() as patch:
            for owner, name in ((os, "rmdir"), (Path, "rename"), (Path, "unlink"), (Path, "rmdir")):
                patch.setattr(owner, name, dies(getattr(owner, name)))
            try:
                make(out, "new", overwrite=True, inside=inside)
            except Killed:
                killed = True
        with RunFolder(out) as folder:  # what the next command does first
            if inside:
                folder.inside, folder.partial = True, out / ".partial"
            folder.finish_publishing()
        make(out, "newer", overwrite=True, inside=inside)
        assert contents(out)["data/train-00000-of-00001.parquet"] == b"newer"
        assert (out / "notes.txt").read_text() == "mine" and damage(out) is None
        assert [path.name for path in out.parent.iterdir()] == ["out"], step
        if not killed:
            assert step > 8
            return
        step += 1


def test_a_strangers_partial_folder_is_never_touched(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(FolderError, match=r"out\.partial is in the way, and was not made by data_prep"):
            make(tmp_path / "out", "rows", overwrite)
    assert (tmp_path / "out.partial" / "thesis.tex").read_text() == "precious"


def test_unfinished_work_of_another_command_is_kept_until_overwritten(tmp_path):
    with RunFolder(tmp_path / "out") as folder:
        folder.begin({"format": 2, "source": {"name": "b"}}, False)
        (folder.partial / "episodes").mkdir()
        (folder.partial / "episodes" / "0").write_text("read")
    with pytest.raises(FolderError, match=r"another unfinished run \(source.name: b there, a here\)"):
        make(tmp_path / "out", "rows")
    assert (tmp_path / "out.partial" / "episodes" / "0").exists()
    make(tmp_path / "out", "rows", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_was_full_at_the_start_is_no_reason_to_refuse_later(tmp_path):
    (tmp_path / "out.partial").mkdir()  # made, but there was no room for the manifest
    (tmp_path / "out.partial" / ".manifest.json.123.partial").write_text("")
    make(tmp_path / "out", "rows")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_as_output_leads_to_the_dataset(tmp_path, dangling):
    target = tmp_path / "disk" / "out"
    target.parent.mkdir()
    if not dangling:
        target.mkdir()
    (tmp_path / "link").symlink_to(target)
    make(tmp_path / "link", "rows")
    assert (tmp_path / "link").is_symlink() and damage(target) is None
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_what_can_be_no_folder_is_refused_before_the_work(tmp_path):
    (tmp_path / "link").symlink_to("link")
    (tmp_path / "file").touch()
    (tmp_path / "linked").symlink_to("file")
    for name in ("link", "file", "linked"):
        with pytest.raises(FolderError, match=f"{name} is a file, or a link that leads to itself: choose another"):
            RunFolder(tmp_path / name)


def test_two_names_of_a_folder_are_one_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "_SHORT_WAIT", 0.1)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with RunFolder(tmp_path / "out"), pytest.raises(FolderError, match="at work"):
        RunFolder(tmp_path / "link")


def test_leftovers_of_a_killed_write_do_not_claim_a_folder(tmp_path):
    (tmp_path / ".run.json.4711.partial").write_text("{")
    (tmp_path / "lost+found").mkdir()
    assert run_folder.is_free(tmp_path)
    write_whole(tmp_path / "run.json", "{}")
    assert not run_folder.is_free(tmp_path)
    shutil.rmtree(tmp_path)
    assert run_folder.is_free(tmp_path)


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("data_prep/teach_pusht.py", []),
        ("recipes/merge_adapter.py", ["--model_name_or_path", "adapter"]),
        ("recipes/rehearse.py", ["recipes/pusht/nano.yaml"]),
        ("recipes/ablate.py", ["--ablations", "recipes/pusht/ablations.yaml"]),
    ],
)
def test_commands_without_a_folder_of_their_own_kind_are_kept_out_too(script, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("sys.argv", [script, *flags, "--output_dir", str(tmp_path / "out")])
    with RunFolder(tmp_path / "out"), pytest.raises(SystemExit, match="2"):
        load_script(script).main()
    assert "error: another command is at work in" in capsys.readouterr().err
