"""A policy behind Inference Endpoints: with this file beside the checkpoint, it answers over HTTP.

    hf upload USER/policy recipes/jobs/handler.py handler.py
    echo "vla0_trl @ git+https://HOST/USER/FORK" > requirements.txt && hf upload USER/policy requirements.txt

The toolkit calls `EndpointHandler(path)` once and it with each request's JSON:

    {"inputs": {"images": {"image": "<base64 of a PNG or JPEG>"}, "state": [210.0, 97.5], "task": "Push the T …"}}

One observation, or a list of them, which are answered in one batch. The answer has one chunk for each, (chunk_size,
action_dim) in the dataset's units: {"actions": [[[…], …], …], "n_action_steps": 5, "fps": 10.0}.
"""

import base64
import binascii
from typing import Any

from PIL import Image

from vla0_trl import VLAPolicy
from vla0_trl.serving.requests import decoded_picture


class EndpointHandler:
    """Args: path (`str`): the folder of the checkpoint."""

    def __init__(self, path: str = ""):
        self.policy = VLAPolicy.from_pretrained(path or ".")

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        """Chunks of actions; `{"error": …}` for a request that can't be answered."""
        inputs = data.get("inputs", data)
        observations = inputs if isinstance(inputs, list) else [inputs]
        try:
            chunks = self.policy.predict_action_chunk([_observation(each) for each in observations])
        except ValueError as error:
            return {"error": str(error)}
        config = self.policy.config
        return {"actions": chunks.tolist(), "n_action_steps": config.n_action_steps, "fps": config.fps}


def _observation(sent: Any) -> dict[str, Any]:
    """What was sent, with its pictures decoded; `VLAPolicy` checks the rest."""
    if not isinstance(sent, dict) or not isinstance(sent.get("images"), dict):
        raise ValueError('an observation is {"images": {camera: base64}, "state": [...] or null, "task": text}')
    return sent | {"images": {camera: _picture(text, camera) for camera, text in sent["images"].items()}}


def _picture(text: Any, camera: str) -> Image.Image:
    try:
        return decoded_picture(base64.b64decode(text, validate=True))
    except (binascii.Error, TypeError, ValueError) as error:
        raise ValueError(f"camera {camera!r}: not the base64 text of a PNG or JPEG ({error})") from error
