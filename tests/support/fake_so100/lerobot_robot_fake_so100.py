"""An SO-100 and its leader without hardware, for the real LeRobot: it finds them on PYTHONPATH by the folder beside.

The joints are servos that follow their targets with a lag. The camera sees the arm from its side, and a block on the
table that the leader's hand moves the arm to; each connection has its own block. With `log`, each target is a line.
"""

import json
import math
import time
from dataclasses import dataclass

import numpy as np
from lerobot.robots import Robot, RobotConfig
from lerobot.teleoperators import Teleoperator, TeleoperatorConfig
from PIL import Image, ImageDraw

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
HALF_RANGE = np.array([110.0, 105.0, 97.0, 100.0, 160.0])  # degrees that −100…100 stand for; the gripper has 0…100
REST = np.array([0.0, -104.0, 96.0, 60.0, 0.0, 5.0])  # degrees: folded together
MOTION_TICKS, PERIOD_TICKS = 30, 75  # there, and there and back


def above_block(place: float) -> np.ndarray:
    """The joints, in degrees, with the gripper above a block at `place`, 0…1 from near to far."""
    return np.array([30 * (place - 0.5), -60 + 90 * place, 70 - 80 * place, 40 + 20 * place, 110.0, 60.0])


def in_units(degrees: np.ndarray, use_degrees: bool) -> np.ndarray:
    """As LeRobot gives them; −100…100 ends there."""
    scale = 1 if use_degrees else 100 / HALF_RANGE
    body = degrees[:5] * scale
    return np.append(body if use_degrees else body.clip(-100, 100), degrees[5])


class _Arm:
    """What both arms have: joints, and a connection that is a word."""

    _connected = False
    action_features = property(lambda self: {f"{joint}.pos": float for joint in JOINTS})
    is_connected = property(lambda self: self._connected)
    is_calibrated = True

    def connect(self, calibrate: bool = True) -> None:
        self._connected = True

    def disconnect(self) -> None:
        self._connected = False

    def calibrate(self) -> None:
        """It is."""

    def configure(self) -> None:
        """It is."""


@RobotConfig.register_subclass("fake_so100")
@dataclass
class FakeSO100Config(RobotConfig):
    use_degrees: bool = True
    place: float = 0.5
    speed: float = 0.35  # part of the way to its target that a servo goes in a tick
    log: str | None = None


class FakeSO100(_Arm, Robot):
    config_class = FakeSO100Config
    name = "so100_follower"

    def __init__(self, config: FakeSO100Config):
        super().__init__(config)
        self.config = config
        self._joints = in_units(REST, config.use_degrees)
        self._target = self._joints
        self._log = open(config.log, "a", buffering=1) if config.log else None  # noqa: SIM115

    observation_features = property(lambda self: self.action_features | {"front": (240, 320, 3)})
    cameras = property(lambda self: {"front": None})

    def get_observation(self) -> dict:
        self._joints = self._joints + self.config.speed * (self._target - self._joints)
        return dict(zip(self.action_features, self._joints.tolist(), strict=True)) | {"front": self._picture()}

    def send_action(self, action: dict) -> dict:
        self._target = np.array([action[f"{joint}.pos"] for joint in JOINTS])
        if self._log:
            print(json.dumps({"time": time.perf_counter(), "target": self._target.tolist()}), file=self._log)
        return action

    def _picture(self) -> np.ndarray:
        degrees = self._joints[:5] * (1 if self.config.use_degrees else HALF_RANGE / 100)
        image = Image.new("RGB", (320, 240), (205, 198, 185))
        draw = ImageDraw.Draw(image)
        draw.rectangle((0, 200, 320, 240), fill=(120, 96, 70))
        block = 110 + 170 * self.config.place
        draw.rectangle((block - 10, 180, block + 10, 200), fill=(200, 40, 40))
        x, y, angle = 60.0, 200.0, 90.0
        for length, turn, width in ((90, -degrees[1] - 90, 14), (80, -degrees[2] - 40, 11), (45, -degrees[3], 8)):
            angle += turn if length != 90 else turn + 90
            end = x + length * math.cos(math.radians(angle)), y - length * math.sin(math.radians(angle))
            draw.line((x, y, *end), fill=(245, 200, 40), width=width)
            x, y = end
        radius = max(1.0, 3 + self._joints[5] / 12)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=(20, 20, 20), width=3)
        return np.asarray(image)


@TeleoperatorConfig.register_subclass("fake_leader")
@dataclass
class FakeLeaderConfig(TeleoperatorConfig):
    use_degrees: bool = True
    place: float = 0.5


class FakeLeader(_Arm, Teleoperator):
    """A hand that goes to the block and back, over and over."""

    config_class = FakeLeaderConfig
    name = "fake_leader"

    def __init__(self, config: FakeLeaderConfig):
        super().__init__(config)
        self.config, self._tick = config, 0

    feedback_features = property(lambda self: {})

    def send_feedback(self, feedback: dict) -> None:
        """It feels nothing."""

    def get_action(self) -> dict:
        tick = self._tick % PERIOD_TICKS
        self._tick += 1
        way = min(tick, PERIOD_TICKS - tick) / MOTION_TICKS
        part = 0.5 - 0.5 * math.cos(math.pi * min(way, 1.0))
        degrees = REST + part * (above_block(self.config.place) - REST)
        return dict(zip(self.action_features, in_units(degrees, self.config.use_degrees).tolist(), strict=True))
