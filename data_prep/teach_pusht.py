"""A smooth teacher for PushT: labels any state in microseconds, for rows, and for DAgger during training.

    python data_prep/teach_pusht.py --output_dir data/pusht_teacher --num_proc 2
    python data_prep/rows_pusht.py --teacher data/pusht_teacher --output_dir data/pusht_rows

The scripted expert's own answers jump between neighbouring states: a policy that clones them needs ten times the
samples. So its episodes are recorded without drawing, and a small MLP is fitted to whole chunks of its targets. At the
steps given by --rounds the MLP drives fresh seeds, and the expert shows the way to the goal from states where it
struggled (DAgger). In the end its success is measured on seeds that nothing has used.

Stop it with Ctrl-C whenever you like: the same command goes on. It writes teacher.safetensors and teacher.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from vla0_trl.data.arguments import positive
from vla0_trl.envs.pusht.fitting import FitSettings
from vla0_trl.envs.pusht.teaching import REPORT_SEEDS, TeachSettings, success, teach
from vla0_trl.files import write_whole


def main() -> None:
    defaults = TeachSettings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="all that is recorded, and the teacher")
    add("--num_episodes", type=positive, default=defaults.num_episodes, help="of the expert (default: %(default)s)")
    add("--action_noise", type=float, default=defaults.action_noise, help="in px (default: %(default)s)")
    add(
        "--noise_fraction", type=float, default=defaults.noise_fraction, help="episodes with it (default: %(default)s)"
    )
    add("--steps", type=positive, default=defaults.fit.steps, help="of 512 states each (default: %(default)s)")
    rounds = ",".join(map(str, defaults.rounds))
    add("--rounds", type=_steps, default=rounds, metavar="STEP,STEP", help="of DAgger (default: %(default)s)")
    add("--round_episodes", type=positive, default=defaults.round_episodes, help="of a round (default: %(default)s)")
    add("--width", type=positive, default=defaults.fit.width, help="of the MLP (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the fit and of all episodes (default: %(default)s)")
    add("--num_proc", type=positive, default=1, help="processes for the expert; nothing else (default: %(default)s)")
    add("--num_eval_episodes", type=positive, default=400, help="to measure with (default: %(default)s)")
    add("--eval_seed", type=int, default=REPORT_SEEDS, help="the first of their seeds (default: %(default)s)")
    args = parser.parse_args()
    settings = TeachSettings(
        num_episodes=args.num_episodes,
        action_noise=args.action_noise,
        noise_fraction=args.noise_fraction,
        rounds=args.rounds,
        round_episodes=args.round_episodes,
        fit=FitSettings(steps=args.steps, width=args.width, seed=args.seed),
    )
    torch.set_num_threads(1)  # its matrices are small
    started = time.monotonic()
    try:
        teacher = teach(args.output_dir, settings, args.num_proc)
        measured = success(teacher, args.num_eval_episodes, args.eval_seed)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(f"\nstopped: {args.output_dir} keeps what is done; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    report = {"success": measured, "settings": asdict(settings), "minutes": (time.monotonic() - started) / 60}
    write_whole(args.output_dir / "teacher.json", json.dumps(report, indent=1) + "\n")
    for way, result in measured.items():
        if isinstance(result, dict):
            print(f"{way:22} success {result['success_rate']:.1%}, coverage {result['mean_max_coverage']:.3f}")
    print(f"teacher: {args.output_dir / 'teacher.safetensors'}")


def _steps(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word]


if __name__ == "__main__":
    main()
