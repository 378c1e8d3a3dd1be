"""Decoding of action chunks under `generate()`: the tokens of greedy decoding under the grammar, in fewer passes.

Answers have a known form. Four methods use it, none of them changes a token, and each can be switched off:

- *forced tokens*: a token without alternative needs no pass (a space after a number of full width);
- *small head*: logits only for the dozen tokens that the grammar ever allows, not for 49k to 152k;
- *tries*: all candidates for the next token, mostly ten digits, and the tokens that they force, are read in the pass
  that chooses among them, so it also gives the logits after the chosen one: two tokens per pass over the weights;
- *drafts*: a guess of the whole answer is read in one pass, with the prompt, and its correct first part becomes the
  answer's. A row that left its draft rejoins it at the next number. Without a draft, a step is guessed to equal the
  step before it. (Speculative decoding, Leviathan et al. 2023; from the text itself: prompt lookup, Saxena 2023.)

Exact means: each token is the argmax over what the grammar allows, of logits that are mathematically those of stock
greedy decoding. In floating point a pass over several tokens rounds differently from a pass over one, as a batch
rounds differently from a single row: where two logits agree to the last bits (in bfloat16, to about 1 %), the other
may win.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import Cache, PreTrainedModel

from vla0_trl.policy.grammar import ActionGrammar
from vla0_trl.policy.speculative.draft_state import DraftState, Speller, Tree
from vla0_trl.policy.speculative.tree_forward import TreeForward

# Tokens of candidates in a pass, summed over its rows, up to which they cost less than the passes that they save. CPUs
# become compute-bound early (on one core, 12 tokens cost SmolVLM2-500M as much as 1.7 passes over one token); a GPU's
# passes are limited by reading the weights up to hundreds of tokens.
MAX_CANDIDATES = {"cpu": 12, "cuda": 512}
CANDIDATE_SLOTS = 64  # room for candidates in the cache of each row
# The same limit for tokens of drafts; fewer than `FEWEST_DRAFTED` per row are not worth a wider pass.
MAX_DRAFTED = {"cpu": 64, "cuda": 1024}
FEWEST_DRAFTED = 8
# A prompt prefix shorter than this is read again for each prompt: that costs next to nothing.
SHORTEST_PREFIX = 8
# The cache's size is a multiple of this, so that most prompts fit the cache, and the CUDA graphs, of the last one.
CAPACITY_STEP = 128
# Inputs of a model that [`TreeForward`] makes itself, beside the cache.
OUR_INPUTS = {"input_ids", "attention_mask", "position_ids", "use_cache"}
CHECKS = ("fall_back", "raise", "skip")


class PromptError(ValueError):
    """The caller's mistake: what was asked for can't be decoded in any way."""


@dataclass
class DecodingOptions:
    """Which methods [`ChunkDecoder`] uses. None of them changes a token.

    Args:
        check (`str`): a model's first chunk is compared with stock `generate()`, see [`self_check`]. If they differ,
            or if ours raises, then or later: `"fall_back"` warns and continues with stock, `"raise"` raises an error;
            `"skip"` compares nothing.
        forced_tokens, small_head, tries, drafts (`bool`): see the module; `tries` are the candidates.
        reuse_prefix (`bool`): compute keys and values of the prompt up to the first image only once. Applies to frozen
            weights only; switch it off where an adapter is enabled and disabled between chunks.
        graphs (`bool`): CUDA graphs, on a GPU.
    """

    forced_tokens: bool = True
    small_head: bool = True
    tries: bool = True
    drafts: bool = True
    reuse_prefix: bool = True
    graphs: bool = True
    check: str = "fall_back"

    def __post_init__(self):
        if self.check not in CHECKS:
            raise ValueError(f"check={self.check!r} is none of {', '.join(CHECKS)}")


@dataclass
class DecodingStats:
    """Counts since it was made.

    Attributes:
        chunks (`int`): answers.
        passes (`int`): forward passes of the model, the prompts' included; one pass serves a whole batch.
        tokens (`int`): tokens of the answers.
        drafted, accepted (`int`): tokens of drafts that were read, and how many of them were right.
    """

    chunks: int = 0
    passes: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were right; NaN without drafts."""
        return self.accepted / self.drafted if self.drafted else float("nan")


class ChunkDecoder:
    """A `custom_generate` function for `generate()`, which also takes `drafts`; greedy, with any generation config.

    Args:
        grammar ([`ActionGrammar`]): of the answers.
        options ([`DecodingOptions`], *optional*): everything on by default.
        prefix (`Sequence[int]`, *optional*): ids that all prompts begin with, up to the first image: read only once.
        period (`int`, *optional*): numbers per step: steps without a draft are guessed to equal the one before.

    Attributes:
        stats ([`DecodingStats`]): may be replaced to start counting anew.
    """

    def __init__(
        self,
        grammar: ActionGrammar,
        options: DecodingOptions | None = None,
        prefix: Sequence[int] = (),
        period: int | None = None,
    ):
        self.grammar, self.options = grammar, options or DecodingOptions()
        self.prefix, self.period = list(prefix), period
        self.stats = DecodingStats()
        self._speller = Speller(grammar, self.options.forced_tokens)
        self._forward: TreeForward | None = None
        self._weights: list[tuple[int, int]] = []
        self._prefix: torch.Tensor | None = None

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        *,
        logits_processor=None,
        stopping_criteria=None,
        generation_config=None,
        drafts: list[list[int] | None] | None = None,
        beginnings: list[list[int]] | None = None,
        **inputs,
    ) -> torch.Tensor:
        """(B, P) prompts, padded on the left -> (B, P + A) with the answers, padded on the right.

        Args:
            drafts: one guess per row, as token ids from the prefix through the end of the turn.
            beginnings: token ids that each row's answer begins with, whatever the model thinks of them.
            inputs: as `generate` prepares them: `attention_mask` (B, P), None without padding; `position_ids`
                (…, B, P); other inputs of the prompt's pass, such as `pixel_values`.

        Raises:
            PromptError: prompt and answer are longer than the model's positions, or drafts don't match the batch.
        """
        prompts, length = input_ids.shape
        if drafts is not None and len(drafts) != prompts:
            raise PromptError(f"{len(drafts)} drafts for {prompts} prompts")
        limit = model.config.get_text_config().max_position_embeddings
        if length + self.grammar.max_new_tokens > limit:
            raise PromptError(
                f"a prompt of {length} tokens and an answer of up to {self.grammar.max_new_tokens} don't fit into the "
                f"model's {limit} positions: use fewer or smaller images, or shorter chunks"
            )
        if drafts is None or not self.options.drafts:
            drafts = [None] * prompts
        rows = [DraftState(self._speller, draft, self.period if self.options.drafts else None) for draft in drafts]
        for row, tokens in zip(rows, beginnings or [], strict=False):
            row.begin_with(tokens)
        pad = int(generation_config.pad_token_id)
        # Not parameters: `generate` would hand over the caller's own beside those that it has prepared.
        mask, position_ids = inputs.pop("attention_mask"), inputs.pop("position_ids")
        prompt_mask = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
        with torch.inference_mode():  # less bookkeeping for each small operation than no_grad
            forward = self._ready(model, prompts, length)
            self._read_prompt(forward, rows, input_ids, prompt_mask, position_ids, pad, inputs)
            while not all(row.done for row in rows):
                self._step(forward, rows, first_slot=length)

        self.stats.chunks += prompts
        self.stats.tokens += sum(len(row.tokens) for row in rows)
        self.stats.accepted += sum(row.accepted for row in rows)
        longest = max(len(row.tokens) for row in rows)
        answers = [row.tokens + [pad] * (longest - len(row.tokens)) for row in rows]
        return torch.cat([input_ids, torch.tensor(answers, device=input_ids.device)], 1)

    def release(self) -> None:
        """Give back the memory of the cache and of captured passes."""
        self._forward = self._prefix = None

    def _ready(self, model: PreTrainedModel, rows: int, length: int) -> TreeForward:
        """A forward with a large enough cache: the last one, with its CUDA graphs, if it fits."""
        weights = [(weight.data_ptr(), weight._version) for weight in model.parameters()]
        if weights != self._weights:
            self._weights, self._forward, self._prefix = weights, None, None
        needed = length + self.grammar.max_new_tokens + CANDIDATE_SLOTS + 1
        if self._forward is None or self._forward.rows != rows or self._forward.capacity < needed:
            self._forward = TreeForward(
                model,
                torch.as_tensor(self.grammar.token_ids, device=model.device),
                rows,
                -(-needed // CAPACITY_STEP) * CAPACITY_STEP,
                self.options.small_head,
                self.options.graphs,
            )
        return self._forward

    def _read_prompt(self, forward, rows, input_ids, prompt_mask, position_ids, pad, inputs) -> None:
        """One pass over the prompts, and the forced and drafted tokens at the beginning of the answers."""
        trees = [row.grow(0, self._guess(forward, row, len(rows)), []) for row in rows]
        known = [[token.token_id for token in tree.tokens] for tree in trees]
        width = max(map(len, known))
        ids = torch.tensor([tokens + [pad] * (width - len(tokens)) for tokens in known], dtype=torch.int64)
        images = _image_inputs(forward.model, inputs, input_ids.shape)
        skip = self._insert_prefix(forward, input_ids, prompt_mask, position_ids)
        if skip:
            # The prefix is in the first slots. A row's padding, and its own copy of the prefix, stay hidden.
            prompt_mask = torch.cat([torch.ones_like(prompt_mask[:, :skip]), prompt_mask[:, :-skip]], 1)
        logits = forward.prompt(
            torch.cat([input_ids, ids.to(input_ids.device)], 1), prompt_mask, position_ids, skip, width + 1, **images
        )
        # A tree begins with an answer's first certain token, the logits with the prompt's last, which is index −1.
        for row, tree, row_logits in zip(rows, trees, np.roll(logits, -1, axis=1), strict=True):
            row.follow(tree, row_logits)
        self._count(trees)

    def _step(self, forward: TreeForward, rows: list[DraftState], first_slot: int) -> None:
        """One pass for all rows that are not done."""
        active = [(index, row) for index, row in enumerate(rows) if not row.done]
        trees = []
        for _, row in active:
            guess = self._guess(forward, row, len(active))
            most = min(CANDIDATE_SLOTS, MAX_CANDIDATES.get(forward.device.type, 0) // len(active))
            few = len(self.grammar.choices(row.count, row.state)) <= most  # too many where one token spells a number
            candidates = row.candidates() if self.options.tries and few and not guess else []
            trees.append(row.grow(first_slot, guess, candidates if sum(map(len, candidates)) <= most else []))
        tokens = forward.padding(max(len(tree.tokens) for tree in trees))
        for (index, _), tree in zip(active, trees, strict=True):
            tokens[index, : len(tree.tokens)] = tree.tokens
        logits = forward.step(tokens)
        for (index, row), tree in zip(active, trees, strict=True):
            row.follow(tree, logits[index])
        self._count(trees)

    def _guess(self, forward: TreeForward, row: DraftState, rows: int) -> list[int]:
        limit = MAX_DRAFTED.get(forward.device.type, 0) // rows
        return row.guess(limit) if limit >= FEWEST_DRAFTED else []

    def _insert_prefix(
        self, forward: TreeForward, input_ids: torch.Tensor, prompt_mask: torch.Tensor, positions: torch.Tensor
    ) -> int:
        """Put the prefix's keys and values into the cache; the number of columns that need no pass, 0 if not done."""
        width = len(self.prefix)
        if not self.options.reuse_prefix or width < SHORTEST_PREFIX:
            return 0
        if any(weight.requires_grad for weight in forward.model.parameters()):
            return 0  # they may change at any time, and some optimizers don't tell torch that they do
        columns = (~prompt_mask).sum(1, keepdim=True) + torch.arange(width, device=prompt_mask.device)
        wanted = torch.tensor(self.prefix, device=prompt_mask.device)
        if int(columns.max()) >= prompt_mask.shape[1] or not bool((input_ids.gather(1, columns) == wanted).all()):
            return 0
        if self._prefix is None:
            self._prefix = forward.read_separately(wanted[None], positions[..., :1, :][..., columns[0]])
        forward.insert(self._prefix)
        return width

    def _count(self, trees: list[Tree]) -> None:
        self.stats.passes += 1
        self.stats.drafted += sum(tree.guesses for tree in trees)


def _image_inputs(model: PreTrainedModel, inputs: dict[str, Any], shape: torch.Size) -> dict[str, Any]:
    """The inputs that `generate` prepared, the model's signature names, and we do not make ourselves.

    These are pixels or image features. Left out: a cache, under any name, which is for `generate`'s own loop; and
    inputs with one entry per token, such as token types, which are in the position ids already.
    """
    known = inspect.signature(type(model.base_model).forward).parameters.keys() - OUR_INPUTS
    return {
        name: value
        for name, value in inputs.items()
        if name in known and not isinstance(value, Cache) and not (torch.is_tensor(value) and value.shape == shape)
    }
