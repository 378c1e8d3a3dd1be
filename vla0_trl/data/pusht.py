"""What the sources of PushT episodes share on the command line."""

from __future__ import annotations

import argparse

from vla0_trl.config import VLAConfig
from vla0_trl.data.arguments import ConversionParser
from vla0_trl.envs.pusht.env import CAMERA, STATE_MODES


class PushTParser(ConversionParser):
    """The converters' flags with PushT's defaults (VLA-0-Smol's best setting), and `--state`."""

    def __init__(self, script_doc: str):
        defaults = {"chunk_size": 10, "num_bins": 511, "relative_actions": True, "use_state": True}
        super().__init__(script_doc, [CAMERA], "recipes/sft_pusht.py", **defaults)
        self.add_argument("--state", choices=STATE_MODES, default="agent", help="(default: %(default)s)")

    def pusht_config(self, args: argparse.Namespace) -> VLAConfig:
        """The config of a PushT dataset under these flags."""
        return self.config(
            args,
            action_dim=2,
            state_dim=STATE_MODES[args.state],
            n_action_steps=min(5, args.chunk_size),
            crop_ratio=0.875,  # 84 of 96 px, diffusion policy's crop
        )
