"""Setting LIBERO up: assets, renderers, tasks, initial states; and what is said where something is missing."""

import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vla0_trl.envs.libero import protocol, setup
from vla0_trl.envs.libero.env import LiberoEnv

SUITE, TASK = "libero_object", 0


def test_tasks_and_instructions_are_those_of_liberos_own_benchmark(assets, capsys):
    setup.prepare_simulator(assets)
    from libero.libero.benchmark import get_benchmark

    for suite in protocol.MAX_STEPS:
        tasks = get_benchmark(suite)().tasks
        assert [task.name for task in tasks] == setup.task_names(suite)
        assert [task.language for task in tasks] == [setup.instruction(name) for name in setup.task_names(suite)]
        assert {len(setup.initial_states(suite, task.name)) for task in tasks} == {protocol.NUM_INIT_STATES}


def test_nothing_asks_and_nothing_is_left_in_the_home_folder(assets, tmp_path):
    code = "import sys; from vla0_trl.envs.libero.setup import prepare_simulator; prepare_simulator(sys.argv[1])"
    environment = {**os.environ, "HOME": str(tmp_path)}
    environment.pop("LIBERO_CONFIG_PATH", None)
    command = [sys.executable, "-c", code, assets]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_assets_are_found_or_missed_clearly(assets, tmp_path, monkeypatch):
    monkeypatch.setenv("LIBERO_ASSETS", assets)
    assert setup.find_assets() == Path(assets).resolve()
    with pytest.raises(setup.LiberoError, match=r"is not LIBERO's assets folder, it has no articulated_objects/"):
        setup.find_assets(tmp_path)
    monkeypatch.delenv("LIBERO_ASSETS")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(setup.LiberoError, match="could not be downloaded"):  # tests are offline
        setup.find_assets()


def test_assets_come_from_the_hub_where_none_are_given(assets, tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repository, repo_type, local_files_only):
        asked.append((repository, repo_type, local_files_only))
        return assets

    monkeypatch.delenv("LIBERO_ASSETS", raising=False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert setup.find_assets() == Path(assets)
    assert asked == [("lerobot/libero-assets", "dataset", False)]


def test_a_task_that_assets_are_too_few_for_is_told(assets, tmp_path):
    for folder in Path(assets).iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    (tmp_path / "stable_hope_objects").unlink()
    (tmp_path / "stable_hope_objects").mkdir()
    with pytest.raises(setup.LiberoError, match=r"libero_object task 0 needs .*stable_hope_objects.* is missing"):
        LiberoEnv(SUITE, TASK, assets_dir=tmp_path)


@pytest.mark.parametrize(
    ("variable", "driver", "libraries", "renderer"),
    [
        ("glx", True, ["EGL", "OSMesa"], "glx"),
        ("", True, ["EGL", "OSMesa"], "egl"),
        ("", True, ["OSMesa"], "osmesa"),
        ("", False, ["EGL", "OSMesa"], "osmesa"),
        ("", False, ["EGL"], None),
    ],
)
def test_the_renderer_is_what_the_machine_has(variable, driver, libraries, renderer, tmp_path, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", variable)
    monkeypatch.setattr(setup, "DEVICES", tmp_path)
    monkeypatch.setattr("ctypes.util.find_library", lambda name: name if name in libraries else None)
    if driver:
        (tmp_path / "nvidiactl").touch()
    if renderer is None:
        with pytest.raises(setup.LiberoError, match="apt-get install libosmesa6"):
            setup.choose_renderer()
    else:
        assert setup.choose_renderer() == renderer


def test_each_process_of_a_launcher_draws_on_its_own_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "DEVICES", tmp_path)
    monkeypatch.setattr(setup, "NVIDIA_GPUS", tmp_path / "gpus")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert setup.egl_device() == "0"  # Mesa's, without an NVIDIA device
    for number in range(12):
        (tmp_path / f"nvidia{number}").touch()
        folder = tmp_path / f"gpus/0000:{number}:00.0"
        folder.mkdir(parents=True)
        (folder / "information").write_text(f"Model: \t H100\nGPU UUID: \t GPU-{number}a\nDevice Minor: \t {number}\n")
    (tmp_path / "nvidiactl").touch()
    for visible, rank, device in (
        ("", 0, "0"),
        ("", 2, "2"),
        ("", 13, "1"),
        ("4,6", 1, "6"),
        ("GPU-3a, GPU-11a", 1, "11"),
        ("GPU-unknown", 0, "0"),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert setup.egl_device() == device


@pytest.mark.slow
@pytest.mark.parametrize("variables", [{}, {"MUJOCO_EGL_DEVICE_ID": "0"}, {"CUDA_VISIBLE_DEVICES": "GPU-12f3-aabb"}])
def test_egl_draws_what_osmesa_draws_without_an_nvidia_device(assets, variables):
    if setup.ctypes.util.find_library("EGL") is None or Path("/dev/nvidiactl").exists():
        pytest.skip("needs Mesa's EGL, and no NVIDIA driver")
    code = (
        "import sys; from vla0_trl.envs.libero.env import LiberoEnv; env = LiberoEnv('libero_object', 0, "
        "assets_dir=sys.argv[1]); env.reset(0); print(env.observe()['images']['image'].sum()); env.close()"
    )
    sums = []
    for renderer in ({"MUJOCO_GL": "osmesa"}, {"MUJOCO_GL": "egl"} | variables):
        environment = {key: value for key, value in os.environ.items() if key != "PYOPENGL_PLATFORM"} | renderer
        command = [sys.executable, "-c", code, assets]
        sums.append(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    assert sums[0] == sums[1] != ""


def test_initial_states_unpickle_arrays_only(tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch /tmp/evil",)

    folder = tmp_path / "init_files" / SUITE
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "task.pruned_init", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil()))
    monkeypatch.setattr(setup, "package_folder", lambda: tmp_path)
    with pytest.raises(pickle.UnpicklingError, match="has no place in a file of initial states"):
        setup.initial_states(SUITE, "task")


def test_another_mujoco_is_warned_about(monkeypatch, recwarn):
    monkeypatch.setattr(setup, "version", lambda name: protocol.TESTED_MUJOCO)
    setup.check_mujoco()
    assert not recwarn
    monkeypatch.setattr(setup, "version", lambda name: "3.9.0")
    with pytest.warns(UserWarning, match=r"MuJoCo 3\.9\.0, but 3\.3\.2 is what was tested"):
        setup.check_mujoco()
