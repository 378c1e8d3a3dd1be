"""The policy that LeRobot calls once in a tick: it asks ahead, and never lets the robot's loop wait."""

from __future__ import annotations

import atexit
import io
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.keyboard_input import create_key_listener
from PIL import Image
from torch import Tensor, from_numpy, uint8

from .client import RobotClient
from .configuration_vla0 import VLA0Config
from .safety import JointLimits, SafeArm

logger = logging.getLogger(__name__)

REPORT_S = 10.0
PAUSE_S = 0.5  # a longer time without a tick: somebody else moved the arm, and what was planned is of another scene
NOT_TRAINED = "vla0 is trained by vla0_trl (recipes/so100), not by LeRobot"


class VLA0Policy(PreTrainedPolicy):
    """See [`VLA0Config`]. Its actions are the arm's next targets, held within limits (`safety.py`).

    `ValueError`: what is served is not for an arm of joint positions, or its joints have other units.
    """

    config_class = VLA0Config
    name = "vla0"

    def __init__(self, config: VLA0Config, **_: Any):
        super().__init__(config)
        key = config.api_key_file and Path(config.api_key_file).read_text().strip()
        self.client = RobotClient(config.url, key, config.timeout_s)
        told = self.client.metadata
        self.joints, self.cameras = told["action_names"], told["cameras"]
        if self.joints is None or self.joints != told["state_names"]:
            raise ValueError(f"{config.url} serves no arm whose actions are joint positions: serve.py --layout so100")
        if told["units"] != config.units:
            raise ValueError(f"--policy.units={config.units}, but the policy's joints are in {told['units']}")
        # Compared by LeRobot with the robot's cameras, and by ours with what it hands over.
        config.input_features = {
            f"observation.images.{camera}": PolicyFeature(FeatureType.VISUAL, (3, 0, 0)) for camera in self.cameras
        }
        self.arm = SafeArm(JointLimits.of(told, config.margin, config.max_step))
        self.ticks = self.empty = self.empty_at_first = 0
        self._began = self._last = self._reported = 0.0
        self._keys = create_key_listener(self._pressed, controls_help=f"{config.stop_key}: emergency stop")
        atexit.register(self._report)

    @classmethod
    def from_pretrained(cls, pretrained_name_or_path: Any = None, *, config: VLA0Config, **_: Any) -> VLA0Policy:
        """There are no weights here: a connection is opened."""
        return cls(config)

    def reset(self) -> None:
        """An episode begins; the emergency stop lasts."""
        self.client.reset()
        self.arm.reset()

    def select_action(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """The next targets, float32 (1, D), of an observation as LeRobot's loop gives it."""
        now = time.perf_counter()
        if now - self._last > PAUSE_S:
            self.reset()
        if not self.ticks:
            self._began = self._reported = now
        self._last = now
        measured = batch["observation.state"][0].cpu().numpy().astype(np.float64)
        if len(measured) != len(self.joints):
            raise ValueError(f"the robot's state has {len(measured)} numbers, the policy's joints are {self.joints}")
        action = self.client.step(self._message(batch, measured))
        self.ticks += 1
        if action is None:
            self.empty += 1
            self.empty_at_first += self.empty == self.ticks
        if now - self._reported > REPORT_S:
            self._report()
        return from_numpy(self.arm.next_target(action, measured).astype(np.float32))[None]

    def _message(self, batch: dict[str, Any], measured: np.ndarray) -> Callable[[], dict[str, Any]]:
        pictures = {}
        for camera, key in self.cameras.items():
            name = f"observation.images.{camera}"
            if name not in batch:
                raise ValueError(f"the policy sees camera {camera!r}, which this robot does not have: rename its own")
            pictures[key] = batch[name][0]
        keys = self.client.metadata["state"]
        state = dict(zip(keys, measured.tolist(), strict=True)) if len(keys) > 1 else {keys[0]: measured}
        said = {self.client.metadata["task"]: batch["task"], "units": self.config.units}
        return lambda: {key: self._jpeg(picture) for key, picture in pictures.items()} | state | said

    def _jpeg(self, picture: Tensor) -> bytes:
        """Of float (3, H, W), 0…1."""
        pixels = (picture.cpu() * 255).round().to(uint8).permute(1, 2, 0).numpy()
        stream = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(
            stream, "JPEG", quality=self.config.jpeg_quality, subsampling=0
        )
        return stream.getvalue()

    def _pressed(self, key: str) -> None:
        if key == self.config.stop_key and not self.arm.stopped:
            self.arm.stop()
            logger.warning("emergency stop: the arm holds its position until lerobot-rollout is started again")

    def _report(self) -> None:
        self._reported = self._last
        if not self.ticks:
            return
        client, rate = self.client, self.ticks / max(self._last - self._began, 1e-9)
        p50, p95 = (1000 * np.percentile(client.latencies_s, percent) for percent in (50, 95))
        logger.info(
            "vla0: %d ticks, %.1f per second; %d empty before the first action, %d after; %d actions of replies were "
            "too old and left out; latency p50 %.0f, p95 %.0f ms; server lost %d times%s",
            self.ticks,
            rate,
            self.empty_at_first,
            self.empty - self.empty_at_first,
            client.stream.left_out,
            p50,
            p95,
            client.losses,
            f" ({client.last_error})" if client.last_error else "",
        )
        if self.ticks > 100 and not 0.8 < rate / client.metadata["fps"] < 1.25:
            logger.warning("vla0: the policy was trained at %s ticks per second: --fps", client.metadata["fps"])

    def predict_action_chunk(self, batch: dict[str, Any], **_: Any) -> Tensor:
        raise NotImplementedError("vla0 asks ahead by itself: --inference.type=sync")

    def get_optim_params(self) -> dict:
        raise NotImplementedError(NOT_TRAINED)

    def forward(self, batch: dict[str, Tensor]) -> Any:
        raise NotImplementedError(NOT_TRAINED)
