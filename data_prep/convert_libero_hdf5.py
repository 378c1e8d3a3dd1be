"""LIBERO's official demonstrations (HDF5) -> chat dataset.

    python data_prep/convert_libero_hdf5.py --source PATH/libero_object --drop_noops --output_dir data/libero_object

Files are from https://libero-project.github.io/datasets: 50 demonstrations of each task, 128 px. Both cameras are
rotated by 180°, as in the data on the Hub and in the evaluation protocol. These files hold what was seen after each
action: an action goes with the frame before it, and a demonstration's first action is left out. `--drop_noops` leaves
out frames that do nothing, by the rule of OpenVLA's data. Needs the extra [convert]:
pip install -c requirements.lock -e ".[convert]".
"""

from dataclasses import dataclass
from pathlib import Path

from vla0_trl.command_line import option, parse
from vla0_trl.data.arguments import ConversionArguments, Subset, chosen_tasks, command_line_errors
from vla0_trl.data.sources.gripper import CONVENTIONS
from vla0_trl.data.sources.libero_hdf5 import CAMERAS, LiberoDemos
from vla0_trl.envs.libero.protocol import CROP_RATIO, VECTORS


@dataclass(kw_only=True)
class Arguments(Subset, ConversionArguments):
    source: list[Path] = option(help=".hdf5 files, or folders with them")
    tasks: str | None = option(None, "only tasks whose instruction contains TEXT, or by number", metavar="TEXT|0,3")
    drop_noops: bool = option(False, "leave out frames in which the robot stands still")
    gripper: str = option(
        "sign",
        "how the files encode it, open and closed; sign: −1 and +1, as LIBERO has it",
        choices=list(CONVENTIONS),
    )


def main() -> None:
    args = parse(Arguments, __doc__)
    with command_line_errors(args):
        source = LiberoDemos(args.source, args.drop_noops, args.gripper)
        config = args.config(cameras=args.chosen_cameras(list(CAMERAS)), crop_ratio=CROP_RATIO, **VECTORS)
        tasks = chosen_tasks(args.tasks, dict(enumerate(source.tasks)))
        args.convert(source, config, tasks)


if __name__ == "__main__":
    main()
