"""Human PushT demonstrations (diffusion policy's zarr) -> chat dataset.

    python data_prep/convert_pusht_zarr.py --source PATH/pusht_cchi_v7_replay.zarr --output_dir data/pusht_human

206 episodes, 25,650 frames, 10 s on one core. The zarr is in https://diffusion-policy.cs.columbia.edu/data/training/pusht.zip
(Chi et al., "Diffusion Policy", 2023). Needs the extra [convert]:
pip install -c requirements.lock -e ".[convert]".
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vla0_trl import pip_install
from vla0_trl.command_line import option, parse
from vla0_trl.data.arguments import Subset, command_line_errors
from vla0_trl.data.episodes import Episode, EpisodeError, check_frame_size
from vla0_trl.data.pusht import PushTArguments, pusht_info
from vla0_trl.data.staging import ConversionError
from vla0_trl.envs.pusht.env import CAMERA, STATE_MODES, TASK
from vla0_trl.schema import one_line

if TYPE_CHECKING:
    import zarr


_ARRAYS = {"img": 4, "state": 2, "action": 2}  # and their dimensions, time first
_MAX_FRAMES, _MAX_CHUNK_BYTES = 1_000_000, 256 << 20
# What zarr and numcodecs raise for damaged metadata and chunks.
_DAMAGED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, SystemError, OSError)


@dataclass(kw_only=True)
class Arguments(Subset, PushTArguments):
    source: Path = option(help="the folder pusht_cchi_v7_replay.zarr")


class PushTZarr:
    """The episodes of one zarr: `data/{img, state, action}` one after another, `meta/episode_ends`."""

    def __init__(self, path: Path, state: str):
        try:
            import zarr
        except ImportError as error:
            raise ConversionError(f"reading this format needs zarr: {pip_install('convert')}") from error
        if not (path / "data").is_dir() or not (path / "meta").is_dir():
            raise ConversionError(f"{path} is not a zarr of PushT demonstrations: it has no data/ and meta/ folders")
        for file in path.rglob("*"):
            if not file.resolve().is_relative_to(path.resolve()):
                raise ConversionError(f"{file} leads to {file.resolve()}, outside the zarr: put the file itself there")
        self.path = path
        self.state_dim = STATE_MODES[state]
        try:
            group = zarr.open_group(path, mode="r")
            arrays = [_whole(path, group, f"data/{name}", ndim) for name, ndim in _ARRAYS.items()]
            self._frames, self._states, self._actions = arrays[0], arrays[1][:], arrays[2][:]
            self._ends = _whole(path, group, "meta/episode_ends", 1, "iu")[:].tolist()
        except ConversionError:
            raise
        except _DAMAGED as error:
            raise ConversionError(f"{path} is damaged, fetch it again: {one_line(error)}") from error
        for array, name, least in ((arrays[1], "state", self.state_dim), (arrays[2], "action", 2)):
            if array.shape[1] < least:
                raise ConversionError(f"{path}: data/{name} has {array.shape[1]} values per frame, wanted {least}")
        check_frame_size(*arrays[0].shape[1:3], f"{path}: data/img")
        lengths = {array.shape[0] for array in arrays}
        if lengths != set(self._ends[-1:]) or sorted({0, *self._ends}) != [0, *self._ends]:
            raise ConversionError(
                f"{path}: data/img, state and action have {sorted(lengths)} frames, meta/episode_ends says "
                f"{self._ends[-1:]}: fetch it again"
            )
        self._chunk: tuple[int, np.ndarray | None] = (-1, None)
        content = hashlib.sha256(b"".join(a.tobytes() for a in (self._states, self._actions)))
        self.info = pusht_info(
            source=path.resolve().name,
            revision=f"sha256 of states and actions: {content.hexdigest()[:16]}",
            license="mit",
            how=(
                "Demonstrations by people with a mouse, recorded for Chi et al., "
                "[Diffusion Policy](https://arxiv.org/abs/2303.04137) (2023). Actions are the finger's target in "
                "pixels of a 512 × 512 workspace."
            ),
            options={"state": state},
        )

    def __len__(self) -> int:
        return len(self._ends)

    def task(self, index: int) -> str:
        return TASK

    def episode(self, index: int) -> Episode:
        start, end = (self._ends[index - 1] if index else 0), self._ends[index]
        name = f"{self.info.source}, episode {index}"
        return Episode(
            task=TASK,
            actions=self._actions[start:end],
            states=self._states[start:end, : self.state_dim],
            images={CAMERA: self._images(start, end, name)},
            name=name,
        )

    def _images(self, start: int, end: int, name: str) -> Iterator[np.ndarray]:
        """uint8 (96, 96, 3) each. They are stored as floats, in chunks of 161: each chunk is read once."""
        length = self._frames.chunks[0]
        for position in range(start, end):
            number, offset = divmod(position, length)
            if number != self._chunk[0]:
                try:
                    self._chunk = number, self._frames[number * length : (number + 1) * length]
                except _DAMAGED as error:
                    text = one_line(error)
                    raise EpisodeError(f"{name}: data/img is damaged, fetch it again: {text}") from error
            floats = self._chunk[1][offset]
            with np.errstate(invalid="ignore"):  # a NaN is reported below
                pixels = floats.astype(np.uint8)
            if (pixels != floats).any():
                raise EpisodeError(
                    f"{name}, frame {position - start}: img holds values that are not whole numbers in 0…255: the "
                    "copy is damaged, fetch it again"
                )
            yield pixels


def _whole(path: Path, group: "zarr.Group", key: str, ndim: int, kinds: str = "fiu") -> "zarr.Array":
    """An array of numbers of which every chunk is there: zarr reads absent ones as its fill value, as black frames."""
    import zarr

    array = group.get(key)
    if not isinstance(array, zarr.Array):
        raise ConversionError(f"{path} has no array {key}: it is not a zarr of PushT demonstrations")
    if array.ndim != ndim or array.dtype.kind not in kinds or array.shape[0] > _MAX_FRAMES:
        numbers = "whole numbers" if kinds == "iu" else "numbers"
        raise ConversionError(
            f"{path}: {key} is {array.dtype} of shape {array.shape}, wanted {numbers} in {ndim} dimensions, at most "
            f"{_MAX_FRAMES} long"
        )
    if math.prod(array.chunks) * array.dtype.itemsize > _MAX_CHUNK_BYTES:
        raise ConversionError(
            f"{path}: {key} has chunks of {array.chunks}, at most {_MAX_CHUNK_BYTES >> 20} MiB are read"
        )
    if array.nchunks_initialized < array.nchunks:
        raise ConversionError(
            f"{path}: {key} has {array.nchunks_initialized} of its {array.nchunks} chunks, absent ones would read as "
            "zeros: the copy is not complete, fetch it again"
        )
    return array


def main() -> None:
    args = parse(Arguments, __doc__)
    with command_line_errors(args):
        source = PushTZarr(args.source, args.state)
        args.convert(source, args.pusht_config())


if __name__ == "__main__":
    main()
