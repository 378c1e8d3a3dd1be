"""The command line that all converters share."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from vla0_trl.config import VLAConfig
from vla0_trl.data.card import push_dataset
from vla0_trl.data.convert import Selection, Source, convert
from vla0_trl.data.episodes import EpisodeError, ImageFormat
from vla0_trl.data.staging import ConversionError

# What does not change the dataset's content stays out of the command that its card shows.
_NOT_CONTENT = ("output_dir", "num_proc", "overwrite", "push_to_hub", "public")


class ConversionParser(argparse.ArgumentParser):
    """A parser with the flags of every converter.

    Args:
        script_doc (`str`): the script's docstring, shown by --help.
        cameras (`list[str]`, *optional*): the source's; None: it says itself which it has.
        recipe (`str`): what to train with.
        defaults: of `chunk_size`, `num_bins`, `relative_actions`, `use_state`, and others.
    """

    def __init__(
        self, script_doc: str, cameras: list[str] | None, recipe: str = "recipes/sft_libero.py", **defaults: Any
    ):
        self.recipe = recipe
        super().__init__(description=script_doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        add, flag = self.add_argument, argparse.BooleanOptionalAction
        add("--output_dir", required=True, type=Path, help="the dataset's folder; appears when it is complete")
        add("--chunk_size", type=int, help="actions in an answer (default: %(default)s)")
        add("--num_bins", type=int, help="the largest integer (default: %(default)s)")
        add(
            "--normalization",
            type=_normalization,
            default="min_max",
            metavar="min_max|quantile|LOW,HIGH",
            help="what 0…num_bins spans (default: %(default)s)",
        )
        add("--relative_actions", action=flag, help="write action − state (default: %(default)s)")
        default = "if there is one" if defaults.get("use_state") is None else "%(default)s"
        add("--use_state", action=flag, help=f"write the state into the prompt (default: {default})")
        add("--cameras", type=_names, default=cameras, metavar="A,B", help="which, in this order (default: all)")
        add("--episodes", type=_slice, default=slice(None), metavar="FROM:TO", help="only these of the source: 0:10")
        add("--max_episodes_per_task", type=positive, metavar="N", help="at most N of each task, drawn with --seed")
        add("--seed", type=int, default=0, help="(default: %(default)s)")
        add(
            "--image_format",
            choices=get_args(ImageFormat),
            default="png",
            help="of frames that the source does not hold as files; jpeg has quality 95 (default: %(default)s)",
        )
        add("--skip_bad_episodes", action="store_true", help="leave bad episodes out, list them in the end")
        add("--num_proc", type=positive, default=1, help="processes; the result is the same (default: %(default)s)")
        add("--overwrite", action="store_true", help="replace what is in output_dir")
        add("--push_to_hub", metavar="USER/NAME", help="upload to this dataset repository; needs `hf auth login`")
        add("--public", action="store_true", help="make the repository public (default: private)")
        self.set_defaults(**defaults)

    def parse_known_args(self, args=None, namespace=None):
        """As usual, but `--normalization -1,1` works: argparse takes "-1,1" for a flag unless "=" joins the two."""
        args = list(sys.argv[1:] if args is None else args)
        if "--normalization" in args[:-1]:
            at = args.index("--normalization")
            args[at : at + 2] = ["=".join(args[at : at + 2])]
        return super().parse_known_args(args, namespace)

    def config(self, args: argparse.Namespace, **fields: Any) -> VLAConfig:
        """The config that the flags and a source's own `fields`, which win, make; impossible flags end the program."""
        names = ("chunk_size", "num_bins", "normalization", "relative_actions", "use_state", "cameras")
        try:
            return VLAConfig(**{name: getattr(args, name) for name in names} | fields)
        except ValueError as error:
            self.error(str(error))

    def selection(self, args: argparse.Namespace, tasks: list[str] | None = None) -> Selection:
        """Which episodes the flags choose, of `tasks` only if given."""
        return Selection(args.episodes, args.max_episodes_per_task, args.seed, tasks)

    def convert(
        self, args: argparse.Namespace, source: Source, config: VLAConfig, tasks: list[str] | None = None
    ) -> None:
        """[`convert`] as the flags say, of `tasks` only if given, and the upload."""
        convert(
            source,
            config,
            args.output_dir,
            selection=self.selection(args, tasks),
            num_proc=args.num_proc,
            image_format=args.image_format,
            skip_bad_episodes=args.skip_bad_episodes,
            overwrite=args.overwrite,
            command=self._command(args),
            recipe=self.recipe,
        )
        if args.push_to_hub:
            push_dataset(args.output_dir, args.push_to_hub, args.public)

    def _command(self, args: argparse.Namespace) -> str:
        """A command that makes the same dataset, for its card."""
        words = [f"python data_prep/{self.prog} --output_dir DATASET"]
        for action in self._actions:
            value = getattr(args, action.dest, action.default)
            if value == action.default or action.dest in _NOT_CONTENT:
                continue
            flag = action.option_strings[0] if value is not False else action.option_strings[1]
            if isinstance(value, bool):
                words.append(flag)
            else:
                values = value if action.nargs == "+" else [_as_word(value)]
                words.append(shlex.join([flag, *map(str, values)]))
        return " \\\n  ".join(words)


@contextmanager
def command_line_errors(output_dir: Path) -> Iterator[None]:
    """Expected failures as one line on stderr and exit status 1; Ctrl-C as 130."""
    try:
        yield
    except (ConversionError, EpisodeError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(
            f"\nstopped: finished episodes are kept in {output_dir}.partial; run the same command again to go on",
            file=sys.stderr,
        )
        sys.exit(130)


def chosen_tasks(text: str | None, tasks: dict[int, str]) -> list[str] | None:
    """What `--tasks` chooses of a source's numbered instructions: "0,3" are numbers, all else is a part of their text.

    Raises:
        ConversionError: none; lists those that there are.
    """
    if text is None:
        return None
    words = text.split(",")
    if all(word.isdigit() for word in words):
        numbers = [int(word) for word in words]
    else:
        numbers = [number for number, task in tasks.items() if text.lower() in task.lower()]
    if not numbers or not tasks.keys() >= set(numbers):
        listed = "".join(f"\n  {number} {task}" for number, task in tasks.items())
        raise ConversionError(f"--tasks {text}: the source has these, choose by number or part of the text:{listed}")
    return [tasks[number] for number in numbers]


def chosen_cameras(asked: list[str] | None, cameras: list[str]) -> list[str]:
    """What `--cameras` chooses of a source's cameras.

    Raises:
        ConversionError: one that the source has not.
    """
    unknown = [camera for camera in asked or [] if camera not in cameras]
    if unknown:
        raise ConversionError(f"--cameras {','.join(asked)}: there is no {unknown[0]!r}, the source has {cameras}")
    return asked or cameras


def _normalization(text: str) -> str | list[float]:
    if text in ("min_max", "quantile"):
        return text
    try:
        low, high = (float(word) for word in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not min_max, quantile or two numbers LOW,HIGH") from error
    return [low, high]


def positive(text: str) -> int:
    """For argparse: a whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _names(text: str) -> list[str]:
    return text.split(",")


def _slice(text: str) -> slice:
    try:
        start, stop = (int(word) if word else None for word in text.split(":"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not FROM:TO, such as 0:10") from error
    return slice(start, stop)


def _as_word(value: Any) -> str:
    if isinstance(value, slice):
        return ":".join("" if end is None else str(end) for end in (value.start, value.stop))
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
