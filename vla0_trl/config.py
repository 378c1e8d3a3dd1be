"""VLAConfig: all that a dataset or checkpoint must know to write actions as text, saved in it as vla_config.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from vla0_trl.actions import ActionTokenizer, Quantizer
from vla0_trl.files import write_whole
from vla0_trl.limits import LIMITS
from vla0_trl.schema import (
    Kind,
    between,
    boolean,
    items,
    line_of_text,
    mistakes,
    number,
    numeric,
    optional,
    positive,
    positive_share,
    read_record,
    text,
    whole,
)
from vla0_trl.stats import NormStats, check_range, stats_or_record

Observation = dict[str, Any]  # what a policy sees: see `policy.observation`
CONFIG_NAME = "vla_config.json"
NANO = "nano"  # as a `model_name_or_path`: build the backbone (models/nano.py) instead of loading one
ENSEMBLE_WEIGHTS = ("uniform", "vla0_v1", "vla0_v2")  # by name; see `policy.execution.TemporalEnsembler`
_MAX_CAMERAS, _MAX_DIM, _MAX_VALUES = 16, 4096, 10_000  # values: the integers in one answer


@dataclass
class VLAConfig:
    """The contract between data, training and inference.

    Args:
        cameras (`list[str]`): names, in the order in which the images enter the prompt.
        action_dim, state_dim (`int`): widths of one action and of the state vector (0: the dataset has no state).
        chunk_size (`int`): steps predicted at once.
        waypoints (`list[int]`, *optional*): steps of the chunk that are written, such as [0, 3, 7], the first and the
            last among them; the others are interpolated, and a gripper keeps its last value. Default: all steps.
        n_action_steps (`int`, *optional*, defaults to `chunk_size`): steps executed before the next prediction.
        ensemble_size (`int`, *optional*, defaults to `1`): > 1 re-queries at every step and averages up to that many
            overlapping predictions (ACT's temporal ensembling); excludes `n_action_steps` > 1.
        ensemble_decay (`float`, *optional*), ensemble_weights (`str`, *optional*): how the ensemble weighs them, one
            of the two; a plain mean without. See [`TemporalEnsembler`].
        temperature (`float`): answers are drawn with it; 0 is greedy decoding. See [`policy.sessions`].
        image_size (`int`): side of the square that the model sees, in pixels.
        crop_ratio (`float`): side of the crop over side of the image: random in training, central in evaluation.
        image_jitter (`list[float]`, *optional*): of brightness, contrast, saturation and hue, random in training.
        tile_images (`bool`): show all cameras as one image, side by side (VLA-0), instead of one image each.
        num_bins (`int`): integers run 0…num_bins, inclusive (1000 in VLA-0; 511 makes VLA-0-Smol's 512 levels).
        use_state (`bool`): write the state into the prompt, as integers.
        relative_actions (`bool`): actions are written as action − state; `action_stats` are then of the differences.
        use_system_prompt (`bool`): prepend VLA-0's description of the output format.
        normalization (`str` or `[low, high]`): see [`NormStats.bounds`].
        gripper (`str`, *optional*): `"sign"` executes the last action dimension as −1 (open) or +1 (closed).
        action_stats, state_stats ([`NormStats`]): what sets the scale of the integers.
        fps (`float`): control frequency in Hz.
        state_names, action_names (`list[str]`, *optional*): of each dimension; None: the data did not tell.
        base_model (an adapter's), robot, units, source, source_revision (`str`): origin and meaning of the numbers.
    """

    cameras: list[str] = field(default_factory=lambda: ["image"])
    action_dim: int = 2
    state_dim: int = 0
    chunk_size: int = 8
    waypoints: list[int] | None = None
    n_action_steps: int | None = None
    ensemble_size: int = 1
    ensemble_decay: float | None = None
    ensemble_weights: str | None = None
    temperature: float = 0.0
    image_size: int = 512
    crop_ratio: float = 1.0
    image_jitter: list[float] | None = None
    tile_images: bool = False
    num_bins: int = 511
    use_state: bool = False
    relative_actions: bool = False
    use_system_prompt: bool = False
    normalization: str | list[float] = "min_max"
    gripper: str | None = None
    action_stats: NormStats | None = None
    state_stats: NormStats | None = None
    fps: float = 10.0
    state_names: list[str] | None = None
    action_names: list[str] | None = None
    base_model: str | None = None
    robot: str | None = None
    units: str | None = None
    source: str | None = None
    source_revision: str | None = None

    def __post_init__(self):
        if lines := mistakes(vars(self), _KINDS):
            raise ValueError("\n".join(lines))
        for name in ("action_stats", "state_stats"):
            if isinstance(getattr(self, name), dict):
                try:
                    setattr(self, name, NormStats.from_dict(getattr(self, name)))
                except ValueError as error:
                    raise ValueError("\n".join(f"{name}: {line}" for line in str(error).split("\n"))) from error
        if self.ensemble_size > 1:
            if self.n_action_steps not in (None, 1):
                raise ValueError(
                    f"ensemble_size={self.ensemble_size} re-queries at every step, so n_action_steps="
                    f"{self.n_action_steps} would do nothing: leave n_action_steps out, or set ensemble_size=1"
                )
            self.n_action_steps = 1
        elif self.n_action_steps is None:
            self.n_action_steps = self.chunk_size
        self._check()

    def _check(self):
        def need(condition: bool, message: str):
            if not condition:
                raise ValueError(message)

        need(len(set(self.cameras)) == len(self.cameras), f"cameras has duplicates: {self.cameras}")
        n_action_steps, chunk_size = self.n_action_steps, self.chunk_size
        need(n_action_steps <= chunk_size, f"n_action_steps={n_action_steps} is more than chunk_size={chunk_size}")
        ends = self.waypoints is None or (self.waypoints[:1], self.waypoints[-1:]) == ([0], [self.chunk_size - 1])
        need(
            ends and self.written_steps == sorted(set(self.written_steps)),
            f"waypoints={self.waypoints} must be increasing steps from 0 to {self.chunk_size - 1}, the last of the "
            f"chunk_size={self.chunk_size}",
        )
        check_ensemble(self.chunk_size, self.ensemble_size, self.ensemble_decay, self.ensemble_weights)
        need(
            self.num_values <= _MAX_VALUES,
            f"an answer would hold {self.num_values} integers, at most {_MAX_VALUES} are possible: set a smaller "
            f"chunk_size={self.chunk_size}, or waypoints",
        )
        check_range(self.normalization)
        need(self.gripper in (None, "sign"), f"gripper={self.gripper!r} must be 'sign' or left out")
        need(
            self.state_dim > 0 or not self.use_state,
            "use_state=True, but the data has no state (state_dim=0): set use_state=False",
        )
        need(
            self.state_dim >= self.action_dim or not self.relative_actions,
            f"relative_actions=True needs a state that begins with the action's {self.action_dim} coordinates, "
            f"but state_dim={self.state_dim}: set relative_actions=False",
        )
        for name, dim in (("action", self.action_dim), ("state", self.state_dim)):
            stats, names = getattr(self, f"{name}_stats"), getattr(self, f"{name}_names")
            need(names is None or len(names) == dim, f"{name}_names={names}, but {name}_dim={dim}: one name for each")
            found = dim if stats is None else stats.dim
            need(found == dim, f"{name}_stats has {found} dimensions, {name}_dim={dim}")

    @property
    def written_steps(self) -> list[int]:
        """The steps of a chunk that an answer holds: the waypoints, or all of them."""
        return list(range(self.chunk_size)) if self.waypoints is None else self.waypoints

    @property
    def num_values(self) -> int:
        """Integers in one answer."""
        return len(self.written_steps) * self.action_dim

    def action_tokenizer(self) -> ActionTokenizer:
        """The codec of this config's actions."""
        if self.action_stats is None:
            raise ValueError("this config has no action_stats: it was not made by a conversion")
        return ActionTokenizer(
            self.action_stats,
            self.num_bins,
            self.chunk_size,
            self.normalization,
            relative=self.relative_actions,
            written_steps=self.written_steps,
            holds_last_dimension=self.gripper is not None,
        )

    def state_quantizer(self) -> Quantizer | None:
        """The codec of the state text; None if the prompt carries no state."""
        if not self.use_state:
            return None
        if self.state_stats is None:
            raise ValueError("use_state=True, but this config has no state_stats: it was not made by a conversion")
        return Quantizer(self.state_stats, self.num_bins, self.normalization)

    def postprocess_actions(self, actions: np.ndarray) -> np.ndarray:
        """Predicted actions (…, action_dim) as the robot takes them: the gripper's sign instead of its average."""
        if self.gripper == "sign":
            actions = actions.copy()
            actions[..., -1] = np.where(actions[..., -1] > 0, 1.0, -1.0)
        return actions

    def replace(self, **changes: Any) -> VLAConfig:
        """A copy with fields changed, checked again.

        `n_action_steps` keeps its value unless it was only a consequence of the old chunk_size or ensemble_size. An
        ensemble that is switched off takes its weights along, and new weights replace the old ones.
        """
        follows = self.ensemble_size > 1 or self.n_action_steps == self.chunk_size
        if follows and {"chunk_size", "ensemble_size"} & changes.keys():
            changes.setdefault("n_action_steps", None)
        weighing = {"ensemble_decay": None, "ensemble_weights": None}
        if changes.get("ensemble_size") == 1 or {name for name in weighing if changes.get(name) is not None}:
            changes = weighing | changes
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `vla_config.json` into `directory`; in one step, so that its existence means it is whole."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(directory / CONFIG_NAME, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, repo_type: str | None = None, revision: str | None = None
    ) -> VLAConfig:
        """Read `vla_config.json` from a local folder or a Hub repository (`repo_type="dataset"` for datasets).

        `FileNotFoundError` where there is none; `ValueError` for a damaged file, unknown fields or impossible values.
        """
        path = Path(name_or_path) / CONFIG_NAME
        if not Path(name_or_path).is_dir():
            path = _download(str(name_or_path), repo_type, revision)
        elif not path.is_file():
            raise FileNotFoundError(
                f"{path.parent} has no {CONFIG_NAME}: not a dataset made by data_prep/, nor a checkpoint of "
                "recipes/sft_*.py (a run that was stopped while writing leaves such a folder: use an earlier one)"
            )
        data = read_record(path, {})
        try:
            if unknown := data.keys() - {f.name for f in fields(cls)}:
                raise ValueError(f"unknown fields {sorted(unknown)}; written by a newer vla0_trl?")
            return cls(**data)
        except ValueError as error:
            raise ValueError("\n".join(f"{path}: {line}" for line in str(error).split("\n"))) from error


_UP_TO_100 = numeric(lambda value: 0 <= value <= 100, "a number from 0 to 100")
_KINDS: dict[str, Kind] = {
    "cameras": items(line_of_text, 1, _MAX_CAMERAS),
    "action_dim": between(1, _MAX_DIM),
    "state_dim": between(0, _MAX_DIM),
    **{name: between(*LIMITS[name]) for name in ("chunk_size", "num_bins", "image_size", "ensemble_size")},
    "waypoints": optional(items(whole, 1)),
    "n_action_steps": optional(between(*LIMITS["n_action_steps"])),
    "ensemble_decay": optional(number),
    "temperature": _UP_TO_100,
    "crop_ratio": positive_share,
    "image_jitter": optional(items(_UP_TO_100, 4, 4)),  # brightness, contrast, saturation, hue
    **dict.fromkeys(("tile_images", "use_state", "relative_actions", "use_system_prompt"), boolean),
    **dict.fromkeys(("action_stats", "state_stats"), optional(stats_or_record)),
    "fps": positive,
    **dict.fromkeys(("state_names", "action_names"), optional(items(line_of_text, 0, _MAX_DIM))),
    **dict.fromkeys(("base_model", "gripper", "ensemble_weights"), optional(line_of_text)),
    **dict.fromkeys(("robot", "units", "source", "source_revision"), optional(text)),  # a card escapes them
}


def check_ensemble(chunk_size: int, ensemble_size: int, decay: float | None, weights: str | None) -> None:
    """`ValueError` for an impossible ensemble, for unknown weights, and for weights without an ensemble."""
    if not 1 <= ensemble_size <= chunk_size:
        raise ValueError(
            f"ensemble_size={ensemble_size} must be between 1 and chunk_size={chunk_size}: no more predictions than "
            "that overlap"
        )
    if weights is not None and weights not in ENSEMBLE_WEIGHTS:
        raise ValueError(f"ensemble_weights={weights!r} must be one of {', '.join(ENSEMBLE_WEIGHTS)}, or left out")
    if decay is not None and not np.isfinite(decay):
        raise ValueError(f"ensemble_decay={decay} must be a finite number")
    given = {"ensemble_decay": decay, "ensemble_weights": weights}
    given = [f"{name}={value}" for name, value in given.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are two ways to weigh predictions: leave one out")
    if given and ensemble_size == 1:
        raise ValueError(
            f"{given[0]} weighs overlapping predictions, but ensemble_size=1 keeps only the newest: set "
            f"ensemble_size > 1, or leave {given[0].split('=')[0]} out"
        )


def _download(repo_id: str, repo_type: str | None, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(hf_hub_download(repo_id, CONFIG_NAME, repo_type=repo_type, revision=revision))
    except (EntryNotFoundError, RepositoryNotFoundError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"no folder {repo_id!r} here, and no {CONFIG_NAME} in a Hub repository so named ({type(error).__name__})"
        ) from error
