"""What robots send becomes observations, and what does not fit is refused by name."""

import io

import numpy as np
import pytest
from PIL import Image

from vla0_trl import VLAConfig
from vla0_trl.actions import NormStats
from vla0_trl.envs.pusht.env import ACTION_NAMES, TASK
from vla0_trl.serving import requests
from vla0_trl.serving.layouts import LAYOUTS, Layout, load_layout
from vla0_trl.serving.requests import RequestReader

RNG = np.random.default_rng(0)


def stats(dim: int, largest: float = 1.0) -> NormStats:
    return NormStats.from_array(np.stack([np.full(dim, -largest), np.full(dim, largest)]).astype(np.float32))


def config(
    cameras: list[str], state_dim: int, action_dim: int, chunk_size: int = 8, largest: float = 1.0
) -> VLAConfig:
    return VLAConfig(
        cameras=cameras,
        state_dim=state_dim,
        action_dim=action_dim,
        chunk_size=chunk_size,
        use_state=True,
        action_stats=stats(action_dim, largest),
        state_stats=stats(state_dim, largest),
    )


def picture(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, np.uint8)


LIBERO = {
    "observation/image": picture(224, 224, 3),
    "observation/wrist_image": picture(224, 224, 3),
    "observation/state": RNG.normal(size=8),
    "prompt": "pick it up",
}
DROID = {
    "observation/exterior_image_1_left": picture(224, 224, 3),
    "observation/wrist_image_left": picture(224, 224, 3),
    "observation/joint_position": RNG.normal(size=7),
    "observation/gripper_position": RNG.normal(size=1),
    "prompt": "pick it up",
}
ALOHA = {
    "state": RNG.normal(size=14),
    "images": {f"cam_{name}": picture(3, 224, 224) for name in ("high", "low", "left_wrist", "right_wrist")},
    "prompt": "fold it",
}
SO100 = {name: float(place) for place, name in enumerate(LAYOUTS["so100"].state)}
SO100 |= {"front": picture(48, 64, 3), "prompt": "pick it up", "units": "degrees"}


@pytest.mark.parametrize("wrist", ["wrist_image", "image2"])
def test_liberos_client(wrist):
    request = RequestReader(LAYOUTS["libero"], config(["image", wrist], 8, 7)).read(LIBERO)
    assert np.array_equal(request.observation["images"]["image"], LIBERO["observation/image"])
    assert np.array_equal(request.observation["images"][wrist], LIBERO["observation/wrist_image"])
    assert np.array_equal(request.observation["state"], LIBERO["observation/state"])
    assert request.observation["task"] == "pick it up"
    assert (request.episode, request.prefix, request.deadline_s) == (None, None, None)


def test_a_camera_that_the_checkpoint_does_not_see_may_be_sent():
    request = RequestReader(LAYOUTS["libero"], config(["image"], 8, 7)).read(LIBERO)
    assert list(request.observation["images"]) == ["image"]


def test_droids_joints_and_gripper_are_one_state():
    cameras = ["exterior_image_1_left", "wrist_image_left"]
    request = RequestReader(LAYOUTS["droid"], config(cameras, 8, 8, chunk_size=10)).read(DROID)
    joined = np.concatenate([DROID["observation/joint_position"], DROID["observation/gripper_position"]])
    assert np.array_equal(request.observation["state"], joined)


def test_alohas_pictures_have_their_channels_first():
    request = RequestReader(LAYOUTS["aloha"], config(["cam_high", "cam_left_wrist"], 14, 14, 25)).read(ALOHA)
    assert np.array_equal(request.observation["images"]["cam_high"], ALOHA["images"]["cam_high"].transpose(1, 2, 0))


def test_an_so100s_joints_are_the_state():
    request = RequestReader(LAYOUTS["so100"], config(["front"], 6, 6), "degrees").read(SO100)
    assert request.observation["state"].tolist() == [0, 1, 2, 3, 4, 5]


def test_pushts_default_task_is_the_simulators():
    assert LAYOUTS["pusht"].default_task == TASK
    message = {"observation/image": picture(96, 96, 3), "observation/state": np.zeros(2)}
    assert RequestReader(LAYOUTS["pusht"], config(["image"], 2, 2)).read(message).observation["task"] == TASK


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_reads_its_own_example(name):
    layout = LAYOUTS[name]
    cameras = ["front"] if isinstance(layout.images, str) else [names[0] for names in layout.images.values()]
    state, action = (len(names or "ab") for names in (layout.state_names, layout.action_names))
    reader = RequestReader(layout, config(cameras, state, action, 25), "degrees" if layout.needs_units else None)
    assert reader.read(reader.example()).observation["images"].keys() == set(cameras)


# -- what does not fit


def without(message: dict, *keys: str, **more) -> dict:
    return {key: value for key, value in message.items() if key not in keys} | more


@pytest.mark.parametrize(
    "message, error",
    [
        ([1, 2], r"a request is a map of \['observation/image'.*not list"),
        ({1: 2}, "has a key that is int"),
        (without(LIBERO, "prompt"), r"lacks \['prompt'\]; this server takes \['observation/image'"),
        (LIBERO | {"observation/depth": 1}, r"has unknown keys \['observation/depth'\]"),
        (without(LIBERO, "observation/state", state=LIBERO["observation/state"]), r"lacks .* and has unknown keys"),
        (LIBERO | {"observation/state": np.zeros(7)}, r"the state has 7 numbers .* the checkpoint reads 8"),
        (LIBERO | {"observation/state": "0 0"}, "must be a number or a vector of numbers"),
        (LIBERO | {"observation/state": np.full(8, np.nan)}, "must be a vector of finite numbers"),
        (LIBERO | {"observation/image": picture(2, 224, 224, 3)}, "camera 'image': .* is not one picture"),
        (LIBERO | {"observation/image": [1, 2]}, "must be an array .*, not list"),
        (LIBERO | {"observation/image": b"no picture"}, "is no JPEG or PNG that can be read"),
        (LIBERO | {"prompt": 5}, "'task' must be the instruction as a str, got int"),
        (LIBERO | {"prompt": "a" * 2001}, "prompt has 2001 characters, at most 2000 are read"),
        (LIBERO | {"prefix": np.array(["a"])}, r"'prefix' must be an array of \(d, 7\) actions"),
        (LIBERO | {"episode": [1]}, "'episode' must be a short text or a whole number"),
        (LIBERO | {"episode": "a" * 201}, "'episode' must be a short text"),
        (LIBERO | {"noise": 0.5}, "'noise' must be a short text or a whole number"),
        (LIBERO | {"deadline_s": -1}, "'deadline_s' must be a number of seconds above 0"),
        (LIBERO | {"units": "degrees"}, "'units' would do nothing"),
        ({"a": {"b": {"c": {"d": {"e": 1}}}}}, "more than 4 maps in each other"),
    ],
)
def test_a_message_that_does_not_fit_is_one_line(message, error):
    with pytest.raises(ValueError, match=error):
        RequestReader(LAYOUTS["libero"], config(["image", "image2"], 8, 7)).read(message)


@pytest.mark.parametrize(
    "layout, checkpoint, units, error",
    [
        (
            "libero",
            config(["front"], 8, 7),
            None,
            r"sees cameras \['front'\], the layout .* name the key of front",
        ),
        ("libero", config(["image"], 6, 7), None, "the layout's state is .*, the checkpoint's state_dim is 6"),
        ("droid", config(["image"], 8, 8, chunk_size=8), None, "executes 10 actions .* predicts chunk_size=8"),
        ("libero", config(["image"], 8, 7), "degrees", "--units degrees would do nothing"),
        ("so100", config(["front"], 6, 6), None, "--units must say what the checkpoint's joints were recorded in"),
        (
            "so100",
            config(["front"], 6, 6, largest=170),
            "normalized",
            "--units normalized, but the checkpoint's state reaches 170",
        ),
        (
            "so100",
            config(["front"], 6, 6).replace(units="degrees"),
            "normalized",
            "--units normalized, but the checkpoint's joints were recorded in degrees",
        ),
    ],
)
def test_a_checkpoint_of_another_robot_is_refused(layout, checkpoint, units, error):
    with pytest.raises(ValueError, match=error):
        RequestReader(LAYOUTS[layout], checkpoint, units)


def test_names_are_the_layouts_else_the_checkpoints_else_unknown():
    told = RequestReader(LAYOUTS["plain"], config(["image"], 2, 2)).describe()
    assert (told["state_names"], told["action_names"], told["units"]) == (None, None, None)
    assert told["options"] == ["episode", "noise", "prefix", "deadline_s"]
    named = config(["image"], 2, 2).replace(state_names=["x", "y"], action_names=["dx", "dy"], units="pixels")
    told = RequestReader(LAYOUTS["pusht"], named).describe()
    assert (told["state_names"], told["action_names"], told["units"]) == (["x", "y"], ACTION_NAMES, "pixels")
    assert RequestReader(LAYOUTS["plain"], named).describe()["action_names"] == ["dx", "dy"]
    other = config(["front"], 6, 6).replace(action_names=LAYOUTS["so100"].action_names[::-1])
    with pytest.raises(ValueError, match=r"the checkpoint's action is in another order, \['gripper.pos'"):
        RequestReader(LAYOUTS["so100"], other, "degrees")


def test_units_that_were_said_when_converting_need_not_be_said_again():
    checkpoint = config(["front"], 6, 6).replace(units="degrees")
    assert RequestReader(LAYOUTS["so100"], checkpoint).units == "degrees"


@pytest.mark.parametrize(
    "changes, error",
    [
        ({"units": "degrees"}, "has units 'degrees', the checkpoint's are 'normalized'"),
        ({"units": None}, "does not say 'units', the checkpoint's are 'normalized'"),
        ({"units": "normalized", "elbow_flex.pos": 101.0}, "the state reaches 101: is it normalized"),
    ],
)
def test_degrees_are_never_taken_for_shares_of_the_range(changes, error):
    reader = RequestReader(LAYOUTS["so100"], config(["front"], 6, 6, largest=100), "normalized")
    with pytest.raises(ValueError, match=error):
        reader.read(SO100 | changes)


# -- compressed pictures


def encoded(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def test_png_comes_back_and_jpeg_nearly():
    reader = RequestReader(LAYOUTS["plain"], config(["image"], 2, 2))
    smooth = np.add.outer(np.arange(48), np.arange(64))[..., None].repeat(3, 2).astype(np.uint8)
    message = {"observation/state": np.zeros(2), "prompt": "go"}
    for kind, most in (("PNG", 0), ("JPEG", 4)):
        request = reader.read(message | {"observation/image": encoded(Image.fromarray(smooth), kind)})
        assert np.abs(request.observation["images"]["image"].astype(int) - smooth).max() <= most


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF"])
def test_other_formats_are_not_read(kind):
    reader = RequestReader(LAYOUTS["plain"], config(["image"], 2, 2))
    data = encoded(Image.new("RGB", (8, 8)), kind)
    with pytest.raises(ValueError, match="is no JPEG or PNG"):
        reader.read({"observation/image": data, "observation/state": np.zeros(2), "prompt": "go"})


def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch):
    bomb = encoded(Image.new("1", (20_000, 20_000)), "PNG")
    assert len(bomb) < 100_000
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=rf"20000 × 20000 pixels, at most {requests.MAX_PIXELS}|exceeds limit"):
        requests._picture(bomb, "observation/image")


# -- layouts of files


def test_a_layout_file(tmp_path):
    path = tmp_path / "robot.yaml"
    text = "images: {cam/front: front, cam/wrist: [wrist, gripper]}\nstate: [joints]\ntask: command\nchunk_size: 2.0\n"
    path.write_text(text)
    layout = load_layout(str(path))
    images = {"cam/front": ["front"], "cam/wrist": ["wrist", "gripper"]}
    assert layout == Layout(images, ["joints"], task="command", chunk_size=2)
    assert type(layout.chunk_size) is int  # replies are cut there


@pytest.mark.parametrize(
    "text, error",
    [
        ("images: [a]", "images is .*, wanted an object with fields"),
        ("images: camera", "wanted one key with {camera} in it, or a map"),
        ("state: [a]", "images is absent"),
        ("images: {a: b}\nstat: [a]", "'stat' is no field of a layout, which has images, state"),
        ("images: {a: b}\nneeds_units: maybe", "needs_units is 'maybe', wanted true or false"),
        ("- a", "must hold fields such as images"),
        ("images: {", "is not YAML"),
        ("images: !!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_a_layout_file_that_is_wrong_is_one_line(text, error, tmp_path):
    path = tmp_path / "robot.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=error) as caught:
        load_layout(str(path))
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_an_unknown_layout_names_those_that_are(tmp_path):
    with pytest.raises(ValueError, match="--layout ur5 is no file, and none of plain, libero, pusht, droid"):
        load_layout("ur5")
