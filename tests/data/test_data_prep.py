"""The scripts in data_prep/ that concern PushT, on real data and in the real simulator."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image
from support.episodes import SmallSource, small_config
from support.general import PUSHT_ZARR, REPOSITORY, load_script, shared_path
from support.runs import run_main

from vla0_trl.actions import NormStats
from vla0_trl.config import VLAConfig
from vla0_trl.data.chat_dataset import load_chat_dataset
from vla0_trl.data.convert import convert
from vla0_trl.data.viewer import PICTURE_SIDE, decoding_error, row_picture, token_spans
from vla0_trl.envs.pusht.env import PushTEnv
from vla0_trl.envs.pusht.expert import PushTExpert, record_episode
from vla0_trl.models.loading import load_processor
from vla0_trl.policy.policy import VLAPolicy
from vla0_trl.processing.collator import VLADataCollator


@pytest.fixture(scope="module")
def zarr_script():
    return load_script("data_prep/convert_pusht_zarr.py")


@pytest.fixture(scope="module")
def recorder():
    return load_script("data_prep/record_pusht.py")


@pytest.fixture(scope="module")
def inspector():
    return load_script("data_prep/inspect_dataset.py")


@pytest.fixture(scope="module")
def human(zarr_script, tmp_path_factory):
    """Episodes 3 to 6 of the human demonstrations, with the block's pose."""
    output_dir = tmp_path_factory.mktemp("human") / "dataset"
    with pytest.MonkeyPatch.context() as monkeypatch:
        flags = ("--episodes", "3:7", "--state", "full", "--source", shared_path(PUSHT_ZARR))
        run_main(zarr_script, monkeypatch, *flags, "--output_dir", output_dir)
    return output_dir


# -- convert_pusht_zarr


def test_zarr_frames_states_and_actions_are_exact(human):
    import zarr

    group = zarr.open_group(shared_path(PUSHT_ZARR), mode="r")
    ends = [0, *group["meta/episode_ends"][:].tolist()]
    start, stop = ends[3], ends[7]
    rows = load_dataset(str(human), split="train")
    assert len(rows) == stop - start
    frames = group["data/img"][start:stop]
    assert all(np.array_equal(np.asarray(row["images"][0]), frames[i]) for i, row in enumerate(rows))
    assert np.array_equal(rows["raw_state"], group["data/state"][start:stop])
    now = np.array(rows["raw_action"]).reshape(-1, 10, 2)[:, 0]
    assert np.array_equal(now, group["data/action"][start:stop])
    assert rows["episode_index"] == [i for i in range(3, 7) for _ in range(ends[i + 1] - ends[i])]


def test_zarr_defaults_are_the_recipe(human):
    config = VLAConfig.from_pretrained(human)
    assert (config.chunk_size, config.n_action_steps, config.num_bins) == (10, 5, 511)
    assert (config.relative_actions, config.use_state, config.crop_ratio) == (True, True, 0.875)
    assert (config.cameras, config.state_dim, config.action_dim, config.fps) == (["image"], 5, 2, 10)
    rows, config = load_chat_dataset(human)
    tokenizer = config.action_tokenizer()
    half_bin = (tokenizer.quantizer.high - tokenizer.quantizer.low) / 511 / 2
    for row in rows.select(range(0, len(rows), 7)).select_columns(["action", "raw_action", "raw_state"]):
        chunk = tokenizer.decode(row["action"], np.array(row["raw_state"]))
        assert (np.abs(chunk - np.reshape(row["raw_action"], (10, 2))) <= half_bin + 1e-3).all()


def test_flags_reach_the_config(tmp_path, zarr_script, monkeypatch):
    flags = ["--source", shared_path(PUSHT_ZARR), "--output_dir", tmp_path / "out", "--episodes", ":1"]
    flags += ["--chunk_size", "3", "--num_bins", "1000", "--normalization", "-600,600", "--no-use_state"]
    run_main(zarr_script, monkeypatch, *flags)
    config = VLAConfig.from_pretrained(tmp_path / "out")
    assert (config.chunk_size, config.n_action_steps, config.num_bins) == (3, 3, 1000)
    assert (config.normalization, config.use_state, config.relative_actions) == ([-600, 600], False, True)
    card = (tmp_path / "out/README.md").read_text()
    assert "--chunk_size 3" in card
    assert "--use_state false" in card
    assert "--normalization -600,600" in card


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--episodes", "3"], "--episodes 3 is not FROM:TO"),
        (["--normalization", "1,2,3"], "--normalization 1,2,3 is not min_max"),
        (["--num_proc", "0"], "--num_proc 0 must be at least 1"),
        (["--cameras", "image,image"], "cameras has duplicates"),
        (["--chunk_size", "0"], "must be at least 1"),
    ],
)
def test_bad_flags(tmp_path, zarr_script, monkeypatch, capsys, flags, message):
    with pytest.raises(SystemExit):
        run_main(zarr_script, monkeypatch, "--source", shared_path(PUSHT_ZARR), "--output_dir", tmp_path / "o", *flags)
    assert message in capsys.readouterr().err


# -- record_pusht


@pytest.mark.slow
def test_recording_depends_on_seeds_alone(tmp_path):
    from support.general import contents

    script = str(REPOSITORY / "data_prep/record_pusht.py")
    flags = ["--num_episodes", "3", "--seed", "7", "--action_noise", "4", "--noise_fraction", "0.5"]
    for num_proc in ("1", "2"):
        output = ["--output_dir", str(tmp_path / num_proc), "--num_proc", num_proc]
        subprocess.run([sys.executable, script, *flags, *output], check=True, timeout=200)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    rows, config = load_chat_dataset(tmp_path / "1")
    assert sorted(set(rows["episode_index"])) == [0, 1, 2]
    assert rows[0]["images"][0].size == (96, 96)
    assert (config.state_dim, config.robot) == (2, "PushT (a round finger in 2-D)")
    assert "seeds 7 to 9, with 4 px of noise in 50% of the episodes" in (tmp_path / "1/README.md").read_text()


def test_failures_are_left_out_and_counted(tmp_path, recorder, monkeypatch, capsys):
    """The expert hardly ever fails, so its recordings are cut off by a stand-in here."""
    noise = {}

    @dataclass
    class Recording:
        frames: np.ndarray
        states: np.ndarray
        actions: np.ndarray
        success: bool

    def record_episode(seed, action_noise, *options):
        noise[seed] = action_noise
        states = np.random.default_rng(seed).uniform(0, 512, (4, 5)).astype(np.float32)
        return Recording(np.full((4, 96, 96, 3), seed, np.uint8), states, states[:, :2] + 1, seed != 12)

    monkeypatch.setattr(recorder, "record_episode", record_episode)
    flags = ["--num_episodes", "4", "--seed", "10", "--action_noise", "2", "--noise_fraction", "0.5"]
    run_main(recorder, monkeypatch, *flags, "--state", "full", "--no-relative_actions", "--output_dir", tmp_path / "o")
    assert "3 episodes kept, 1 rejected (2)" in capsys.readouterr().out
    rows = load_dataset(str(tmp_path / "o"), split="train")
    assert rows["episode_index"] == [0] * 4 + [1] * 4 + [3] * 4
    assert len(rows[0]["raw_state"]) == 5
    assert set(noise) == {10, 11, 12, 13}
    assert set(noise.values()) == {0.0, 2.0}


@pytest.fixture(scope="module")
def pusht_policy(tiny_nano, tmp_path_factory):
    """An untrained checkpoint for PushT; its actions lie in the workspace's lower right quarter."""
    folder = tmp_path_factory.mktemp("policy") / "checkpoint"
    shutil.copytree(tiny_nano, folder)
    stats = NormStats.from_array(np.array([[256.0, 256.0], [512.0, 512.0]]))
    config = VLAConfig(state_dim=2, use_state=True, chunk_size=8, image_size=48, action_stats=stats, state_stats=stats)
    config.save_pretrained(folder)
    return folder


def test_a_policy_drives_and_the_expert_labels(tmp_path, recorder, monkeypatch, pusht_policy):
    flags = ["--policy", pusht_policy, "--num_episodes", "2", "--seed", "3", "--max_steps", "12", "--state", "full"]
    run_main(recorder, monkeypatch, *flags, "--output_dir", tmp_path / "o")
    rows, config = load_chat_dataset(tmp_path / "o")
    assert len(rows) == 24 and config.state_dim == 5  # neither episode succeeded, both are kept
    assert "a policy labelled by the scripted expert" in config.source
    card = (tmp_path / "o/README.md").read_text()
    assert "a policy drove (sha256 " in card and "the expert in 0% of the steps" in card

    policy, env = VLAPolicy.from_pretrained(pusht_policy), PushTEnv("full")
    env.reset(3)
    for row in rows.select(range(12)):
        observation = env.observe()
        assert np.array_equal(row["raw_state"], observation["state"])
        label = PushTExpert(replan=True).act(env.full_state)
        assert np.allclose(row["raw_action"][:2], label)
        env.step(policy.select_action(observation | {"state": observation["state"][:2]}))


def test_with_expert_mix_1_the_expert_drives(tmp_path, recorder, monkeypatch, pusht_policy):
    flags = ["--num_episodes", "1", "--max_steps", "8", "--output_dir"]
    run_main(recorder, monkeypatch, "--policy", pusht_policy, "--expert_mix", "1", *flags, tmp_path / "a")
    mixed = load_dataset(str(tmp_path / "a"), split="train")
    alone = record_episode(0, replan=True, max_steps=8)
    assert np.array_equal(mixed["raw_state"], alone.states[:, :2])


def test_a_policy_that_cannot_drive_pusht_is_refused(tmp_path, recorder, monkeypatch, dot_config, capsys):
    dot_config.replace(cameras=["wrist"]).save_pretrained(tmp_path / "c")
    (tmp_path / "c/model.safetensors").touch()
    for flags, message in (
        (["--policy", tmp_path / "c"], "is not for PushT: it has cameras ['wrist']"),
        (["--policy", tmp_path / "nothing"], "no folder"),
    ):
        with pytest.raises(SystemExit) as error:
            run_main(recorder, monkeypatch, *flags, "--output_dir", tmp_path / "o")
        assert message in str(error.value)
    with pytest.raises(SystemExit):
        run_main(recorder, monkeypatch, "--expert_mix", "0.5", "--output_dir", tmp_path / "o")
    assert "--expert_mix needs a --policy" in capsys.readouterr().err


# -- inspect_dataset


def test_page_shows_text_prompt_and_tokens(tmp_path, human, tiny_nano, inspector, monkeypatch):
    page, sheet = tmp_path / "page.html", tmp_path / "sheet.png"
    flags = ["--dataset", human, "--rows", "0,50", "--output", page, "--png", sheet]
    run_main(inspector, monkeypatch, *flags, "--model_name_or_path", tiny_nano, "--image_size", "48")
    text = page.read_text()
    rows = load_dataset(str(human), split="train")
    for row in (rows[0], rows[50]):
        assert f"<dd>{row['action']}</dd>" in text
        assert f"State: {row['state']}&lt;end_of_utterance&gt;" in text
    assert text.count("data:image/png;base64,") == 2
    assert 'src="http' not in text
    assert Image.open(sheet).size[0] > 640


def test_trajectory_is_drawn_where_the_actions_are(human):
    rows, config = load_chat_dataset(human)
    picture = np.asarray(row_picture(rows[0], config)).astype(int)
    x, y = np.array(rows[0]["raw_action"][-2:]) / 512 * PICTURE_SIDE
    red, green, blue = picture[round(y), round(x)]
    assert red > 180
    assert green < 80
    assert blue < 80


def test_token_spans_say_what_is_trained_on(human, tiny_nano):
    rows, config = load_chat_dataset(human)
    config = config.replace(image_size=48)
    processor = load_processor(tiny_nano, config)
    spans = token_spans(rows[0], VLADataCollator(processor, config, mask_max=1.0, mask_skip=0.0))
    kinds = [kind for _, kind in spans]
    answer = kinds.index("label")
    assert set(kinds[:answer]) == {"ignored"}
    assert {text for text, kind in spans if kind == "masked"} == {"?"}
    plain = token_spans(rows[0], VLADataCollator(processor, config, train=False))
    trained = "".join(text for text, kind in plain if kind == "label")
    assert trained.strip() == f"{rows[0]['action']}<end_of_utterance>"
    assert "masked" not in {kind for _, kind in plain}


def test_other_data_is_plotted(tmp_path, inspector, monkeypatch):
    dataset = convert(SmallSource(), small_config(relative_actions=True), tmp_path / "dataset")
    page, sheet = tmp_path / "page.html", tmp_path / "sheet.png"
    run_main(inspector, monkeypatch, "--dataset", dataset, "--rows", "3", "--output", page, "--png", sheet)
    assert page.read_text().count("<section") == 3
    assert Image.open(sheet).height > 200
    rows, config = load_chat_dataset(dataset)
    assert decoding_error(rows[4], config) <= 1.001
    clipped = replace(config, action_stats=replace(config.action_stats, max=[1.0, 1.0]))
    assert decoding_error(rows[4], clipped) > 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "say where to"),
        (["--png", "x.png", "--rows", "a"], "expected a number of rows"),
        (["--png", "x.png", "--rows", "0,99999"], "the dataset has rows 0 to"),
    ],
)
def test_inspect_bad_flags(human, inspector, monkeypatch, capsys, flags, message):
    with pytest.raises(SystemExit):
        run_main(inspector, monkeypatch, "--dataset", human, *flags)
    assert message in capsys.readouterr().err
