"""A LeRobotDataset (v2.1 or v3.0; images or video) from a folder or the Hub -> chat dataset.

    python data_prep/convert_lerobot.py --source HuggingFaceVLA/libero --gripper sign --output_dir data/libero
    python data_prep/convert_lerobot.py --source HuggingFaceVLA/libero --gripper sign --num_episodes 40 --output_dir …
    python data_prep/convert_lerobot.py --source lerobot/pusht --relative_actions --output_dir data/pusht
    python data_prep/convert_lerobot.py --source ~/recordings/so100 --units degrees --output_dir data/so100

Cameras, state and action are found in the dataset's meta/info.json; a camera is named by its key without
"observation.images.". Images in parquet files go over untouched, those of videos become JPEGs of quality 95. Of a Hub
dataset only what is needed is fetched. Statistics are computed again: those of format v3.0 hold averaged quantiles.
Needs the extra [convert]: pip install -c requirements.lock -e ".[convert]".
"""

from dataclasses import dataclass

from vla0_trl.command_line import option, parse
from vla0_trl.data.arguments import ConversionArguments, Subset, chosen_tasks, command_line_errors, names_in
from vla0_trl.data.sources.gripper import CONVENTIONS
from vla0_trl.data.sources.lerobot import LeRobotSource
from vla0_trl.data.sources.lerobot_hub import fetch, open_dataset
from vla0_trl.joint_units import JOINT_UNITS


@dataclass(kw_only=True)
class Arguments(Subset, ConversionArguments):
    source: str = option(help="USER/NAME on the Hub, or a folder with meta/info.json", metavar="HUB_ID_OR_DIR")
    revision: str | None = option(None, "branch, tag or commit on the Hub (default: main)")
    tasks: str | None = option(
        None, "only tasks whose instruction contains TEXT, or of these task_index", metavar="TEXT|0,3"
    )
    image_keys: str | None = option(None, "features that are cameras", metavar="A,B")
    state_key: str | None = option(
        None, "the feature that is the state (default: observation.state or state, if there is one)"
    )
    action_key: str | None = option(None, "the feature that is the action (default: action or actions)")
    gripper: str | None = option(
        None,
        "how the source encodes a gripper in the last action dimension, open and closed; sign: −1 and +1. The dataset "
        "and the robot have −1 and +1, as LIBERO needs (default: no such gripper)",
        choices=list(CONVENTIONS),
    )
    units: str | None = option(
        None,
        "of a LeRobot arm's joints: degrees, or normalized (−100…100); its server compares them with the robot's",
        choices=JOINT_UNITS,
    )
    ignore_stats: bool = option(False, "convert values outside of the range that the dataset's own statistics give")
    trust_timestamps: bool = option(False, "convert frames whose timestamps contradict meta/info.json's fps")
    image_format: str = option(
        "jpeg", "of frames from videos; jpeg has quality 95 (default: %(default)s)", choices=["png", "jpeg"]
    )
    use_state: bool | None = option(
        None, "write the state into the prompt (default: if there is one)", nargs="?", const=True
    )

    @property
    def train_with(self) -> str:
        return "recipes/sft_so100.py" if self.units else "recipes/sft_libero.py"


def main() -> None:
    args = parse(Arguments, __doc__)
    with command_line_errors(args):
        meta = open_dataset(args.source, args.revision)
        keys = names_in(args.image_keys), args.state_key, args.action_key
        source = LeRobotSource(meta, *keys, not args.ignore_stats, args.trust_timestamps, args.gripper, args.units)
        cameras = args.chosen_cameras(list(source.cameras))
        tasks = chosen_tasks(args.tasks, meta.tasks)
        fetch(source, args.selection(tasks), cameras)
        source.refuse_mixed_units(args.selection(tasks).indices(source))
        config = args.config(
            cameras=cameras,
            action_dim=source.action_dim,
            state_dim=source.state_dim,
            action_names=source.names(source.action_key),
            state_names=source.names(source.state_key),
            use_state=source.state_dim > 0 if args.use_state is None else args.use_state,
            gripper="sign" if args.gripper else None,
        )
        args.convert(source, config, tasks)


if __name__ == "__main__":
    main()
