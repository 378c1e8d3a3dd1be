"""Episodes: windows, checks, chat rows."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from datasets import Image as HubImage
from PIL import Image
from support.episodes import small_config, small_episode

from vla0_trl.actions import parse_integers
from vla0_trl.config import VLAConfig
from vla0_trl.data.chat_dataset import FEATURES, RAW_SCHEMA, chat_rows, with_statistics
from vla0_trl.data.episodes import Episode, EpisodeError, action_windows, raw_rows
from vla0_trl.processing.images import decoded_image, upright


def encoded(pixels: np.ndarray, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def raw_table(episode: Episode, config: VLAConfig, index: int = 0) -> pa.Table:
    return pa.concat_tables(pa.table(piece, RAW_SCHEMA) for piece in raw_rows(episode, config, index))


def stored_images(episode: Episode, config: VLAConfig) -> dict[str, list[bytes]]:
    """Camera -> image files, frame by frame."""
    views = raw_table(episode, config)["images"].to_pylist()
    return {camera: [view[at]["bytes"] for view in views] for at, camera in enumerate(config.cameras)}


def converted(config: VLAConfig, episode: Episode, index: int = 0) -> tuple[VLAConfig, dict[str, list]]:
    """The config with the episode's statistics, and its rows."""
    raw = raw_table(episode, config, index)
    config = with_statistics(config, lambda: [raw])
    return config, chat_rows(raw, config).to_pydict()


def test_windows_repeat_the_last_action():
    actions = np.array([[1, 10], [2, 20], [3, 30]], np.float32)
    windows = action_windows(actions, 2)
    assert windows.tolist() == [[[1, 10], [2, 20]], [[2, 20], [3, 30]], [[3, 30], [3, 30]]]
    assert windows.dtype == np.float32


def test_episode_shorter_than_a_chunk():
    assert action_windows(np.array([[5.0]], np.float32), 3).tolist() == [[[5], [5], [5]]]


def test_rows_keep_pixels_and_only_the_chosen_cameras():
    episode = small_episode()
    config = small_config(cameras=["wrist"])
    assert {len(view) for view in raw_table(episode, config)["images"].to_pylist()} == {1}
    for frame, data in zip(episode.images["wrist"], stored_images(episode, config)["wrist"], strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), frame)


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_encoded_frames_pass_through_untouched(form):
    episode = small_episode()
    frames = [encoded(frame, form) for frame in episode.images["front"]]
    episode.images["front"] = frames
    assert stored_images(episode, small_config())["front"] == frames


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
        raw_table(replace(small_episode(), **changes), small_config())
    assert str(error.value).startswith("small source, episode 0")


@pytest.mark.parametrize("relative", [False, True])
def test_text_decodes_to_the_raw_values_within_half_a_bin(relative):
    episode = small_episode()
    config, columns = converted(small_config(relative_actions=relative), episode, index=3)
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
    _, columns = converted(small_config(use_state=False), episode)
    assert len(columns["state"][0].split()) == 3
    assert columns["prompt"][0] == [{"role": "user", "content": "task 0"}]


def test_state_that_never_moves_is_written_as_0():
    episode = small_episode()
    episode.states[:, 2] = 1
    config, columns = converted(small_config(), episode)
    assert {text.split()[2] for text in columns["state"]} == {"0"}
    assert config.state_quantizer().decode(np.array([[0, 0, 0], [1, 1, 300]]))[:, 2].tolist() == [1, 1]


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_exif_orientation_is_the_same_for_every_reader(tmp_path, form):
    """Stored upright and without EXIF; what was stored with it before is turned by all alike."""
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, exif=exif, **({"quality": 100} if form == "JPEG" else {}))
    turned = np.rot90(pixels, -1)
    episode = replace(small_episode(), images={"front": [buffer.getvalue()] * 7, "wrist": [encoded(pixels)] * 7})
    raw = raw_table(episode, small_config())
    stored = Image.open(io.BytesIO(raw["images"][0].as_py()[0]["bytes"]))
    assert stored.format == form and not stored.getexif() and stored.size == (16, 24)
    assert np.abs(np.asarray(stored).astype(int) - turned).max() < 12
    before = {"bytes": buffer.getvalue(), "path": None}
    decoded = HubImage().decode_example(before)
    for image in (decoded_image(before), decoded_image(decoded), np.asarray(upright(Image.open(buffer)))):
        assert np.abs(image.astype(int) - turned).max() < 12


def test_a_tiff_says_what_it_is():
    images = small_episode().images | {"front": [encoded(np.full((8, 8), 1234, np.uint16), "TIFF")] * 7}
    with pytest.raises(EpisodeError, match="camera 'front' is TIFF, expected PNG or JPEG"):
        raw_table(replace(small_episode(), images=images), small_config())


def test_without_a_state():
    episode = replace(small_episode(), states=None)
    _, columns = converted(small_config(state_dim=0, use_state=False), episode)
    assert columns["state"] == [""] * 7
    assert columns["raw_state"] == [[]] * 7
