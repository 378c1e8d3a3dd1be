"""The policy that an evaluation measures: a checkpoint's, or anything else that answers observations with chunks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla0_trl.config import VLAConfig
from vla0_trl.evaluation.arguments import PolicyArguments
from vla0_trl.evaluation.env_runner import Seed
from vla0_trl.evaluation.rollout import Policy
from vla0_trl.internals import PARALLEL
from vla0_trl.manifest import trained_on
from vla0_trl.models.fingerprint import checkpoint_hash
from vla0_trl.models.loading import checkpoint_folder
from vla0_trl.policy.policy import VLAPolicy, resolve_device


class PolicyError(RuntimeError):
    """The policy gives no actions any more, through no fault of the simulator: a server has gone; one line."""


@dataclass(frozen=True, kw_only=True)
class PolicySource:
    """A policy before it is loaded; it is loaded only if an episode is missing.

    Attributes:
        config ([`VLAConfig`]): what it observes and how its chunks are executed, unless flags say otherwise.
        identified (`bool`): whether the hash is that of its weights; a server may not tell.
        protocol (`dict`): what of its running may change results, such as `dtype`.
        trained_on (`set[Seed]`): the seeds that it has learnt from, where that is known.
        load (`Callable`): gives the policy, which executes as the config that it is called with.
    """

    checkpoint: str
    checkpoint_hash: str
    config: VLAConfig
    protocol: dict[str, Any]
    device: str
    trained_on: set[Seed]
    load: Callable[[VLAConfig], Policy]
    identified: bool = True


def checkpoint_policy(args: PolicyArguments) -> PolicySource:
    """The checkpoint that `args` name; `ValueError` if there is no such checkpoint, device or type."""
    device, dtype = resolve_device(args.device, args.dtype)
    folder = checkpoint_folder(args.model_name_or_path)
    config = VLAConfig.from_pretrained(folder)
    decoding = args.decoding_options(config)

    def load(config: VLAConfig) -> VLAPolicy:
        policy = VLAPolicy.from_pretrained(folder, device, dtype, load_in_4bit=args.load_in_4bit, decoding=decoding)
        policy.config = config
        return policy

    return PolicySource(
        checkpoint=args.model_name_or_path,
        checkpoint_hash=checkpoint_hash(folder),
        config=config,
        protocol={
            "dtype": str(dtype).removeprefix("torch."),
            **({"load_in_4bit": True} if args.load_in_4bit else {}),
            # Exact and stock decoding write the same answers: either may go on with the other's run.
            **({"decoding": PARALLEL, "refine": args.refine} if args.decoding == PARALLEL else {}),
        },
        device=str(device),
        trained_on=seeds_trained_on(folder),
        load=load,
    )


def seeds_trained_on(checkpoint: Path) -> set[Seed]:
    """The simulator's seeds that a checkpoint's training data were recorded on; empty if it does not know them."""
    return {tuple(seed) if isinstance(seed, list) else seed for seed in trained_on(checkpoint).get("seeds", ())}
