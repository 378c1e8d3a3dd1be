"""Small policies of LeRobot's own classes with random weights, saved by LeRobot; run by its environment's Python.

python lerobot_checkpoints.py FOLDER
"""

import sys
from pathlib import Path

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors

SHARED = {
    "input_features": {
        "observation.image": PolicyFeature(FeatureType.VISUAL, (3, 96, 96)),
        "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
    },
    "output_features": {"action": PolicyFeature(FeatureType.ACTION, (2,))},
    "device": "cpu",
    "push_to_hub": False,
    "pretrained_backbone_weights": None,
}
CONFIGS = {
    "act": ACTConfig(
        **SHARED,
        chunk_size=10,
        n_action_steps=5,
        dim_model=64,
        n_heads=2,
        dim_feedforward=64,
        n_encoder_layers=1,
        use_vae=False,
    ),
    "diffusion": DiffusionConfig(
        **SHARED,
        horizon=8,
        n_action_steps=4,
        down_dims=(32, 64),
        n_groups=4,
        num_train_timesteps=10,
        num_inference_steps=2,
        spatial_softmax_num_keypoints=4,
        crop_shape=(84, 84),
    ),
}
LOW, HIGH = torch.zeros(2), torch.full((2,), 512.0)
NUMBERS = {"min": LOW, "max": HIGH, "mean": (LOW + HIGH) / 2, "std": HIGH / 4}
PIXELS = {
    name: torch.full((3, 1, 1), value) for name, value in {"min": 0.0, "max": 1.0, "mean": 0.5, "std": 0.5}.items()
}
STATS = {"observation.image": PIXELS, "observation.state": NUMBERS, "action": NUMBERS}

torch.manual_seed(0)
for name, config in CONFIGS.items():
    folder = Path(sys.argv[1]) / name
    get_policy_class(name)(config).save_pretrained(folder)
    for processor in make_pre_post_processors(config, dataset_stats=STATS):
        processor.save_pretrained(folder)
