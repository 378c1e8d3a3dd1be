"""Episodes: windows, checks, chat rows."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from helpers import small_config, small_episode
from PIL import Image

from vla0_trl.actions import NormStats, parse_integers
from vla0_trl.chat_dataset import FEATURES
from vla0_trl.episodes import (
    EpisodeError,
    action_windows,
    chat_columns,
    checked_episode,
    frame_sizes,
    relative_windows,
)


def encoded(pixels: np.ndarray, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def with_statistics(config, episode):
    windows = action_windows(episode.actions, config.chunk_size)
    if config.relative_actions:
        windows = relative_windows(windows, episode.states)
    return config.replace(
        action_stats=NormStats.from_array(windows.reshape(-1, config.action_dim)),
        state_stats=NormStats.from_array(episode.states) if config.state_dim else None,
    )


def test_windows_repeat_the_last_action():
    actions = np.array([[1, 10], [2, 20], [3, 30]], np.float32)
    windows = action_windows(actions, 2)
    assert windows.tolist() == [[[1, 10], [2, 20]], [[2, 20], [3, 30]], [[3, 30], [3, 30]]]
    assert windows.dtype == np.float32


def test_episode_shorter_than_a_chunk():
    assert action_windows(np.array([[5.0]], np.float32), 3).tolist() == [[[5], [5], [5]]]


def test_checked_episode_keeps_pixels_and_only_the_chosen_cameras():
    episode = small_episode()
    checked = checked_episode(episode, small_config(cameras=["wrist"]))
    assert list(checked.images) == ["wrist"]
    for frame, data in zip(episode.images["wrist"], checked.images["wrist"], strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), frame)
    assert frame_sizes(checked) == {"wrist": (8, 8)}
    assert checked.actions.dtype == checked.states.dtype == np.float32


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_encoded_frames_pass_through_untouched(form):
    episode = small_episode()
    frames = [encoded(frame, form) for frame in episode.images["front"]]
    episode.images["front"] = frames
    assert checked_episode(episode, small_config()).images["front"] == frames


def damaged(field, frame, index, value):
    values = getattr(small_episode(), field).copy()
    values[frame, index] = value
    return {field: values}


def front(frames):
    return {"images": {**small_episode().images, "front": frames}}


FRAMES = small_episode().images["front"]
BAD = {
    "NaN action": (damaged("actions", 3, 1, np.nan), r"frame 3: action\[1\] is nan: repair"),
    "infinite action": (damaged("actions", 0, 0, -np.inf), r"frame 0: action\[0\] is -inf"),
    "NaN state": (damaged("states", 6, 2, np.nan), r"frame 6: state\[2\] is nan"),
    "action width": ({"actions": np.zeros((7, 3), np.float32)}, r"action has shape \(7, 3\), expected \(frames, 2\)"),
    "state width": ({"states": np.zeros((7, 2), np.float32)}, r"state has shape \(7, 2\), expected \(frames, 3\)"),
    "state missing": ({"states": None}, "state is missing"),
    "state count": ({"states": np.zeros((6, 3), np.float32)}, "state has 6 frames, action has 7"),
    "empty": ({"actions": np.zeros((0, 2), np.float32)}, "has no frames"),
    "task": ({"task": " \n"}, "task is empty"),
    "camera missing": ({"images": {"front": FRAMES}}, r"camera 'wrist' is missing, it has \['front'\]"),
    "frame count": (front(FRAMES[:5]), "camera 'front' has 5 frames, action has 7"),
    "no image": (front([b"GIF89a", *FRAMES[1:]]), "frame 0: camera 'front' does not decode"),
    "cut image": (front([*FRAMES[:2], encoded(FRAMES[2])[:-400], *FRAMES[3:]]), "frame 2: camera 'front' does not de"),
    "grey image": (front([encoded(f[..., 0]) for f in FRAMES]), "frame 0: camera 'front' is an image of mode L"),
    "floats": (front(FRAMES / 255), r"frame 0: camera 'front' is float64 of shape \(16, 20, 3\), expected uint8"),
    "size": (front([*FRAMES[:6], FRAMES[6][:, :9]]), "frame 6: camera 'front' has 9×16 pixels, the first frame 20×16"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_episode_names_the_place(changes, message):
    with pytest.raises(EpisodeError, match=message) as error:
        checked_episode(replace(small_episode(), **changes), small_config())
    assert str(error.value).startswith("small source, episode 0")


@pytest.mark.parametrize("relative", [False, True])
def test_text_decodes_to_the_raw_values_within_half_a_bin(relative):
    episode = small_episode()
    config = with_statistics(small_config(relative_actions=relative), episode)
    columns = chat_columns(checked_episode(episode, config), config, episode_index=3)
    tokenizer, quantizer = config.action_tokenizer(), config.state_quantizer()
    half_bin = (tokenizer.quantizer.high - tokenizer.quantizer.low) / config.num_bins / 2
    windows = action_windows(episode.actions, config.chunk_size)
    for frame in range(7):
        chunk = tokenizer.decode(columns["action"][frame], episode.states[frame])
        assert (np.abs(chunk - windows[frame]) <= half_bin + 1e-4).all()
        state = quantizer.decode(parse_integers(columns["state"][frame], 3, config.num_bins))
        assert np.abs(state - episode.states[frame]).max() <= (quantizer.high - quantizer.low).max() / 2 / 511 + 1e-4
        assert columns["raw_action"][frame] == windows[frame].ravel().tolist()  # absolute, also when relative
        assert columns["raw_state"][frame] == episode.states[frame].tolist()
        assert columns["completion"][frame] == [{"role": "assistant", "content": columns["action"][frame]}]
        prompt = f"task 0\nState: {columns['state'][frame]}"
        assert columns["prompt"][frame] == [{"role": "user", "content": prompt}]
    assert columns["episode_index"] == [3] * 7
    assert columns["frame_index"] == list(range(7))
    assert list(columns) == list(FEATURES)


def test_state_is_written_but_not_prompted_without_use_state():
    episode = small_episode()
    config = with_statistics(small_config(use_state=False), episode)
    columns = chat_columns(checked_episode(episode, config), config, 0)
    assert len(columns["state"][0].split()) == 3
    assert columns["prompt"][0] == [{"role": "user", "content": "task 0"}]


def test_state_that_never_moves_matters_only_where_it_is_used():
    episode = small_episode()
    episode.states[:, 2] = 1
    config = with_statistics(small_config(use_state=False), episode)
    columns = chat_columns(checked_episode(episode, config), config, 0)
    assert columns["state"] == [""] * 7
    with pytest.raises(ValueError, match="dimension 2 has zero range"):
        chat_columns(checked_episode(episode, config), config.replace(use_state=True), 0)


def test_without_a_state():
    episode = replace(small_episode(), states=None)
    config = with_statistics(small_config(state_dim=0, use_state=False), episode)
    columns = chat_columns(checked_episode(episode, config), config, 0)
    assert columns["state"] == [""] * 7
    assert columns["raw_state"] == [[]] * 7
