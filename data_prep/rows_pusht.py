"""Rows that a teacher labelled -> chat dataset: as many as you like, each another state, drawn by the simulator.

    python data_prep/teach_pusht.py --output_dir data/pusht_teacher
    python data_prep/rows_pusht.py --teacher data/pusht_teacher --output_dir data/pusht_rows --num_proc 2

States are those of the expert's episodes and of the teacher's own, half of them mirrored, all jittered, and some from
anywhere. Every row has the teacher's chunk for its own state: frames of an "episode" (a block of 100) do not follow
each other. Several hundred rows per second on each core. Rows depend on --seed only, not on --num_proc.
"""

import hashlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from vla0_trl import __version__
from vla0_trl.command_line import option, parse
from vla0_trl.data.arguments import command_line_errors
from vla0_trl.data.pusht import PushTArguments, pusht_info


@dataclass(kw_only=True)
class Arguments(PushTArguments):
    teacher: Path = option(help="a folder made by data_prep/teach_pusht.py")
    num_rows: int = option(60_000, "rows of the dataset (default: %(default)s)")
    chunk_size: int = option(8, "actions in an answer (default: %(default)s)")


def main() -> None:
    args = parse(Arguments, __doc__)
    from vla0_trl.data.pusht_rows import TeacherRows  # after parsing: torch takes seconds
    from vla0_trl.envs.pusht.teacher import PushTTeacher
    from vla0_trl.envs.pusht.teaching import state_pool

    with command_line_errors(args):
        path = args.teacher / "teacher.safetensors"
        teacher, pool = PushTTeacher.load(path), state_pool(args.teacher)
        digest = hashlib.sha256(path.read_bytes() + pool.tobytes()).hexdigest()
        info = pusht_info(
            source="PushT, states labelled by a teacher",
            revision=f"vla0_trl {__version__}, gym-pusht {version('gym-pusht')}, teacher sha256 {digest[:16]}",
            license="apache-2.0",
            how=(
                f"{args.num_rows} states around those of the scripted expert's and the teacher's episodes, drawn in "
                "the gym-pusht simulator and labelled by vla0_trl's teacher, an MLP fitted to the expert. Frames of "
                "an episode do not follow each other: each has a chunk of its own. Actions are the finger's targets "
                "in pixels of a 512 × 512 workspace."
            ),
            options={"num_rows": args.num_rows, "seed": args.seed, "state": args.state, "teacher": digest},
        )
        source = TeacherRows(teacher, pool, args.num_rows, args.seed, args.state, info)
        # whole chunks: executing half of each costs the teacher 4 to 7 points of success
        args.convert(source, args.pusht_config().replace(n_action_steps=args.chunk_size))


if __name__ == "__main__":
    main()
