"""Rows that a teacher labelled in the LIBERO simulator -> chat dataset. No download, no display.

    python data_prep/rows_libero.py --task_ids 0 --assets_dir PATH/assets --output_dir data/libero_rows --num_proc 2

A teacher picks and places while noise pushes the hand about; every second frame becomes a row, with the actions that
bring the hand back. Objects stand where the task's own sampler puts them: evaluation's 50 initial states are not used.
About 70 rows and 5 s of CPU per episode.
"""

from dataclasses import dataclass
from functools import partial

from vla0_trl.command_line import option, parse
from vla0_trl.data.arguments import ConversionArguments, command_line_errors
from vla0_trl.data.libero_rows import EVERY, TeacherEpisodes, simulated
from vla0_trl.envs.libero import protocol
from vla0_trl.envs.libero.setup import find_assets
from vla0_trl.envs.libero.teacher import MOST_SHIFTED, SUITE, TeachingEnv

SEED_STRIDE = 100_000  # of --seed: no episode is in two datasets


@dataclass(kw_only=True)
class Arguments(ConversionArguments):
    cameras: str = option(",".join(protocol.DEFAULT_CAMERAS), "which, in this order (default: all)", metavar="A,B")
    task_ids: str | None = option("0", f"of {SUITE}, separated by commas (default: %(default)s)")
    episodes_per_task: int = option(200, "(default: %(default)s)")
    every: int = option(EVERY, "steps between frames that become rows (default: %(default)s)")
    render_size: int = option(
        128, "of the frames; as evaluation's (default: %(default)s)", choices=protocol.RENDER_SIZES
    )
    assets_dir: str | None = option(None, "LIBERO's assets (default: $LIBERO_ASSETS, else the Hub's)")


def main() -> None:
    args = parse(Arguments, __doc__)
    with command_line_errors(args):
        tasks = [episode.task_id for episode in protocol.select_episodes(SUITE, args.task_ids, 1)]
        assets = find_assets(args.assets_dir)
        settings = {"cameras": args.cameras.split(","), "render_size": args.render_size}
        options = {"task_ids": tasks, "episodes_per_task": args.episodes_per_task, "seed": args.seed}
        options |= {"every": args.every}
        info = simulated(
            f"{SUITE}, states labelled by a teacher",
            f"{args.episodes_per_task} episodes of each task in the LIBERO simulator, of vla0_trl's teacher, disturbed"
            f" by noise; one frame in {args.every} is kept, each with the teacher's own next actions. Objects are"
            f" placed by the task's sampler, in half of the episodes all moved by up to {100 * MOST_SHIFTED:.0f} cm.",
            assets,
            options | settings,
        )
        make_env = partial(TeachingEnv, tasks, assets_dir=assets, **settings)
        source = TeacherEpisodes(
            make_env, args.episodes_per_task, args.seed * SEED_STRIDE, args.chunk_size, args.every, info
        )
        args.convert(source, args.config(**protocol.VECTORS))


if __name__ == "__main__":
    main()
