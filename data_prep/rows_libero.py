"""Rows that a teacher labelled in the LIBERO simulator -> chat dataset. No download, no display.

    python data_prep/rows_libero.py --task_id 0 --assets_dir PATH/assets --output_dir data/libero_rows --num_proc 2

A teacher picks and places while noise pushes the hand about; every second frame becomes a row, with the actions that
bring the hand back. Objects stand where the task's own sampler puts them: evaluation's 50 initial states are not used.
About 70 rows an episode; 5 s of CPU.
"""

from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

from vla0_trl import __version__
from vla0_trl.command_line import option, parse
from vla0_trl.data.arguments import ConversionArguments, command_line_errors
from vla0_trl.data.episodes import SourceInfo
from vla0_trl.data.libero_rows import EVERY, TeacherEpisodes
from vla0_trl.envs.libero import protocol
from vla0_trl.envs.libero.setup import find_assets, instruction, task_names
from vla0_trl.envs.libero.teacher import MOST_SHIFTED, SUITE, TeachingEnv


@dataclass(kw_only=True)
class Arguments(ConversionArguments):
    cameras: str = option(",".join(protocol.DEFAULT_CAMERAS), "which, in this order (default: all)", metavar="A,B")
    task_id: int = option(0, f"of {SUITE} (default: %(default)s)", choices=range(protocol.NUM_TASKS[SUITE]))
    num_episodes: int = option(200, "(default: %(default)s)")
    render_size: int = option(
        128, "of the frames; as evaluation's (default: %(default)s)", choices=protocol.RENDER_SIZES
    )
    assets_dir: str | None = option(None, "LIBERO's assets (default: $LIBERO_ASSETS, else the Hub's)")


def main() -> None:
    args = parse(Arguments, __doc__)
    with command_line_errors(args):
        assets = find_assets(args.assets_dir)
        settings = {"cameras": tuple(args.cameras.split(",")), "render_size": args.render_size}
        info = SourceInfo(
            source=f"{SUITE} task {args.task_id}, states labelled by a teacher",
            revision=f"vla0_trl {__version__}, hf-libero {version('hf-libero')}, mujoco {version('mujoco')}",
            license="apache-2.0",
            robot="Franka Panda in LIBERO (robosuite, OSC_POSE)",
            fps=protocol.CONTROL_FREQUENCY,
            how=(
                f"{args.num_episodes} episodes in the LIBERO simulator, of vla0_trl's teacher, disturbed by noise; "
                f"one frame in {EVERY} is kept, each with the teacher's own next actions. Objects are placed by the "
                f"task's sampler, in half of the episodes all moved by up to {100 * MOST_SHIFTED:.0f} cm. Both "
                f"cameras are rotated by 180°, as in evaluation. Assets: {assets.name}."
            ),
            options={"task_id": args.task_id, "num_episodes": args.num_episodes, "seed": args.seed, **settings},
            units=protocol.UNITS,
        )
        source = TeacherEpisodes(
            partial(TeachingEnv, args.task_id, assets_dir=assets, **settings),
            instruction(task_names(SUITE)[args.task_id]),
            args.seed * 10_000_000,
            args.num_episodes,
            args.chunk_size,
            info,
        )
        config = args.config(action_dim=protocol.ACTION_DIM, state_dim=protocol.STATE_DIM, gripper="sign")
        args.convert(source, config)


if __name__ == "__main__":
    main()
