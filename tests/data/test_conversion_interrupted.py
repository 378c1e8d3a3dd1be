"""A conversion that is stopped, killed or out of disk loses nothing: the same command ends with the same bytes."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.general import PUSHT_ZARR, REPOSITORY, contents, shared_path

pytestmark = pytest.mark.slow  # several processes, signals

NUM_EPISODES = 16  # of the human demonstrations: enough for a signal to come in between


def command(output_dir: Path, *flags: str) -> list[str]:
    script = REPOSITORY / "data_prep/convert_pusht_zarr.py"
    source = shared_path(PUSHT_ZARR)
    flags = ("--episodes", f"0:{NUM_EPISODES}", *flags)
    return [sys.executable, str(script), "--source", str(source), "--output_dir", str(output_dir), *flags]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, bytes]:
    """What the command writes if nothing happens to it."""
    output_dir = tmp_path_factory.mktemp("uninterrupted") / "dataset"
    subprocess.run(command(output_dir), check=True, timeout=120)
    return contents(output_dir)


# An episode is at most 330 kB before its shard, the shard 2 MB.
@pytest.mark.parametrize(("limit", "flags"), [(50_000, ["--num_proc", "2"]), (1_000_000, [])])
def test_full_disk(tmp_path, limit, flags, uninterrupted):
    def full_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    output_dir = tmp_path / "dataset"
    result = subprocess.run(
        command(output_dir, *flags), preexec_fn=full_disk, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1
    assert "error: the disk is full" in result.stderr
    assert "Traceback" not in result.stderr
    assert not output_dir.exists()
    staged = len(list((tmp_path / "dataset.partial/episodes").glob("*.parquet")))
    assert staged == (NUM_EPISODES if limit == 1_000_000 else 0)
    again = subprocess.run(command(output_dir), check=True, capture_output=True, text=True, timeout=120)
    assert f"{NUM_EPISODES - staged} of {NUM_EPISODES} read now" in again.stdout
    assert contents(output_dir) == uninterrupted


@pytest.mark.parametrize(
    ("how", "num_proc"),
    [(signal.SIGINT, 1), (signal.SIGINT, 2), (signal.SIGTERM, 1), (signal.SIGTERM, 2), (signal.SIGKILL, 2)],
)
def test_interrupted_conversion_continues(tmp_path, how, num_proc, uninterrupted):
    output_dir = tmp_path / "dataset"
    flags = ("--num_proc", str(num_proc))
    for _ in range(5):  # on a busy machine, a conversion may end before we look again
        process = subprocess.Popen(
            command(output_dir, *flags),
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        while process.poll() is None:
            if len(list((tmp_path / "dataset.partial/episodes").glob("*.parquet"))) >= 3:
                break
            time.sleep(0.005)
        else:
            shutil.rmtree(output_dir)
            continue
        break
    if how == signal.SIGTERM:
        os.killpg(process.pid, how)  # as Slurm does: to workers, too
    else:
        process.send_signal(how)
    _, stderr = process.communicate(timeout=60)
    assert not output_dir.exists()
    if how != signal.SIGKILL:
        assert process.returncode == 128 + how
        assert "run the same command again to go on" in stderr
        assert "Traceback" not in stderr
    deadline = time.monotonic() + 20
    while group_is_alive(process.pid):
        assert time.monotonic() < deadline, "workers outlive the conversion"
        time.sleep(0.05)

    again = subprocess.run(command(output_dir, *flags), check=True, capture_output=True, text=True, timeout=120)
    read_now = int(again.stdout.split("rejected; ")[1].split(" of ")[0])
    assert 0 < read_now <= NUM_EPISODES - 3
    assert contents(output_dir) == uninterrupted
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]


def test_a_worker_that_dies_is_one_clear_error(tmp_path, uninterrupted):
    """The first one, while its parent may still be starting the second: an executor alone would wait for ever."""
    output_dir = tmp_path / "dataset"
    flags = ("--num_proc", "2")
    process = subprocess.Popen(command(output_dir, *flags), stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "dataset.partial/episodes").glob("*.parquet")):
        assert process.poll() is None
        time.sleep(0.005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [int(pid) for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(workers[0], signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: a worker process died" in stderr
    assert "Traceback" not in stderr
    assert not output_dir.exists()
    subprocess.run(command(output_dir, *flags), check=True, capture_output=True, timeout=120)
    assert contents(output_dir) == uninterrupted


def group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
