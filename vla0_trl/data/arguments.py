"""The command line that all converters share."""

import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, get_args

from huggingface_hub.utils import validate_repo_id

from vla0_trl import __version__
from vla0_trl.command_line import as_flags, option, user_errors
from vla0_trl.config import VLAConfig
from vla0_trl.data.chat_dataset import check_loadable
from vla0_trl.data.convert import Selection, Source, convert
from vla0_trl.data.episodes import ImageFormat
from vla0_trl.data.staging import ConversionError
from vla0_trl.hub import address, open_repository, upload
from vla0_trl.manifest import claimed
from vla0_trl.stats import check_range
from vla0_trl.stopping import Stopped, raising_stopped

# What does not change the dataset's content stays out of the command that its card shows.
_NOT_CONTENT = ("output_dir", "num_proc", "overwrite", "push_to_hub", "public")


@dataclass(kw_only=True)
class ConversionArguments:
    """What every converter can be told; a script adds its own fields, and defaults that suit its source."""

    train_with: ClassVar[str] = "recipes/sft_libero.py"  # what a finished conversion tells to go on with

    output_dir: Path = option(help="the dataset's folder; appears when it is complete")
    chunk_size: int = option(8, "actions in an answer (default: %(default)s)")
    num_bins: int = option(511, "the largest integer (default: %(default)s)")
    normalization: str = option(
        "min_max", "what 0…num_bins spans (default: %(default)s)", metavar="min_max|quantile|LOW,HIGH"
    )
    relative_actions: bool = option(False, "write action − state (default: %(default)s)")
    use_state: bool = option(True, "write the state into the prompt (default: %(default)s)")
    cameras: str | None = option(None, "cameras, in this order (default: all)", metavar="A,B")
    episodes: str = option(":", "only these of the source, such as 0:10", metavar="FROM:TO")
    max_episodes_per_task: int | None = option(None, "at most N of each task, drawn with --seed", metavar="N")
    seed: int = option(0, "seed of what is drawn at random (default: %(default)s)")
    image_format: str = option(
        "png",
        "of frames that the source does not hold as files; jpeg has quality 95 (default: %(default)s)",
        choices=get_args(ImageFormat),
    )
    skip_bad_episodes: bool = option(False, "leave bad episodes out, list them in the end")
    num_proc: int = option(1, "processes; the result is the same (default: %(default)s)")
    overwrite: bool = option(False, "replace what is in output_dir")
    push_to_hub: str | None = option(
        None, "upload to this dataset repository; needs `hf auth login`", metavar="USER/NAME"
    )
    public: bool = option(False, "make the repository public (default: private)")

    def __post_init__(self):
        self.selection()
        if self.push_to_hub:
            validate_repo_id(self.push_to_hub)  # before hours of work
        check_loadable(self.output_dir)
        _normalization(self.normalization)

    def config(self, **fields: Any) -> VLAConfig:
        """The config that the flags and a source's own `fields`, which win, make; impossible ones end the program."""
        names = ("chunk_size", "num_bins", "relative_actions", "use_state")
        settings = {name: getattr(self, name) for name in names}
        settings |= {"normalization": _normalization(self.normalization), "cameras": names_in(self.cameras)}
        with user_errors():
            return VLAConfig(**settings | fields)

    def chosen_cameras(self, cameras: list[str]) -> list[str]:
        """What `--cameras` chooses of a source's cameras."""
        asked = names_in(self.cameras) or cameras
        if unknown := [camera for camera in asked if camera not in cameras]:
            raise ConversionError(f"--cameras {self.cameras}: there is no {unknown[0]!r}, the source has {cameras}")
        return asked

    def selection(self, tasks: list[str] | None = None) -> Selection:
        """Which episodes the flags choose, of `tasks` only if given."""
        found = re.fullmatch(r"(\d{0,9}):(\d{0,9})", self.episodes, re.ASCII)
        start, stop = (int(word) if word else None for word in found.groups()) if found else (0, 0)
        if stop is not None and (start or 0) >= stop:
            raise ValueError(f"--episodes {self.episodes} is not FROM:TO with FROM below TO, such as 0:10")
        return Selection(slice(start, stop), self.max_episodes_per_task, self.seed, tasks)

    def convert(self, source: Source, config: VLAConfig, tasks: list[str] | None = None) -> None:
        """[`convert`] as the flags say, of `tasks` only if given, and the upload."""
        convert(
            source,
            config,
            self.output_dir,
            selection=self.selection(tasks),
            num_proc=self.num_proc,
            image_format=self.image_format,
            skip_bad_episodes=self.skip_bad_episodes,
            overwrite=self.overwrite,
            command=self.command(),
            recipe=self.train_with,
        )
        if self.push_to_hub:  # the dataset's own files, not what else lies in its folder
            files = {str(path.relative_to(self.output_dir)): path for path in claimed(self.output_dir)}
            commit = upload(files, self.push_to_hub, "dataset", f"Dataset made by vla0_trl {__version__}")
            print(f"uploaded: {address(self.push_to_hub, 'dataset')} at revision {commit}")

    def command(self) -> str:
        """A command that makes the same dataset, for its card."""
        script = f"python data_prep/{Path(sys.argv[0]).name} --output_dir DATASET"
        return " \\\n  ".join([script, *map(shlex.join, as_flags(self, _NOT_CONTENT))])


@dataclass(kw_only=True)
class Subset:
    """More settings, for converters of recorded episodes; list it before `ConversionArguments` among the bases."""

    num_episodes: int | None = option(
        None, "keep only N of the episodes that the other flags leave, drawn with --seed over all tasks", metavar="N"
    )

    def selection(self, tasks: list[str] | None = None) -> Selection:
        return replace(super().selection(tasks), num_episodes=self.num_episodes)


@contextmanager
def command_line_errors(args: ConversionArguments) -> Iterator[None]:
    """A converter's work; expected failures are one line on stderr: exit status 1; 130 or 143 if a signal stopped it.

    The repository to upload to is opened first: what is wrong with it shows before hours of work.
    """
    try:
        with raising_stopped():
            if args.push_to_hub:
                args.push_to_hub = open_repository(args.push_to_hub, "dataset", not args.public)
            yield
    except BrokenPipeError:  # see `streams`
        raise
    except (ConversionError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except Stopped as stopped:
        print(
            f"\nstopped: finished episodes are kept in {args.output_dir}.partial; run the same command again to go on",
            file=sys.stderr,
        )
        sys.exit(stopped.status)


def names_in(text: str | None) -> list[str] | None:
    """The names in `"A,B"`."""
    return text.split(",") if text else None


def chosen_tasks(text: str | None, tasks: dict[int, str]) -> list[str] | None:
    """What `--tasks` chooses of numbered instructions: "0,3" are their numbers, all else is a part of their text."""
    if text is None:
        return None
    words = text.split(",")
    if all(word.isdecimal() for word in words):
        numbers = [int(word) for word in words]
    else:
        numbers = [number for number, task in tasks.items() if text.lower() in task.lower()]
    if not numbers or not tasks.keys() >= set(numbers):
        listed = "".join(f"\n  {number} {task}" for number, task in tasks.items())
        raise ConversionError(f"--tasks {text}: the source has these, choose by number or part of the text:{listed}")
    return [tasks[number] for number in numbers]


def _normalization(text: str) -> str | list[float]:
    if text in ("min_max", "quantile"):
        return text
    try:
        low, high = (float(word) for word in text.split(","))
        check_range([low, high])
    except ValueError as error:
        raise ValueError(f"--normalization {text} is not min_max, quantile or two numbers LOW,HIGH, rising") from error
    return [low, high]
