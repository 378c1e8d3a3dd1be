"""The options of the decoder, and what it counts. Nothing here imports torch."""

from dataclasses import dataclass

from vla0_trl.internals import PARALLEL, STOCK

CHECKS = ("fall_back", "raise", "skip")
EXACT = "exact"
MODES = (EXACT, PARALLEL, STOCK)


class PromptError(ValueError):
    """The caller's mistake: what was asked for can't be decoded in any way."""


def check_length(prompt: int, answer: int, limit: int) -> None:
    """`PromptError` if a prompt of `prompt` tokens and the longest answer don't fit the model's positions."""
    if prompt + answer > limit:
        raise PromptError(
            f"a prompt of {prompt} tokens and an answer of up to {answer} don't fit into the model's {limit} "
            "positions: use fewer or smaller images, or shorter chunks"
        )


@dataclass
class DecodingOptions:
    """How answers are decoded. No option but `mode="parallel"` changes a token.

    Args:
        mode (`str`): `"exact"` writes the tokens of greedy decoding. `"parallel"` takes the answers of
            [`ParallelReader`] as they are, in which no number has seen another one. `"stock"` is `generate()`.
        refine (`int`): with `"parallel"`: rounds in which the numbers that the model is least sure of are asked again,
            and see the others before them.
        check (`str`): a model's first chunk is compared with stock `generate()`, see [`self_check`]. If they differ,
            or if ours raises, then or later: `"fall_back"` warns and continues with stock, `"raise"` raises an error;
            `"skip"` compares nothing.
        forced_tokens, small_head, candidates, drafts (`bool`): see [`decoder`].
        own_drafts (`bool`): the draft is a parallel reading where that made recent answers cheaper.
        reuse_prefix (`bool`): compute keys and values of the prompt up to the first image only once. Applies to frozen
            weights only; switch it off where an adapter is enabled and disabled between chunks.
        graphs (`bool`): CUDA graphs, on a GPU.
    """

    mode: str = EXACT
    refine: int = 0
    forced_tokens: bool = True
    small_head: bool = True
    candidates: bool = True
    drafts: bool = True
    own_drafts: bool = True
    reuse_prefix: bool = True
    graphs: bool = True
    check: str = "fall_back"

    def __post_init__(self):
        for name, allowed in (("mode", MODES), ("check", CHECKS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(allowed)}")
        if self.refine < 0 or (self.refine and self.mode != PARALLEL):
            raise ValueError(
                f"refine={self.refine} with {self.mode} decoding: it is a number of rounds, 0 or more, and only "
                "parallel decoding has any"
            )

    def check_rounds(self, num_values: int) -> None:
        """`ValueError` if an answer of that many numbers has fewer rounds: each asks fewer numbers than the last."""
        if self.refine >= num_values:
            raise ValueError(
                f"refine={self.refine}: an answer of {num_values} numbers has at most {num_values - 1} rounds"
            )


@dataclass
class DecodingStats:
    """Counts since it was made.

    Attributes:
        chunks (`int`): answers.
        passes (`int`): forward passes of the model, the prompts' included; one pass serves a whole batch.
        drafted, accepted (`int`): tokens of drafts that were read, and how many of them were right.
        own_drafts (`int`): answers whose draft was a parallel reading.
    """

    chunks: int = 0
    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    own_drafts: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were right; NaN without drafts."""
        return self.accepted / self.drafted if self.drafted else float("nan")


class DraftChoice:
    """Which draft made recent answers cheaper: the available one, which is free, or the policy's own, a few passes.

    The mean cost of recent answers is kept for each. The other one is tried again from time to time: scenes change.
    """

    TRY_AGAIN = 32  # answers
    MEMORY = 0.8  # weight of the mean so far

    def __init__(self):
        self._cost: dict[bool, float] = {}
        self._asked = 0

    def own(self) -> bool:
        """Whether the policy drafts the next answer itself."""
        self._asked += 1
        for own in (True, False):
            if own not in self._cost:
                return own
        cheaper = self._cost[True] < self._cost[False]
        return cheaper != (self._asked % self.TRY_AGAIN == 0)

    def record(self, own: bool, cost: float) -> None:
        """What an answer cost with this kind of draft."""
        self._cost[own] = self.MEMORY * self._cost.get(own, cost) + (1 - self.MEMORY) * cost
