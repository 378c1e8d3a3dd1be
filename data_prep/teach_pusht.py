"""A smooth teacher for PushT: labels any state in microseconds, for rows, and for DAgger during training.

    python data_prep/teach_pusht.py --output_dir data/pusht_teacher --num_proc 2
    python data_prep/rows_pusht.py --teacher data/pusht_teacher --output_dir data/pusht_rows

The scripted expert plans for a tenth of a second at a new state, and its answers jump between neighbouring states. So
its episodes are recorded without drawing, and a small MLP is fitted to whole chunks of its targets: it labels as many
states as you like. At the steps given by --rounds the MLP drives fresh seeds, and the expert shows the way to the goal
from states where it struggled (DAgger). In the end its success is measured on seeds that nothing has used.

Stop it with Ctrl-C whenever you like: the same command goes on. It writes teacher.safetensors and teacher.json.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from vla0_trl.command_line import option, parse, user_errors
from vla0_trl.files import write_whole
from vla0_trl.run_folder import RunFolder
from vla0_trl.stopping import Stopped, raising_stopped


@dataclass(kw_only=True)
class Arguments:
    output_dir: Path = option(help="folder for recorded episodes and the teacher")
    num_episodes: int = option(1_200, "episodes that the expert tries (default: %(default)s)")
    action_noise: float = option(5.0, "noise on the expert's actions, in pixels (default: %(default)s)")
    noise_fraction: float = option(0.6, "share of episodes with noise (default: %(default)s)")
    steps: int = option(40_000, "optimizer steps of 512 states each (default: %(default)s)")
    rounds: str = option(
        "10000,15000,20000,25000,30000",
        "optimizer steps at which DAgger adds episodes (default: %(default)s)",
        metavar="STEP,STEP",
    )
    round_episodes: int = option(300, "episodes of each DAgger round (default: %(default)s)")
    chunk_size: int = option(8, "steps that it answers at once (default: %(default)s)")
    width: int = option(512, "width of the MLP's layers (default: %(default)s)")
    seed: int = option(0, "seed of the fit and of all episodes (default: %(default)s)")
    num_proc: int = option(1, "processes in which the expert drives (default: %(default)s)")
    num_eval_episodes: int = option(400, "episodes to measure success with (default: %(default)s)")

    def __post_init__(self):
        if self.num_eval_episodes < 1:  # a recipe's may be 0
            raise ValueError("--num_eval_episodes 0 must be at least 1")
        if self.chunk_size < 2:
            raise ValueError(f"--chunk_size {self.chunk_size} must be at least 2: half of each chunk is measured, too")
        if not all(word.isdecimal() and len(word) < 10 for word in self.rounds.split(",") if word):
            raise ValueError(f"--rounds {self.rounds}: expected steps separated by commas, such as 10000,15000")
        if any(after <= before for before, after in pairwise(self.round_steps)):
            raise ValueError(f"--rounds {self.rounds}: expected rising steps")

    @property
    def round_steps(self) -> list[int]:
        return [int(word) for word in self.rounds.split(",") if word]


def main() -> None:
    args = parse(Arguments, __doc__)
    import torch  # after parsing: it takes seconds

    from vla0_trl.envs.pusht.fitting import FitSettings
    from vla0_trl.envs.pusht.teaching import TeachSettings, success, teach

    settings = TeachSettings(
        num_episodes=args.num_episodes,
        action_noise=args.action_noise,
        noise_fraction=args.noise_fraction,
        rounds=args.round_steps,
        round_episodes=args.round_episodes,
        chunk_size=args.chunk_size,
        fit=FitSettings(steps=args.steps, width=args.width, seed=args.seed),
    )
    torch.set_num_threads(1)  # its matrices are small
    started = time.monotonic()
    try:
        with raising_stopped(), user_errors(), RunFolder(args.output_dir):
            teacher = teach(args.output_dir, settings, args.num_proc)
            measured = success(teacher, args.num_eval_episodes)
    except Stopped as stopped:
        print(f"\nstopped: {args.output_dir} keeps what is done; run the same command again to go on", file=sys.stderr)
        sys.exit(stopped.status)
    report = {"success": measured, "settings": asdict(settings), "minutes": (time.monotonic() - started) / 60}
    write_whole(args.output_dir / "teacher.json", json.dumps(report, indent=1) + "\n")
    for way, result in measured.items():
        if isinstance(result, dict):
            print(f"{way:22} success {result['success_rate']:.1%}, coverage {result['mean_max_coverage']:.3f}")
    print(f"teacher: {args.output_dir / 'teacher.safetensors'}")


if __name__ == "__main__":
    main()
