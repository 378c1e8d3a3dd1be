"""What a policy is shown: pictures of one meaning are converted, all others refused by name; never a black one."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from vla0_trl.policy.observation import camera_image, check_observation

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
RGB[0, 0] = RGB[0, 1] = 0
RGB[-1, -1] = 255
GREY = RGB[..., 0]
THREE_GREY = np.repeat(GREY[..., None], 3, axis=2)
OPAQUE = np.dstack([RGB, np.full((5, 7), 255, np.uint8)])


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (RGB, RGB),
        (RGB / 255, RGB),
        ((RGB / 255).astype(np.float32), RGB),
        ((RGB / 255).astype(np.float16), RGB),
        (torch.tensor(RGB).permute(2, 0, 1) / 255, RGB),  # as LeRobot's datasets give it
        ((torch.tensor(RGB) / 255).double(), RGB),
        (RGB.transpose(2, 0, 1), RGB),
        (RGB.astype(np.int64), RGB),
        (RGB.tolist(), RGB),
        (GREY, THREE_GREY),
        (GREY[..., None], THREE_GREY),
        (GREY[None] / 255, THREE_GREY),
        (OPAQUE, RGB),
        (OPAQUE.transpose(2, 0, 1) / 255, RGB),
        (Image.fromarray(RGB), RGB),
        (Image.fromarray(GREY), THREE_GREY),
        (Image.fromarray(OPAQUE), RGB),
        (Image.fromarray(GREY).convert("P"), THREE_GREY),
        (Image.fromarray(GREY >= 128).convert("1"), np.where(THREE_GREY >= 128, 255, 0)),
        (RGB[::-1, ::-1], RGB[::-1, ::-1]),
    ],
)
def test_a_picture_of_one_meaning_is_converted(image, expected):
    converted = camera_image(image, "front")
    assert converted.dtype == np.uint8
    np.testing.assert_array_equal(converted, expected)


def test_a_photograph_is_turned_as_its_exif_data_say():
    image = Image.fromarray(RGB)
    image.getexif()[0x0112] = 6  # to be turned by 90° clockwise
    np.testing.assert_array_equal(camera_image(image, "front"), np.rot90(RGB, -1))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (RGB.astype(np.uint16), "uint16 of shape (5, 7, 3) may hold 10, 12 or 16 bits, or depth: scale it yourself"),
        (Image.fromarray(GREY.astype(np.uint16)), "uint16 of shape (5, 7) may hold"),
        (RGB.astype(np.float32), "float32 of shape (5, 7, 3) has values from 0 to 255, and floats are in [0, 1]"),
        (RGB / 127.5 - 1, "has values from -1 to 1, and floats are in [0, 1]"),
        (np.full((5, 7, 3), np.nan), "has values from nan to nan, and floats are in [0, 1]"),
        (RGB.astype(np.int32) * 3, "scale them to 0…255"),
        (RGB.astype(np.int16) - 1, "has values from -1 to"),
        (OPAQUE - np.uint8(1), "is not opaque everywhere: drop the fourth channel"),
        (RGB[None], "uint8 of shape (1, 5, 7, 3) is not one picture"),
        (RGB[..., :2], "has no axis of 1, 3 or 4 channels"),
        (np.zeros((3, 5, 4), np.uint8), "may have its channels first or last"),
        (np.zeros((0, 7, 3), np.uint8), "has no pixels"),
        (np.zeros((0, 7, 3)), "has no pixels"),
        (RGB > 5, "is not of numbers"),
        (None, "is not of numbers"),
        ("front.png", "is not of numbers"),
    ],
)
def test_a_picture_of_several_meanings_is_refused_by_name(image, message):
    with pytest.raises(ValueError, match=rf"^camera 'front': .*{re.escape(message)}") as error:
        camera_image(image, "front")
    assert str(error.value).endswith("(the contract is uint8 (H, W, 3), RGB)") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": RGB}, "'images' must be a dict, camera to picture, not ndarray"),
        ({"task": None}, "'task' must be the instruction as a str, got NoneType"),
        ({"state": None}, "this policy reads the state, but the observation has none"),
        (
            {"state": [0.0, np.inf]},
            "'state' must be a vector of finite numbers, got float64 of shape (2,): [0.0, inf]",
        ),
        ({"state": np.zeros((1, 2))}, "got float64 of shape (1, 2)"),
        ({"state": ["a", "b"]}, "must be a vector of finite numbers"),
    ],
)
def test_an_observation_that_lacks_something_is_one_line(example_config, changes, message):
    observation = {"images": {"image": RGB}, "task": "push", "state": np.zeros(2)} | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        check_observation(observation, example_config)


def test_what_a_policy_does_not_read_is_not_looked_at(example_config):
    config = example_config.replace(use_state=False)
    images = {"image": RGB / 255, "depth": GREY.astype(np.uint16)}
    checked = check_observation({"images": images, "task": "push", "episode": 7}, config)
    np.testing.assert_array_equal(checked["images"]["image"], RGB)
    assert (checked["images"].keys(), checked["episode"]) == ({"image"}, 7)
