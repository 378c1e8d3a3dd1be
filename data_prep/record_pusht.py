"""PushT demonstrations by a scripted expert in the real simulator -> chat dataset.

    python data_prep/record_pusht.py --num_episodes 200 --seed 0 --output_dir data/pusht --num_proc 2

Tries the seeds seed … seed + num_episodes − 1, keeps those that succeed and counts the others. About a second of CPU
an episode. Episodes depend on their seed alone: any --num_proc records the same dataset.
"""

from __future__ import annotations

import argparse
from importlib.metadata import version

import numpy as np

from vla0_trl import __version__
from vla0_trl.conversion.cli import command_line_errors, positive
from vla0_trl.conversion.pusht import PushTParser
from vla0_trl.envs.pusht import CAMERA, FPS, STATE_MODES, TASK
from vla0_trl.envs.pusht_expert import record_episode
from vla0_trl.episodes import Episode, SourceInfo


class PushTExpertEpisodes:
    """Episode i is the expert's attempt at seed `seed + i`, None if it failed.

    Args:
        state (`str`): "agent": the agent's x, y; "full": with the block's x, y and angle.
        action_noise (`float`): standard deviation in pixels of what is added to the expert's targets on execution:
            it has to recover, and the data, which holds its own targets, shows how.
        noise_fraction (`float`): share of the episodes with noise.
    """

    def __init__(self, num_episodes: int, seed: int, state: str, action_noise: float, noise_fraction: float):
        self.num_episodes, self.seed, self.state_dim = num_episodes, seed, STATE_MODES[state]
        self.action_noise, self.noise_fraction = action_noise, noise_fraction
        noise = f", with {action_noise:g} px of noise in {noise_fraction:.0%} of the episodes" if action_noise else ""
        self.info = SourceInfo(
            source="PushT, scripted expert",
            revision=f"vla0_trl {__version__}, gym-pusht {version('gym-pusht')}, pymunk {version('pymunk')}",
            license="apache-2.0",
            robot="PushT (a round finger in 2-D)",
            fps=FPS,
            how=(
                f"Recorded in the gym-pusht simulator by vla0_trl's scripted expert, seeds {seed} to "
                f"{seed + num_episodes - 1}{noise}; only successful episodes are kept. Actions are the finger's "
                "target in pixels of a 512 × 512 workspace. `episode_index` + the first seed is an episode's seed."
            ),
            options={"seed": seed, "state": state, "action_noise": action_noise, "noise_fraction": noise_fraction},
        )

    def __len__(self) -> int:
        return self.num_episodes

    def task(self, index: int) -> str:
        return TASK

    def episode(self, index: int) -> Episode | None:
        seed = self.seed + index
        noisy = np.random.default_rng([seed, 1]).random() < self.noise_fraction  # not the noise's own stream
        recording = record_episode(seed, action_noise=self.action_noise if noisy else 0.0)
        if not recording.success:
            return None
        return Episode(
            task=TASK,
            actions=recording.actions,
            states=recording.states[:, : self.state_dim],
            images={CAMERA: recording.frames},
            name=f"{self.info.source}, seed {seed}",
        )


def main() -> None:
    parser = PushTParser(__doc__)
    parser.add_argument("--num_episodes", type=positive, default=200, help="seeds to try (default: %(default)s)")
    parser.add_argument("--action_noise", type=float, default=0.0, help="in pixels (default: %(default)s)")
    parser.add_argument(
        "--noise_fraction", type=_share, default=1.0, help="episodes with noise (default: %(default)s)"
    )
    args = parser.parse_args()
    with command_line_errors(args.output_dir):
        source = PushTExpertEpisodes(args.num_episodes, args.seed, args.state, args.action_noise, args.noise_fraction)
        parser.convert(args, source, parser.pusht_config(args))


def _share(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


if __name__ == "__main__":
    main()
