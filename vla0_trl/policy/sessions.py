"""What a policy remembers of each episode, and the noise by which answers are drawn where `temperature` is not 0.

The largest of logits plus temperature times Gumbel noise is a draw from softmax(logits / temperature) (the Gumbel-max
trick). So decoding stays an argmax: exact in few passes, and checked by stock decoding. The noise of an episode's n-th
chunk depends on the episode's name and n alone, not on batch, process or machine: an evaluation can be repeated, also
through a server, or after its simulator crashed. The name is the observation's `"noise"`, which evaluations and
servers set, or its `"episode"`.

Why draw at all: in a state where two ways are equally good, a greedy policy may take a step of one, then a step of the
other, for ever. A draw ends that. recipes/measurements.md has figures.
"""

import zlib
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

MAX_SESSIONS = 4096  # whose last chunk is remembered: 56 values each in LIBERO


class Session(NamedTuple):
    """One episode: its last chunk, (chunk_size, action_dim) in environment units, and how many it has asked for."""

    last_chunk: np.ndarray | None = None
    asked: int = 0


class Sessions:
    """The episodes that asked most recently, by their keys."""

    def __init__(self):
        self._sessions: OrderedDict[Hashable, Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def last_chunk(self, key: Hashable) -> np.ndarray | None:
        """None at an episode's beginning."""
        return self._sessions.get(key, Session()).last_chunk

    def remember(self, keys: Sequence[Hashable], chunks: Sequence[np.ndarray]) -> None:
        """These episodes' newest chunks; those that were silent for longest are forgotten."""
        for key, chunk in zip(keys, chunks, strict=True):
            self._sessions[key] = Session(chunk, self._sessions.get(key, Session()).asked + 1)
            self._sessions.move_to_end(key)
        while len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)

    def noise(self, keys: Sequence[Hashable], names: Sequence[str], shape: tuple[int, ...]) -> np.ndarray:
        """Gumbel noise for the next chunk of each episode, float32 (B, *shape); names: see the module."""
        counts = [self._sessions.get(key, Session()).asked for key in keys]
        seeds = [(zlib.crc32(name.encode()), asked) for name, asked in zip(names, counts, strict=True)]
        return np.stack([np.random.default_rng(seed).gumbel(size=shape) for seed in seeds]).astype(np.float32)
