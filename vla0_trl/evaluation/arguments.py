"""The command line that evaluations in all simulators share. Nothing here imports torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vla0_trl.command_line import option
from vla0_trl.config import VLAConfig
from vla0_trl.envs.libero import protocol
from vla0_trl.envs.libero.perturb import NAMES
from vla0_trl.execution_arguments import ExecutionArguments
from vla0_trl.policy.speculative.options import EXACT, MODES, DecodingOptions

DTYPES = ("bfloat16", "float32")


@dataclass(kw_only=True)
class ModelArguments:
    """Which checkpoint, and how it runs."""

    model_name_or_path: str = option(help="checkpoint, full or adapter: a folder or a Hub id")
    device: str | None = option(None, "cuda, cuda:1, cpu, … (default: a GPU if there is one)")
    dtype: str | None = option(None, "default: bfloat16 on a GPU, float32 on a CPU", choices=DTYPES)


@dataclass(kw_only=True)
class DecodingArguments(ModelArguments):
    """How a checkpoint answers."""

    decoding: str = option(
        EXACT,
        "exact: what stock decoding writes, faster; stock: transformers' own; parallel: each number without seeing "
        "the others, in the fewest passes (default: %(default)s)",
        choices=MODES,
    )
    refine: int = option(
        0,
        "with --decoding parallel: rounds that ask again what the model is least sure of, seeing the rest (default: "
        "%(default)s)",
    )

    def decoding_options(self, config: VLAConfig) -> DecodingOptions:
        """`ValueError` where the flags disagree with each other or with the config."""
        options = DecodingOptions(mode=self.decoding, refine=self.refine)
        options.check_rounds(config.num_values)
        return options


@dataclass(kw_only=True)
class PolicyArguments(ExecutionArguments, DecodingArguments):
    """How a checkpoint acts: what evaluations measure, and servers serve."""

    load_in_4bit: bool = option(False, "weights as NF4, with bitsandbytes: less memory, other answers")


@dataclass(kw_only=True)
class EvaluationArguments(PolicyArguments):
    """What every simulator's evaluation can be told; a script adds its own fields, and the defaults that suit it.

    `rank`, `num_processes`, `launch` and `store` are not flags: `driver.join_launch` sets them.
    """

    model_name_or_path: str | None = option(None, "checkpoint, full or adapter: a folder or a Hub id")
    policy: str | None = option(
        None, "instead: what answers at ws://… by openpi's protocol, or at vla-eval://… by vla-eval's"
    )
    policy_key_file: Path | None = option(None, "a file with that server's key")
    output_dir: Path | None = option(
        None, "gets episodes.jsonl, results.json and videos/; one folder per run (default: runs/eval/CHECKPOINT)"
    )
    num_envs: int = option(8, "episodes side by side: speed, not results (default: %(default)s)")
    max_steps: int | None = option(None, "time limit of an episode (default: the protocol's)")
    num_videos: int = option(
        1, "film the first N episodes, in LIBERO of each task (default: %(default)s)", metavar="N"
    )
    overwrite: bool = option(False, "delete the evaluation in --output_dir and start again")

    rank: int = field(init=False, default=0)
    num_processes: int = field(init=False, default=1)
    launch: str | None = field(init=False, default=None)  # a word that this launch's processes share
    store: Any = field(init=False, default=None, repr=False)  # of torch.distributed, to be kept until they end

    def __post_init__(self):
        if (self.model_name_or_path is None) == (self.policy is None):
            raise ValueError("give one of --model_name_or_path and --policy: what shall be evaluated?")
        if self.policy is not None:
            self.model_name_or_path = self.policy  # its name in tables
        if self.output_dir is None:
            name = self.model_name_or_path.strip("./").replace("/", "_") or "checkpoint"
            self.output_dir = Path("runs", "eval", name)


@dataclass(kw_only=True)
class LiberoArguments(EvaluationArguments):
    """What eval/eval_libero.py can be told."""

    suites: str = option(
        ",".join(list(protocol.MAX_STEPS)[:4]), "suites, separated by commas (default: %(default)s)", metavar="A,B"
    )
    task_ids: str | None = option(None, "numbers of tasks in each suite, from 0 (default: all)", metavar="0,3")
    num_episodes_per_task: int = option(protocol.NUM_INIT_STATES, "initial states of each task (default: %(default)s)")
    assets_dir: str | None = option(None, "LIBERO's assets (default: $LIBERO_ASSETS, else the Hub's)")
    perturb: list[str] = option([], f"may be repeated; {NAMES}", metavar="NAME[:SEVERITY]", action="extend")
    render_size: int = option(
        protocol.IMAGE_SIZE, "px; what a policy was trained on (default: %(default)s)", choices=protocol.RENDER_SIZES
    )
    benchmark_envs: bool = option(False, "only print the speed of --num_envs against one in sequence")
