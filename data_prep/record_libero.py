"""LIBERO demonstrations by a scripted expert in the real simulator -> chat dataset. No download, no display.

    python data_prep/record_libero.py --suite libero_object --task_ids 0 --episodes_per_task 10 \\
        --assets_dir PATH/assets --output_dir data/libero --num_proc 2

Tries the initial states first_init_state … + episodes_per_task − 1 of every task and keeps those that succeed. They
are the ones that evaluation uses: leave some out, to test on what was not trained on. 12 s of CPU per episode.
"""

from dataclasses import dataclass
from pathlib import Path

from vla0_trl.command_line import option, parse
from vla0_trl.data.arguments import ConversionArguments, command_line_errors
from vla0_trl.data.episodes import Episode
from vla0_trl.data.libero_rows import simulated
from vla0_trl.envs.libero import protocol
from vla0_trl.envs.libero.env import LiberoTasks
from vla0_trl.envs.libero.expert import SUITES, record_episode
from vla0_trl.envs.libero.setup import find_assets, instruction, task_names


@dataclass(kw_only=True)
class Arguments(ConversionArguments):
    # Actions lie in [-1, 1] by construction, and a script turns the hand so little that min_max would magnify that.
    normalization: str = option(
        "-1,1", "what 0…num_bins spans (default: %(default)s)", metavar="min_max|quantile|LOW,HIGH"
    )
    cameras: str = option(",".join(protocol.DEFAULT_CAMERAS), "cameras, in this order (default: all)", metavar="A,B")
    suite: str = option("libero_object", "suite of tasks (default: %(default)s)", choices=list(SUITES))
    task_ids: str | None = option(None, "numbers of tasks, from 0, separated by commas (default: all)")
    episodes_per_task: int = option(10, "episodes of each task to try (default: %(default)s)")
    first_init_state: int = option(0, "first initial state of each task (default: %(default)s)")
    assets_dir: str | None = option(None, "folder of LIBERO's assets (default: $LIBERO_ASSETS, else the Hub's)")


class LiberoExpertEpisodes:
    """The expert's attempts at episodes of one suite, task by task; None where it failed."""

    def __init__(self, episodes: list[protocol.LiberoEpisode], assets_dir: Path):
        self.episodes, self.assets_dir = episodes, assets_dir
        suite = episodes[0].suite
        self.names = task_names(suite)
        self._tasks: LiberoTasks | None = None
        self.info = simulated(
            f"{suite}, scripted expert",
            f"Recorded in the LIBERO simulator by vla0_trl's scripted expert, from the suite's own initial states "
            f"{episodes[0].seed} to {episodes[-1].seed} of each task; only successful episodes are kept.",
            assets_dir,
            {"episodes": [list(episode) for episode in episodes]},
        )

    def __len__(self) -> int:
        return len(self.episodes)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_tasks": None}  # every process opens its own

    def task(self, index: int) -> str:
        return instruction(self.names[self.episodes[index].task_id])

    def episode(self, index: int) -> Episode | None:
        self._tasks = self._tasks or LiberoTasks(assets_dir=self.assets_dir)
        suite, task_id, seed = self.episodes[index]
        recording = record_episode(self._tasks.open(suite, task_id), seed)
        if recording is None:
            return None
        return Episode(
            task=self.task(index),
            actions=recording.actions,
            states=recording.states,
            images=recording.images,
            name=f"{suite} task {task_id}, initial state {seed}",
        )


def main() -> None:
    args = parse(Arguments, __doc__)
    with command_line_errors(args):
        end = args.first_init_state + args.episodes_per_task
        episodes = protocol.select_episodes(args.suite, args.task_ids, end)
        episodes = [episode for episode in episodes if episode.seed >= args.first_init_state]
        source = LiberoExpertEpisodes(episodes, find_assets(args.assets_dir))
        args.convert(source, args.config(crop_ratio=protocol.CROP_RATIO, **protocol.VECTORS))


if __name__ == "__main__":
    main()
