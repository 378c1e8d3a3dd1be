"""The command line that all converters share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vla0_trl.config import VLAConfig
from vla0_trl.conversion.convert import Selection, Source, convert
from vla0_trl.conversion.staging import ConversionError
from vla0_trl.episodes import EpisodeError

# What does not change the dataset's content stays out of the command that its card shows.
_NOT_CONTENT = ("output_dir", "num_proc", "overwrite", "push_to_hub", "public")


class ConversionParser(argparse.ArgumentParser):
    """A parser with the flags of every converter.

    Args:
        script_doc (`str`): the script's docstring, shown by --help.
        cameras (`list[str]`, *optional*): the source's; None: it says itself which it has.
        defaults: of `chunk_size`, `num_bins`, `relative_actions` and `use_state`.
    """

    def __init__(self, script_doc: str, cameras: list[str] | None, **defaults: Any):
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
        add("--use_state", action=flag, help="write the state into the prompt (default: %(default)s)")
        add("--cameras", type=_names, default=cameras, metavar="A,B", help="which, in this order (default: all)")
        add("--episodes", type=_slice, default=slice(None), metavar="FROM:TO", help="only these of the source: 0:10")
        add("--max_episodes_per_task", type=positive, metavar="N", help="at most N of each task, drawn with --seed")
        add("--seed", type=int, default=0, help="(default: %(default)s)")
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
        """The config that the flags and a source's own `fields` make; impossible flags end the program."""
        names = ("chunk_size", "num_bins", "normalization", "relative_actions", "use_state", "cameras")
        try:
            return VLAConfig(**{name: getattr(args, name) for name in names}, **fields)
        except ValueError as error:
            self.error(str(error))

    def convert(self, args: argparse.Namespace, source: Source, config: VLAConfig) -> Path:
        """[`convert`] as the flags say."""
        return convert(
            source,
            config,
            args.output_dir,
            selection=Selection(args.episodes, args.max_episodes_per_task, args.seed),
            num_proc=args.num_proc,
            overwrite=args.overwrite,
            push_to_hub=args.push_to_hub,
            public=args.public,
            command=self.command(args),
        )

    def command(self, args: argparse.Namespace) -> str:
        """A command that makes the same dataset, for its card."""
        words = [f"python data_prep/{self.prog} --output_dir DATASET"]
        for action in self._actions:
            if action.dest in ("help", *_NOT_CONTENT):
                continue
            value = getattr(args, action.dest)
            if value == action.default:
                continue
            if isinstance(action, argparse.BooleanOptionalAction):
                words.append(action.option_strings[0 if value else 1])
            else:
                words.append(f"{action.option_strings[0]} {_as_word(value)}")
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
