"""What LIBERO's HDF5 files leave to conventions: pairs of frame and action, instruction, picture, gripper, groups."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from support.general import libero_assets, load_script
from support.lerobot_files import edit_info, replace_column, rewrite, source
from support.runs import run_main

from vla0_trl.data.chat_dataset import load_chat_dataset
from vla0_trl.data.episodes import EpisodeError
from vla0_trl.data.sources.libero_hdf5 import LiberoDemos
from vla0_trl.data.staging import ConversionError
from vla0_trl.envs.libero.setup import instruction

BOWL = "pick_up_the_bowl_demo"
FRAMES = 6


def demo(**changes) -> dict[str, np.ndarray]:
    """Frame t shows t in all its pixels but the top left quarter of the stored one."""
    images = np.zeros((FRAMES, 8, 8, 3), np.uint8) + np.arange(FRAMES, dtype=np.uint8)[:, None, None, None]
    images[:, :4, :4] = 200
    actions = np.random.default_rng(0).uniform(-1, 1, (FRAMES, 7))
    actions[:, 6] = np.where(np.arange(FRAMES) < 3, -1, 1)
    values = {"actions": actions, "obs/agentview_rgb": images, "obs/eye_in_hand_rgb": images}
    return values | {"obs/ee_states": np.zeros((FRAMES, 6)), "obs/gripper_states": np.zeros((FRAMES, 2))} | changes


def written(folder: Path, name: str = BOWL, attrs: dict | None = None, **changes) -> Path:
    path = folder / f"{name}.hdf5"
    with h5py.File(path, "w") as file:
        file.create_group("data").attrs.update(attrs or {})
        for key, values in demo(**changes).items():
            file[f"data/demo_0/{key}"] = values
    return path


# -- what goes with an action


def test_pairs_are_what_the_simulator_shows_and_does(tmp_path):
    """A file as create_dataset.py writes it, its actions executed again: each row's frame is drawn, each state met."""
    from vla0_trl.envs.libero.env import LiberoEnv

    env = LiberoEnv("libero_object", 0, assets_dir=libero_assets())
    try:
        env.reset(4)
        actions = np.random.default_rng(1).uniform(-1, 1, (6, 7))
        actions[:, 6] = [-1, -1, -1, 1, 1, 1]
        kept = {key: [] for key in ("states", *(f"obs/{key}" for key in ("agentview_rgb", "eye_in_hand_rgb")))}
        kept |= {f"obs/{key}": [] for key in ("ee_states", "gripper_states", "joint_states")}
        for action in actions:
            kept["states"].append(env.simulator.sim.get_state().flatten())
            env.step(action)
            seen = env.observe()
            kept["obs/agentview_rgb"].append(seen["images"]["image"][::-1, ::-1])
            kept["obs/eye_in_hand_rgb"].append(seen["images"]["image2"][::-1, ::-1])
            kept["obs/ee_states"].append(seen["state"][:6])
            kept["obs/gripper_states"].append(seen["state"][6:])
            kept["obs/joint_states"].append(env._observed["robot0_joint_pos"])
        columns = {key: np.array(values) for key, values in kept.items()}
        episode = LiberoDemos([written(tmp_path, actions=actions, **columns)], False).episode(0)

        env.reset(4)
        env.step(actions[0])
        frames = zip(*episode.images.values(), strict=True)
        for images, state, action in zip(frames, episode.states, episode.actions, strict=True):
            seen = env.observe()
            assert all(map(np.array_equal, images, seen["images"].values()))
            assert np.array_equal(state, seen["state"])
            env.step(action)
        assert env.steps == len(actions)
    finally:
        env.close()


@pytest.mark.parametrize(("before", "first"), [(True, 0), (False, 1)])
def test_files_that_hold_what_was_seen_before_an_action_are_told_by_their_states(tmp_path, before, first):
    """OpenVLA's regenerated files; observations are sampled a little before a step's end, so neither is exact."""
    joints = np.cumsum(np.random.default_rng(2).normal(size=(FRAMES + 1, 7)), 0)
    states = np.hstack([np.zeros((FRAMES, 1)), joints[:-1], np.zeros((FRAMES, 5))])
    seen = (joints[:-1] if before else joints[1:]) + 1e-3
    path = written(tmp_path, states=states, **{"obs/joint_states": seen})
    episode = LiberoDemos([path], False).episode(0)
    assert np.array_equal(episode.actions, demo()["actions"][first:])
    assert [frame[0, 0, 0] for frame in episode.images["image"]] == list(range(FRAMES - first))


# -- instruction


def test_training_and_evaluation_say_the_same(tmp_path):
    """The BDDL's :language, which is in `problem_info`, is another in 25 of 40 tasks."""
    pytest.importorskip("libero")
    from vla0_trl.envs.libero.setup import package_folder, task_names

    differ = 0
    for suite in ("libero_spatial", "libero_object", "libero_goal", "libero_10"):
        for name in task_names(suite):
            bddl = (package_folder() / "bddl_files" / suite / f"{name}.bddl").read_text()
            language = bddl.split("(:language")[1].split(")")[0].strip()
            path = written(tmp_path, f"{name}_demo", {"problem_info": json.dumps({"language_instruction": language})})
            assert LiberoDemos([path], False).task(0) == instruction(name)
            differ += language.lower() != instruction(name)
            path.unlink()
    assert differ == 25


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pick_up_the_alphabet_soup", "pick up the alphabet soup"),
        ("KITCHEN_SCENE10_put_the_black_bowl_in_the_drawer", "put the black bowl in the drawer"),
        ("LIVING_ROOM_SCENE2_put_both_in_the_basket", "put both in the basket"),
        ("Open_the_drawer", "Open the drawer"),
    ],
)
def test_instruction_of_a_name(name, words):
    assert instruction(name) == words


INFO = [
    ("{oops", "renamed"),
    ("null", "renamed"),
    ("[1]", "renamed"),
    ('{"language_instruction": null}', "renamed"),
    ('{"language_instruction": [1, 2]}', "renamed"),
    ('{"language_instruction": "\\"open it\\""}', "open it"),
    ('{"language_instruction": ["o", "p", "e", "n"]}', "open"),
]


@pytest.mark.parametrize(("info", "task"), INFO)
def test_problem_info_counts_only_where_no_name_tells_and_may_be_broken(tmp_path, info, task):
    assert LiberoDemos([written(tmp_path, attrs={"problem_info": info})], False).task(0) == "pick up the bowl"
    assert LiberoDemos([written(tmp_path, "renamed", {"problem_info": info})], False).task(0) == task
    bddl = {"problem_info": info, "bddl_file_name": b"a/b/KITCHEN_SCENE1_open_the_door.bddl"}
    assert LiberoDemos([written(tmp_path, "renamed", bddl)], False).task(0) == "open the door"


# -- pictures, gripper, groups


@pytest.mark.parametrize(
    ("attrs", "corner"), [({}, (-1, -1)), ({"macros_image_convention": "opengl"}, (-1, -1))]
    + [({"macros_image_convention": text}, (0, -1)) for text in ("opencv", b"opencv")],
)  # fmt: skip
def test_the_image_convention_is_read(tmp_path, attrs, corner):
    frame = next(iter(LiberoDemos([written(tmp_path, attrs=attrs)], False).episode(0).images["image"]))
    assert frame[corner][0] == 200 and (frame == 200).mean() == 0.25


def test_an_unknown_image_convention_is_refused(tmp_path):
    with pytest.raises(ConversionError, match="macros_image_convention is 'vulkan', wanted opengl or opencv"):
        LiberoDemos([written(tmp_path, attrs={"macros_image_convention": "vulkan"})], False)


GRIPPERS = [("sign", [-1, -1, -1, 1, 1, 1]), ("0_open_1_closed", [0, 0, 0, 1, 1, 1])]
GRIPPERS += [("1_open_0_closed", [1, 1, 1, 0, 0, 0])]


@pytest.mark.parametrize(("convention", "values"), GRIPPERS)
def test_the_gripper_is_converted_by_a_named_convention_or_refused(tmp_path, v2, convention, values):
    actions = demo()["actions"]
    actions[:, 6] = values
    path = written(tmp_path, actions=actions)
    assert LiberoDemos([path], False, convention).episode(0).actions[:, 6].tolist() == [-1, -1, 1, 1, 1]
    edit_info(v2, features=dict(source(v2).meta.features))
    wanted = np.resize(values, 33)
    rewrite(
        v2 / "data/chunk-000/episode_000001.parquet",
        lambda t: replace_column(t, "action", [[[0.0, float(value)] for value in wanted]]),
    )
    signs = np.resize([-1, -1, -1, 1, 1, 1], 33)
    reader = source(v2, check_stats=False, gripper=convention)
    assert reader.episode(1).actions[:, 1].tolist() == signs.tolist()
    for other, _ in GRIPPERS:
        if (convention == "sign") != (other == "sign"):
            message = (
                rf"the gripper, action\[\d\], is .*, which is neither open nor closed by --gripper {other}: choose"
            )
            for episodes in (LiberoDemos([path], False, other), source(v2, check_stats=False, gripper=other)):
                with pytest.raises(EpisodeError, match=message):
                    episodes.episode(len(episodes) > 1)


def test_a_converted_gripper_is_executed_as_its_sign(tmp_path, v2, monkeypatch):
    for path in v2.glob("data/*/*.parquet"):
        rewrite(path, lambda t: replace_column(t, "action", [[[at / 9, float(at % 2)] for at in range(len(t))]]))
    flags = ["--gripper", "1_open_0_closed", "--ignore_stats", "true", "--output_dir", tmp_path / "out"]
    run_main(load_script("data_prep/convert_lerobot.py"), monkeypatch, "--source", v2, *flags)
    rows, config = load_chat_dataset(tmp_path / "out")
    assert config.gripper == "sign" and [row["raw_action"][1] for row in rows.select(range(4))] == [1, -1, 1, -1]


def test_only_demos_are_demonstrations(tmp_path):
    path = written(tmp_path)
    with h5py.File(path, "a") as file:
        file["data/note"] = 1
        file.create_group("data/ep_meta")
        file.create_group("data/demo_x")
        file.copy("data/demo_0", "data/demo_10")
        file.copy("data/demo_0", "data/demo_2")
    assert [demo.key for demo in LiberoDemos([path], False).demos] == ["demo_0", "demo_2", "demo_10"]
    with h5py.File(path, "a") as file:
        del file["data"]
        file["data"] = 1
    with pytest.raises(ConversionError, match=r"has no data/demo_\*"):
        LiberoDemos([path], False)


@pytest.mark.parametrize("chunks", [None, (2, 8, 8, 3)])
def test_blocks_that_were_never_written_are_no_black_frames(tmp_path, chunks):
    path = written(tmp_path)
    with h5py.File(path, "a") as file:
        del file["data/demo_0/obs/agentview_rgb"]
        images = file.create_dataset("data/demo_0/obs/agentview_rgb", (FRAMES, 8, 8, 3), "uint8", chunks=chunks)
        if chunks:
            images[:4] = 1
    with pytest.raises(EpisodeError, match=r"demo_0: obs/agentview_rgb .* would read as zeros"):
        LiberoDemos([path], False).episode(0)
