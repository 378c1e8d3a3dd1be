"""What `--policy.…` of lerobot-rollout may say; LeRobot finds policy and processors by this module's name."""

from dataclasses import dataclass

from lerobot.configs.policies import PreTrainedConfig

from .safety import MARGIN


@PreTrainedConfig.register_subclass("vla0")
@dataclass
class VLA0Config(PreTrainedConfig):
    """A policy behind a URL. It is trained and measured by vla0_trl; here it is only asked.

    Args:
        url (`str`): ws://host:port or wss://, of `eval/serve.py --layout so100`.
        api_key_file (`str`, *optional*): a file with the server's key in its one line.
        units (`str`): of this robot's joints: degrees (LeRobot's `use_degrees`, its default) or normalized (−100…100).
            It must be what the server says, and is compared with it.
        timeout_s (`float`): after which the server is taken for lost, and the arm holds.
        jpeg_quality (`int`): of the pictures that are sent.
        margin (`float`): fraction of a joint's range in the demonstrations that it may go beyond either end.
        max_step (`float`, *optional*): of any joint in one tick, in its units; default: its range in a second.
        stop_key (`str`): the emergency stop: space, enter, esc or a character.
    """

    url: str = "ws://127.0.0.1:8000"
    api_key_file: str | None = None
    units: str = "degrees"
    timeout_s: float = 2.0
    jpeg_quality: int = 95
    margin: float = MARGIN
    max_step: float | None = None
    stop_key: str = "space"
    device: str | None = "cpu"  # here nothing is computed
    push_to_hub: bool = False

    observation_delta_indices = action_delta_indices = reward_delta_indices = None  # of training, which is elsewhere

    def get_optimizer_preset(self) -> None:
        raise NotImplementedError("vla0 is trained by vla0_trl, not by lerobot-train")

    def get_scheduler_preset(self) -> None:
        return None

    def validate_features(self) -> None:
        """The server says which cameras it sees; LeRobot compares them with the robot's."""
