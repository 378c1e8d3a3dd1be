import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def rows(example_config):
    """Rows whose integers are their values."""
    rng = np.random.default_rng(0)
    return [
        {
            "images": [Image.fromarray(rng.integers(0, 256, (48, 48, 3), np.uint8))],
            "task": "Push it." if i % 2 else "Push that thing over there, please.",
            "raw_state": [12.0, 400.0],
            "raw_action": rng.integers(0, 512, example_config.num_values).astype(float).tolist(),
            "episode_index": i,
            "frame_index": 3,
        }
        for i in range(6)
    ]
