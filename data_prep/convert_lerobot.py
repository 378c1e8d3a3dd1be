"""A LeRobotDataset (v2.1 or v3.0; images or video) from a folder or the Hub -> chat dataset.

    python data_prep/convert_lerobot.py --source HuggingFaceVLA/libero --gripper sign --output_dir data/libero
    python data_prep/convert_lerobot.py --source HuggingFaceVLA/libero --max_episodes_per_task 1 --output_dir …
    python data_prep/convert_lerobot.py --source lerobot/pusht --relative_actions --output_dir data/pusht
    python data_prep/convert_lerobot.py --source ~/recordings/so100 --tasks "red cube" --output_dir data/so100

Cameras, state and action are found in the dataset's meta/info.json; a camera is named by its key without
"observation.images.". Images in parquet files go over untouched, those of videos become JPEGs of quality 95. Of a Hub
dataset only what is needed is fetched. Statistics are computed anew: those of format v3.0 hold averaged quantiles.
Needs the extra [convert]: pip install -e ".[convert]".
"""

from __future__ import annotations

from vla0_trl.data.arguments import ConversionParser, chosen_cameras, chosen_tasks, command_line_errors
from vla0_trl.data.sources.lerobot import LeRobotSource
from vla0_trl.data.sources.lerobot_hub import fetch, open_dataset


def main() -> None:
    parser = ConversionParser(__doc__, None, chunk_size=8, num_bins=511, relative_actions=False, image_format="jpeg")
    add = parser.add_argument
    add(
        "--source",
        required=True,
        metavar="HUB_ID_OR_DIR",
        help="USER/NAME on the Hub, or a folder with meta/info.json",
    )
    add("--revision", help="branch, tag or commit on the Hub (default: main)")
    add("--tasks", metavar="TEXT|0,3", help="only tasks whose instruction contains TEXT, or of these task_index")
    add("--image_keys", type=lambda text: text.split(","), metavar="A,B", help="features that are cameras")
    add("--state_key", help="the feature that is the state (default: observation.state or state, if there is one)")
    add("--action_key", help="the feature that is the action (default: action or actions)")
    add("--gripper", choices=["sign"], help="sign: execute the last action dimension as −1 or +1, as LIBERO needs")
    add("--ignore_stats", action="store_true", help="convert values that meta's statistics say there are not")
    add(
        "--trust_timestamps",
        action="store_true",
        help="convert frames whose timestamps contradict meta/info.json's fps",
    )
    args = parser.parse_args()
    with command_line_errors(args.output_dir):
        meta = open_dataset(args.source, args.revision)
        source = LeRobotSource(
            meta, args.image_keys, args.state_key, args.action_key, not args.ignore_stats, args.trust_timestamps
        )
        cameras = chosen_cameras(args.cameras, list(source.cameras))
        tasks = chosen_tasks(args.tasks, meta.tasks)
        fetch(source, parser.selection(args, tasks), cameras)
        config = parser.config(
            args,
            cameras=cameras,
            action_dim=source.action_dim,
            state_dim=source.state_dim,
            use_state=source.state_dim > 0 if args.use_state is None else args.use_state,
            gripper=args.gripper,
        )
        parser.convert(args, source, config, tasks)


if __name__ == "__main__":
    main()
