"""PushT demonstrations by a scripted expert in the real simulator -> chat dataset.

    python data_prep/record_pusht.py --num_episodes 200 --seed 0 --output_dir data/pusht --num_proc 2

Tries the seeds seed … seed + num_episodes − 1, keeps those that succeed and counts the others. About one second of
CPU per episode, ten with --replan. Episodes depend on their seed alone: any --num_proc records the same dataset.

DAgger: a policy drives, and every state that it comes to is labelled with what the expert would do there. Failed
episodes are kept: they show where the policy goes wrong.

    python data_prep/record_pusht.py --policy runs/pusht_nano --num_episodes 100 --seed 5000 --output_dir data/dagger
    accelerate launch recipes/sft_pusht.py --model_name_or_path runs/pusht_nano --dataset_name data/dagger …

Only the first action of a chunk is then the expert's way for certain: those after it are its answers to the states
that the policy came to. Use a small chunk_size, or let the expert drive part of the time (--expert_mix).
"""

from dataclasses import dataclass
from importlib.metadata import version

import numpy as np

from vla0_trl import __version__
from vla0_trl.command_line import option, parse
from vla0_trl.data.arguments import command_line_errors
from vla0_trl.data.episodes import Episode
from vla0_trl.data.pusht import PushTArguments, pusht_info
from vla0_trl.envs.pusht.env import CAMERA, MAX_EPISODE_STEPS, STATE_MODES, TASK, check_speaks_pusht
from vla0_trl.envs.pusht.expert import record_episode


@dataclass(kw_only=True)
class Arguments(PushTArguments):
    num_episodes: int = option(200, "seeds to try (default: %(default)s)")
    action_noise: float = option(0.0, "noise on the executed actions, in pixels (default: %(default)s)")
    noise_fraction: float = option(1.0, "share of episodes with noise (default: %(default)s)")
    replan: bool = option(
        False, "the expert makes a new plan at every step, so its action depends on the state alone; on with --policy"
    )
    policy: str | None = option(None, "checkpoint that drives while the expert labels: a folder or a Hub id")
    expert_mix: float = option(0.0, "share of steps that the expert drives (default: %(default)s)")
    max_steps: int = option(MAX_EPISODE_STEPS, "time limit of an episode (default: %(default)s)")

    def __post_init__(self):
        super().__post_init__()
        if self.expert_mix and not self.policy:
            raise ValueError("--expert_mix needs a --policy: without one the expert drives always")


class PushTExpertEpisodes:
    """Episode i is recorded on seed `args.seed + i`; None if the expert drove and failed."""

    def __init__(self, args: Arguments):
        self.args, self.learner = args, None
        names = ("seed", "state", "action_noise", "noise_fraction", "replan", "expert_mix", "max_steps")
        options = {name: getattr(args, name) for name in names}
        noise = f", with {args.action_noise:g} px of noise in {args.noise_fraction:.0%} of the episodes"
        how, source = "only successful episodes are kept", "PushT, scripted expert"
        if args.policy:
            from vla0_trl.policy.dagger import Learner  # imports torch, which the expert does not need

            self.learner = Learner(args.policy, args.num_proc)
            check_speaks_pusht(self.learner.config, args.policy)
            options |= {"replan": True, "policy": self.learner.hash}
            how = f"a policy drove (sha256 {self.learner.hash[:16]}), the expert in {args.expert_mix:.0%} of the steps"
            source = "PushT, a policy labelled by the scripted expert"
        if options["replan"]:
            how += "; the expert planned anew at every step"
        self.options = options
        self.info = pusht_info(
            source=source,
            revision=f"vla0_trl {__version__}, gym-pusht {version('gym-pusht')}, pymunk {version('pymunk')}",
            license="apache-2.0",
            how=(
                f"Recorded in the gym-pusht simulator by vla0_trl's scripted expert, seeds {args.seed} to "
                f"{args.seed + args.num_episodes - 1}{noise if args.action_noise else ''}; {how}. Actions are the "
                "finger's target in pixels of a 512 × 512 workspace. `episode_index` + the first seed is an episode's "
                "seed."
            ),
            options=options,
        )

    def __len__(self) -> int:
        return self.args.num_episodes

    def task(self, index: int) -> str:
        return TASK

    def episode(self, index: int) -> Episode | None:
        args, seed = self.args, self.args.seed + index
        noisy = np.random.default_rng([seed, 1]).random() < args.noise_fraction  # not the noise's own stream
        if self.learner is not None:
            self.learner.reset()
        noise, replan = args.action_noise if noisy else 0.0, self.options["replan"]
        recording = record_episode(seed, noise, replan, self.learner, args.expert_mix, args.max_steps)
        if not (recording.success or self.learner):
            return None
        return Episode(
            task=TASK,
            actions=recording.actions,
            states=recording.states[:, : STATE_MODES[args.state]],
            images={CAMERA: recording.frames},
            name=f"{self.info.source}, seed {seed}",
        )


def main() -> None:
    args = parse(Arguments, __doc__)
    with command_line_errors(args):
        args.convert(PushTExpertEpisodes(args), args.pusht_config())


if __name__ == "__main__":
    main()
