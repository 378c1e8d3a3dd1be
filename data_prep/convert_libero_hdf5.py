"""LIBERO's official demonstrations (HDF5) -> chat dataset.

    python data_prep/convert_libero_hdf5.py --source PATH/libero_object --drop_noops --output_dir data/libero_object

Files are from https://libero-project.github.io/datasets: 50 demonstrations of each task, 128 px. Both cameras are
rotated by 180°, as in the data on the Hub and in the evaluation protocol. `--drop_noops` leaves out frames that do
nothing, by the rule of OpenVLA's data. Needs the extra [convert]: pip install -e ".[convert]".
"""

from __future__ import annotations

from pathlib import Path

from vla0_trl.data.arguments import ConversionParser, chosen_cameras, chosen_tasks, command_line_errors
from vla0_trl.data.sources.libero_hdf5 import ACTION_DIM, CAMERAS, STATE_DIM, LiberoDemos


def main() -> None:
    parser = ConversionParser(__doc__, None, chunk_size=8, num_bins=511, relative_actions=False, use_state=True)
    parser.add_argument("--source", required=True, type=Path, nargs="+", help=".hdf5 files, or folders with them")
    parser.add_argument("--tasks", metavar="TEXT|0,3", help="only tasks whose instruction contains TEXT, or by number")
    parser.add_argument("--drop_noops", action="store_true", help="leave out frames in which the robot stands still")
    args = parser.parse_args()
    with command_line_errors(args.output_dir):
        source = LiberoDemos(args.source, args.drop_noops)
        config = parser.config(
            args,
            cameras=chosen_cameras(args.cameras, list(CAMERAS)),
            action_dim=ACTION_DIM,
            state_dim=STATE_DIM,
            gripper="sign",
            crop_ratio=230 / 256,  # VLA-0-Smol's crop
        )
        tasks = chosen_tasks(args.tasks, dict(enumerate(source.tasks)))
        parser.convert(args, source, config, tasks)


if __name__ == "__main__":
    main()
