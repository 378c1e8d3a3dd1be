"""What the sources of PushT episodes share: their command line, and what a card says of all of them."""

from dataclasses import dataclass
from typing import Any, ClassVar

from vla0_trl.command_line import option
from vla0_trl.config import VLAConfig
from vla0_trl.data.arguments import ConversionArguments
from vla0_trl.data.episodes import SourceInfo
from vla0_trl.envs.pusht.env import ACTION_NAMES, CAMERA, FPS, STATE_MODES, STATE_NAMES, UNITS


@dataclass(kw_only=True)
class PushTArguments(ConversionArguments):
    """The converters' settings with PushT's defaults (VLA-0-Smol's best), and `--state`."""

    train_with: ClassVar[str] = "recipes/sft_pusht.py"

    chunk_size: int = option(10, "actions in an answer (default: %(default)s)")
    relative_actions: bool = option(True, "write action − state (default: %(default)s)")
    cameras: str = option(CAMERA, "cameras (default: %(default)s)", metavar="A,B")
    state: str = option(
        "agent", "position of the agent, or full: the block's, too (default: %(default)s)", choices=list(STATE_MODES)
    )

    def pusht_config(self) -> VLAConfig:
        """The config of a PushT dataset under these settings."""
        return self.config(
            action_dim=2,
            state_dim=STATE_MODES[self.state],
            state_names=STATE_NAMES[: STATE_MODES[self.state]],
            action_names=ACTION_NAMES,
            n_action_steps=min(5, self.chunk_size),
            crop_ratio=0.875,  # 84 of 96 px, diffusion policy's crop
        )


def pusht_info(**about: Any) -> SourceInfo:
    """What the card says of PushT episodes: `source`, `revision`, `license`, `how`, `options`, and what all share."""
    return SourceInfo(robot="PushT (a round finger in 2-D)", fps=FPS, units=UNITS, **about)
