"""LIBERO's HDF5 demonstrations -> chat dataset; files are written here as LIBERO's create_dataset.py leaves them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from datasets import load_dataset
from support.general import REPOSITORY, contents, load_script
from support.runs import run_main

from vla0_trl.config import VLAConfig
from vla0_trl.data.chat_dataset import load_chat_dataset
from vla0_trl.data.sources.libero_hdf5 import moves

SOUP = "pick_up_the_alphabet_soup_and_place_it_in_the_basket_demo.hdf5"
BOWL = "KITCHEN_SCENE10_put_the_black_bowl_in_the_drawer_demo.hdf5"
DEMOS = 12  # demo_10 comes after demo_2, not after demo_1
FRAMES = 9


def demo(file: int, number: int) -> dict[str, np.ndarray]:
    """One demonstration; actions 0, 3 and 4 are no-ops, 6 only closes the gripper. obs[t] is after actions[t]."""
    rng = np.random.default_rng([file, number])
    actions = rng.uniform(-1, 1, (FRAMES, 7))
    actions[:, 6] = np.where(np.arange(FRAMES) < 6, -1, 1)
    actions[[0, 3, 4, 6], :6] = 1e-6
    return {
        "actions": actions,
        "rewards": np.zeros(FRAMES),
        "obs/agentview_rgb": rng.integers(0, 256, (FRAMES, 16, 16, 3), np.uint8),
        "obs/eye_in_hand_rgb": rng.integers(0, 256, (FRAMES, 16, 16, 3), np.uint8),
        "obs/ee_states": rng.normal(size=(FRAMES, 6)),
        "obs/gripper_states": rng.normal(size=(FRAMES, 2)),
        "obs/joint_states": rng.normal(size=(FRAMES, 7)),
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("libero") / "libero_object"
    folder.mkdir()
    for at, (name, language) in enumerate(((BOWL, None), (SOUP, list("pick up the soup")))):
        with h5py.File(folder / name, "w") as file:
            data = file.create_group("data")
            data.attrs["tag"] = "libero-v1"
            if language:  # some of LIBERO's files hold it as a list of letters
                data.attrs["problem_info"] = json.dumps({"language_instruction": language})
            for number in range(DEMOS):
                for key, values in demo(at, number).items():
                    data[f"demo_{number}/{key}"] = values
    return folder


@pytest.fixture
def spoilt(tmp_path, files) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(files, tmp_path / "libero_object"))


@pytest.fixture(scope="module")
def script():
    return load_script("data_prep/convert_libero_hdf5.py")


def test_row_t_is_what_was_seen_before_action_t(tmp_path, script, files, monkeypatch):
    run_main(script, monkeypatch, "--source", files, "--output_dir", tmp_path / "out")
    rows, config = load_chat_dataset(tmp_path / "out")
    assert len(rows) == 2 * DEMOS * (FRAMES - 1)
    for row in rows:
        wanted = demo(*divmod(row["episode_index"], DEMOS))
        seen, action = row["frame_index"], row["frame_index"] + 1
        for image, key in zip(row["images"], ("agentview_rgb", "eye_in_hand_rgb"), strict=True):
            assert np.array_equal(image, wanted[f"obs/{key}"][seen][::-1, ::-1])
        state = np.concatenate([wanted["obs/ee_states"][seen], wanted["obs/gripper_states"][seen]])
        assert row["raw_state"] == state.astype(np.float32).tolist()
        assert row["raw_action"][:7] == wanted["actions"][action].astype(np.float32).tolist()
    tasks = ["put the black bowl in the drawer", "pick up the alphabet soup and place it in the basket"]
    assert rows["task"] == [task for task in tasks for _ in range(DEMOS * (FRAMES - 1))]
    assert (config.cameras, config.fps, config.gripper) == (["image", "image2"], 20, "sign")
    assert (config.action_dim, config.state_dim, config.use_state, config.chunk_size) == (7, 8, True, 8)
    assert (config.relative_actions, config.crop_ratio) == (False, 230 / 256)
    card = (tmp_path / "out/README.md").read_text()
    assert "license: cc-by-4.0" in card
    assert "a demonstration's first action, for which the files hold no picture, is left out" in card


def test_noops_are_dropped_after_actions_are_paired(tmp_path, script, files, monkeypatch):
    flags = ["--source", files / SOUP, "--drop_noops", "--episodes", "2:3"]
    run_main(script, monkeypatch, *flags, "--output_dir", tmp_path / "out")
    rows = load_dataset(str(tmp_path / "out"), split="train")
    wanted = demo(1, 2)
    kept = [1, 2, 5, 6, 7, 8]
    assert rows["frame_index"] == list(range(len(kept)))
    for row, action in zip(rows, kept, strict=True):
        assert np.array_equal(row["images"][0], wanted["obs/agentview_rgb"][action - 1][::-1, ::-1])
        assert row["raw_action"][:7] == wanted["actions"][action].astype(np.float32).tolist()
    card = (tmp_path / "out/README.md").read_text()
    assert "stand still are left out" in card
    assert "  --drop_noops\n" in card


def test_rule_of_noops_is_openvlas():
    """Compared with is_noop of its regenerate_libero_dataset.py, which keeps its own last kept action."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        actions = rng.choice([0.0, 4e-5, 5e-5, 1.0], (12, 7), p=[0.6, 0.15, 0.15, 0.1])
        actions[:, 6] = rng.choice([-1.0, 1.0], 12)
        kept = []
        for frame, action in enumerate(actions):
            small = np.sqrt((action[:6] ** 2).sum()) < 1e-4
            if not (small if not kept else small and action[6] == actions[kept[-1], 6]):
                kept.append(frame)
        assert moves(actions).tolist() == kept


def test_tasks_are_chosen(tmp_path, script, files, monkeypatch):
    flags = ["--source", files, "--max_episodes_per_task", "3"]
    for tasks in ("1", "SOUP"):
        run_main(script, monkeypatch, *flags, "--tasks", tasks, "--output_dir", tmp_path / tasks)
        rows = load_dataset(str(tmp_path / tasks), split="train")
        assert set(rows["task"]) == {"pick up the alphabet soup and place it in the basket"}
        assert len(rows) == 3 * (FRAMES - 1)
        assert min(rows["episode_index"]) >= DEMOS
    with pytest.raises(
        SystemExit, match=r"(?s)the source has these.*\n  0 put the black bowl in the drawer\n  1 pick up the al"
    ):
        run_main(script, monkeypatch, *flags, "--tasks", "2", "--output_dir", tmp_path / "out")


@pytest.mark.slow
def test_processes_make_no_difference_and_several_sources_work(tmp_path, files):
    command = [sys.executable, str(REPOSITORY / "data_prep/convert_libero_hdf5.py")]
    command += ["--source", str(files / BOWL), str(files / SOUP), "--cameras", "image2"]
    for num_proc in ("1", "2"):
        flags = ["--output_dir", str(tmp_path / num_proc), "--num_proc", num_proc]
        subprocess.run([*command, *flags], check=True, timeout=120, capture_output=True)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert VLAConfig.from_pretrained(tmp_path / "1").cameras == ["image2"]
    assert f"--source {files / BOWL} {files / SOUP}" in (tmp_path / "1/README.md").read_text()


def delete(folder: Path, key: str) -> None:
    with h5py.File(folder / SOUP, "a") as file:
        del file[key]


def shorten(folder: Path) -> None:
    delete(folder, "data/demo_3/obs/agentview_rgb")
    with h5py.File(folder / SOUP, "a") as file:
        file["data/demo_3/obs/agentview_rgb"] = np.zeros((FRAMES - 2, 16, 16, 3), np.uint8)


def narrow(folder: Path) -> None:
    delete(folder, "data/demo_3/actions")
    with h5py.File(folder / SOUP, "a") as file:
        file["data/demo_3/actions"] = np.zeros((FRAMES, 6))


def cut(folder: Path) -> None:
    (folder / SOUP).write_bytes((folder / SOUP).read_bytes()[:9000])


BAD = {
    "camera": (
        lambda f: delete(f, "data/demo_3/obs/eye_in_hand_rgb"),
        "demo_3: has no obs/eye_in_hand_rgb, it has .*ag",
    ),
    "actions": (lambda f: delete(f, "data/demo_3/actions"), r"demo_3: has no actions, it has .*--skip_bad_episodes"),
    "state": (lambda f: delete(f, "data/demo_3/obs/ee_states"), "demo_3: has no obs/ee_states"),
    "length": (shorten, "demo_3: obs/agentview_rgb has 7 frames, actions has 9"),
    "width": (narrow, r"demo_3: actions is float64 of shape \(9, 6\), wanted \(frames, 7\) numbers"),
    "data": (lambda f: delete(f, "data"), r"has no data/demo_\*: it is not a file of LIBERO demonstrations"),
    "cut": (cut, "hdf5: can't be read, it is absent, cut off or no HDF5"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD)
def test_bad_input(tmp_path, script, spoilt, monkeypatch, spoil, message):
    spoil(spoilt)
    with pytest.raises(SystemExit, match=f"^error: .*{SOUP[:-5]}.*{message}"):
        run_main(script, monkeypatch, "--source", spoilt, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_demonstrations_are_skipped_and_listed(tmp_path, script, spoilt, monkeypatch, capsys):
    BAD["camera"][0](spoilt)
    run_main(script, monkeypatch, "--source", spoilt, "--skip_bad_episodes", "--output_dir", tmp_path / "out")
    assert (
        f"1 episodes skipped as bad:\n  {spoilt / SOUP}, demo_3: has no obs/eye_in_hand_rgb" in capsys.readouterr().out
    )
    episodes = set(load_dataset(str(tmp_path / "out"), split="train")["episode_index"])
    assert episodes == set(range(2 * DEMOS)) - {DEMOS + 3}


def test_no_files(tmp_path, script, monkeypatch):
    with pytest.raises(SystemExit, match=r"no \.hdf5 files there"):
        run_main(script, monkeypatch, "--source", tmp_path, "--output_dir", tmp_path / "out")
    with pytest.raises(SystemExit, match="can't be read, it is absent"):
        run_main(script, monkeypatch, "--source", tmp_path / "none.hdf5", "--output_dir", tmp_path / "out")


def test_no_h5py_says_how_to_install(tmp_path, script, files, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(SystemExit, match=r'needs h5py: pip install -c requirements.lock -e "\.\[convert\]"'):
        run_main(script, monkeypatch, "--source", files, "--output_dir", tmp_path / "out")
