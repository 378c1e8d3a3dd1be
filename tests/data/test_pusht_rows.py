"""Rows that a teacher labelled: each has its own state's picture and the teacher's chunk."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from vla0_trl.config import VLAConfig
from vla0_trl.data.chat_dataset import FEATURES, load_chat_dataset
from vla0_trl.data.convert import convert
from vla0_trl.data.episodes import EpisodeError, SourceInfo, raw_rows
from vla0_trl.data.pusht_rows import BLOCK_ROWS, MAX_REACH, TeacherRows, labelled_frames, rows_from_states, scatter
from vla0_trl.envs.pusht.env import CAMERA, TASK, PushTEnv
from vla0_trl.envs.pusht.teacher import PushTTeacher

CONFIG = VLAConfig(cameras=[CAMERA], state_dim=2, chunk_size=8, use_state=True, relative_actions=True)


@pytest.fixture(scope="module")
def teacher() -> PushTTeacher:
    torch.manual_seed(0)
    teacher = PushTTeacher(width=16, depth=1)
    torch.nn.init.normal_(teacher.head.weight, std=2.0)
    return teacher


@pytest.fixture(scope="module")
def pool() -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.concatenate([rng.uniform(60, 450, (40, 4)), rng.uniform(0, 6, (40, 1))], axis=1).astype(np.float32)


def test_a_row_is_the_drawing_of_its_state_and_the_teachers_chunk(teacher, pool):
    rows = rows_from_states(pool, teacher)
    assert len(rows) == 40
    assert rows[3].keys() == set(FEATURES) - {"state", "action", "prompt", "completion"}
    env = PushTEnv("full")
    for row, state in zip(rows, pool, strict=True):
        env.reset_to(state)
        drawn = Image.open(io.BytesIO(row["images"][0]["bytes"]))
        assert np.array_equal(np.asarray(drawn), env.observe()["images"][CAMERA])
        np.testing.assert_allclose(row["raw_state"], state[:2], rtol=1e-6)
        wanted = teacher.label(state[None])[0].clip(-MAX_REACH, MAX_REACH) + state[:2]
        np.testing.assert_allclose(np.reshape(row["raw_action"], (8, 2)), wanted, atol=0.02)
    assert [row["frame_index"] for row in rows] == list(range(40))
    assert rows_from_states(pool[:1], teacher, state="full")[0]["raw_state"] == pytest.approx(pool[0].tolist())


def test_a_dataset_of_rows(teacher, pool, tmp_path):
    info = SourceInfo("rows", "1", "mit", "none", 10.0, "Made up for tests.")
    source = TeacherRows(teacher, pool, BLOCK_ROWS + 30, seed=0, state="agent", info=info)
    convert(source, CONFIG, tmp_path / "rows")
    dataset, config = load_chat_dataset(tmp_path / "rows")
    assert len(dataset) == BLOCK_ROWS + 30
    assert dataset.unique("task") == [TASK]
    assert dataset["episode_index"][:] == [0] * BLOCK_ROWS + [1] * 30
    states = np.concatenate(
        [scatter(pool, 100, np.random.default_rng([0, 0])), scatter(pool, 30, np.random.default_rng([0, 1]))]
    )
    half_bin = (np.array(config.action_stats.max) - config.action_stats.min) / config.num_bins / 2
    tokenizer = config.action_tokenizer()
    for row, state in zip(dataset, states.astype(np.float32), strict=True):
        chunk = tokenizer.decode(row["action"], np.array(row["raw_state"]))
        wanted = teacher.label(state[None])[0].clip(-MAX_REACH, MAX_REACH) + state[:2]
        assert (np.abs(chunk - wanted) <= half_bin + 0.02).all()


def test_states_are_scattered_around_the_pool(pool):
    states = scatter(pool, 2000, np.random.default_rng(0))
    assert np.array_equal(states, scatter(pool, 2000, np.random.default_rng(0)))
    assert states[:, :4].min() >= 12
    assert states[:, :4].max() <= 500
    nearest = np.linalg.norm(states[:, None, :4] - pool[:, :4], axis=-1).min(1)
    assert 0.2 < (nearest < 60).mean() < 0.6  # those that are neither mirrored nor from anywhere


def test_chunks_of_another_length_than_the_config_asks_for(teacher, pool):
    episode = labelled_frames(pool[:3], teacher, name="block 0")
    with pytest.raises(EpisodeError, match=r"block 0: its chunks have 8 steps, chunk_size is 10: set --chunk_size 8"):
        next(raw_rows(episode, CONFIG.replace(chunk_size=10), 0))
    episode.actions[1, 2, 1] = np.nan
    with pytest.raises(EpisodeError, match=r"block 0, frame 1: action\[5\] is nan"):
        next(raw_rows(episode, CONFIG, 0))
