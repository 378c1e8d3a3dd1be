import numpy as np
import pytest
import torch
from PIL import Image
from support.backbones import QWEN, SMOLVLM
from support.general import shared_path
from torchvision.transforms.v2 import functional as tvF
from transformers import AutoConfig, AutoProcessor

from vla0_trl.models.loading import load_processor, set_image_size
from vla0_trl.processing.images import crop, draw_jitter, jitter_colors, model_inputs, stack_cameras


def smooth_images(count: int, side: int = 256) -> np.ndarray:
    """Photograph-like: low frequencies."""
    noise = np.random.default_rng(0).integers(0, 256, (count, 12, 12, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(n).resize((side, side), Image.Resampling.BICUBIC)) for n in noise])


def test_crops_are_central_or_seeded():
    image = np.arange(96 * 96 * 3).reshape(96, 96, 3)
    assert np.array_equal(crop(image, 84 / 96), image[6:90, 6:90])
    assert crop(image, 1.0).shape == image.shape
    random = [crop(image, 84 / 96, np.random.default_rng(seed)) for seed in range(200)]
    corners = {tuple(np.argwhere(image[..., 0] == c[0, 0, 0])[0].tolist()) for c in random}
    assert {c.shape for c in random} == {(84, 84, 3)}
    assert min(corners) >= (0, 0) and max(top for top, _ in corners) == 12 and len(corners) > 100


def test_equals_the_processors_own_call(backbone):
    """On the same images: our batched path and `processor(images=…)`, with its own resizing."""
    _, processor, config = backbone
    images = smooth_images(4)
    config = config.replace(cameras=["a", "b"])
    nested = [[Image.fromarray(images[0]), Image.fromarray(images[1])], [Image.fromarray(i) for i in images[2:]]]
    samples = [[images[0], images[1]], [images[2], images[3]]]
    ours = model_inputs(processor.image_processor, stack_cameras(samples, config.cameras), config)
    theirs = processor.image_processor(nested, return_tensors="pt")
    assert set(ours) == {"pixel_values", "image_grid_thw"} & set(theirs)
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-6)


def test_all_of_it_is_on_the_images_device(backbone):
    """`meta` stands for a GPU: nothing may be left on the CPU, where the model would meet it."""
    _, processor, config = backbone
    inputs = model_inputs(
        processor.image_processor, [torch.zeros(2, 3, 48, 48, dtype=torch.uint8, device="meta")], config
    )
    assert "pixel_values" in inputs and {value.device.type for value in inputs.values()} == {"meta"}


def test_close_to_smolvlms_original_lanczos():
    """Bicubic stands in for Lanczos, on every device: what that costs on a smooth 256 px image."""
    folder = shared_path(f"data/models/{SMOLVLM}")
    original = AutoProcessor.from_pretrained(folder).image_processor
    images = smooth_images(2)
    size = {"longest_edge": 512}
    theirs = original([[Image.fromarray(i)] for i in images], do_image_splitting=False, size=size, return_tensors="pt")
    from vla0_trl import VLAConfig

    config = VLAConfig(image_size=512)
    processor = load_processor(folder, config)
    ours = model_inputs(processor.image_processor, stack_cameras([[i] for i in images], ["image"]), config)
    assert (ours["pixel_values"] - theirs["pixel_values"]).abs().mean() < 2 / 255


def test_jitter_equals_torchvisions_factors_and_is_drawn_per_sample():
    images = torch.from_numpy(smooth_images(3, 32)).permute(0, 3, 1, 2)
    neutral = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    assert torch.equal(jitter_colors(images, neutral.repeat(3, 1)), images)
    for position, adjust in enumerate((tvF.adjust_brightness, tvF.adjust_contrast, tvF.adjust_saturation)):
        factors = neutral.repeat(3, 1)
        factors[:, position] = torch.tensor([0.8, 1.0, 1.15])
        expected = torch.stack([adjust(i, f.item()) for i, f in zip(images, factors[:, position], strict=True)])
        assert (jitter_colors(images, factors).int() - expected.int()).abs().max() <= 2
    hue = jitter_colors(images, torch.tensor([[1.0, 1.0, 1.0, h] for h in (0.05, 0.5, 1.0)]))
    assert not torch.equal(hue[0], images[0]) and (hue[2].int() - images[2].int()).abs().max() <= 1
    gray = torch.full((1, 3, 4, 4), 77, dtype=torch.uint8)
    assert torch.equal(jitter_colors(gray, torch.tensor([[1.0, 0.5, 1.5, 0.3]])), gray)


def test_jitter_draws_within_its_strength():
    draws = np.stack([draw_jitter([0.2, 0.1, 0.0, 0.05], np.random.default_rng(seed)) for seed in range(500)])
    assert (abs(draws - [1, 1, 1, 0]).max(0) <= [0.2001, 0.1001, 1e-6, 0.0501]).all()
    assert (abs(draws - [1, 1, 1, 0]).max(0) >= [0.19, 0.09, 0, 0.045]).all()


def test_tiles_are_side_by_side_in_order(example_config):
    config = example_config.replace(cameras=["left", "right"], tile_images=True, image_size=224)
    processor = load_processor(shared_path(f"data/models/{QWEN}"), config)
    black, white = np.zeros((256, 256, 3), np.uint8), np.full((256, 256, 3), 255, np.uint8)
    inputs = model_inputs(processor.image_processor, stack_cameras([[black, white]], config.cameras), config)
    assert inputs["image_grid_thw"].tolist() == [[1, 16, 32]]
    # Qwen packs 2×2 patches row by row: the first half of the first row of blocks is the left camera.
    first_row = inputs["pixel_values"][: 4 * 16].mean(1)
    assert (first_row[:32] < 0).all() and (first_row[32:] > 0).all()
    whole = processor.image_processor([Image.fromarray(np.concatenate([black, white], 1))], return_tensors="pt")
    assert whole["image_grid_thw"].tolist() == [[1, 16, 32]]


def test_cameras_of_different_resolution_go_together(backbone):
    _, processor, config = backbone
    config = config.replace(cameras=["a", "b"])
    samples = [[np.zeros((48, 64, 3), np.uint8), np.zeros((100, 100, 3), np.uint8)]]
    inputs = model_inputs(processor.image_processor, stack_cameras(samples, config.cameras), config)
    assert torch.isfinite(inputs["pixel_values"]).all()


@pytest.mark.parametrize("name, size, message", [(SMOLVLM, 500, "448 or 512"), (QWEN, 225, "224 or 252")])
def test_sizes_that_patches_do_not_fit_raise(example_config, name, size, message):
    with pytest.raises(ValueError, match=message):
        load_processor(shared_path(f"data/models/{name}"), example_config.replace(image_size=size))


def test_smolvlm_does_not_tile(example_config):
    folder = shared_path(f"data/models/{SMOLVLM}")
    processor = AutoProcessor.from_pretrained(folder)
    backbone = AutoConfig.from_pretrained(folder)
    with pytest.raises(ValueError, match="tile_images"):
        set_image_size(processor, backbone, example_config.replace(tile_images=True, image_size=512))
