"""Decoding of action chunks under `generate()`: the tokens of greedy decoding under the grammar, in fewer passes.

Written text has a known form, and that is used, exactly, in four ways, each of which can be switched off:

- *forced tokens*: what the grammar leaves no choice in is not asked for (a space after a full-width number);
- *small head*: logits for the dozen tokens that the grammar can ever allow, not for 49k to 152k;
- *tries*: all possible next tokens, ten digits mostly, with what they force, are read in the pass that decides which
  of them it is, so that the pass also tells what comes after it: two tokens for one pass over the weights;
- *drafts*: a guess of the whole answer is read in one pass, with the prompt, and kept as far as it is right. A row
  that left its draft rejoins it at the next number. Without one, a step is guessed to be like the step before it.
  (Speculative decoding, Leviathan et al. 2023; from the text itself, as in prompt lookup, Saxena 2023.)

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
from vla0_trl.policy.speculative.draft_state import Row, Speller, Tree
from vla0_trl.policy.speculative.tree_forward import Passes

# Tries in a pass, all rows together, that cost less than the passes they save. A CPU is out of breath soon (on one
# core, 12 tokens cost SmolVLM2-500M as much as 1.7 passes over one); a GPU waits for weights until hundreds.
MAX_TRIES = {"cpu": 12, "cuda": 512}
TRY_SLOTS = 64  # what there is room for in a row's cache
# The same for tokens of drafts; fewer than so many a row are not worth a wider pass.
MAX_DRAFTED = {"cpu": 64, "cuda": 1024}
FEWEST_DRAFTED = 8
# A prompt prefix this short is read again: it costs nothing.
SHORTEST_PREFIX = 8
# The cache comes in these steps, so that a GPU's graphs fit prompts of any length.
CAPACITY_STEP = 128
# Inputs of a model that [`Passes`] makes itself, beside the cache.
OUR_INPUTS = {"input_ids", "attention_mask", "position_ids", "use_cache"}
CHECKS = ("fall_back", "raise", "skip")


class PromptError(ValueError):
    """The caller's mistake: what was asked for can't be decoded in any way."""


@dataclass
class DecodingOptions:
    """What [`ChunkDecoder`] makes use of. None of it changes a token.

    Args:
        check (`str`): a model's first chunk is compared with stock `generate()`, see [`self_check`]. If they differ,
            or if ours raises, then or later: `"fall_back"` warns and goes on with stock, `"raise"` insists on ours;
            `"skip"` compares nothing.
        forced_tokens, small_head, tries, drafts (`bool`): see the module.
        reuse_prefix (`bool`): keep keys and values of what precedes the first image. Only done for frozen weights;
            not to be used where an adapter is switched on and off between chunks.
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
        passes (`int`): of the model, the prompts' included; one pass serves a whole batch.
        tokens (`int`): written.
        drafted, accepted (`int`): tokens of drafts that were read, and those of them that were right.
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
    """To be given to `generate()` as `custom_generate`, with `drafts` beside it; greedy, whatever the config says.

    Args:
        grammar ([`ActionGrammar`]): of the answers.
        options ([`DecodingOptions`], *optional*): everything on by default.
        prefix (`Sequence[int]`, *optional*): ids with which prompts begin, up to the first image: read once for all.
        period (`int`, *optional*): numbers of a step: steps without a draft are guessed to be like the one before.

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
        self._passes: Passes | None = None
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
        **inputs,
    ) -> torch.Tensor:
        """(B, P) prompts, padded on the left -> (B, P + A) with the answers, padded on the right.

        Args:
            drafts: guesses, one a row, as token ids from the prefix through the end of the turn.
            inputs: as `generate` prepares them: `attention_mask` (B, P), None without padding; `position_ids`
                (…, B, P); what else the prompt's pass takes, such as `pixel_values`.

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
        rows = [Row(self._speller, draft, self.period if self.options.drafts else None) for draft in drafts]
        pad = int(generation_config.pad_token_id)
        # Not parameters: `generate` would hand over the caller's own beside those that it has prepared.
        mask, position_ids = inputs.pop("attention_mask"), inputs.pop("position_ids")
        kept = torch.ones_like(input_ids) if mask is None else mask
        with torch.inference_mode():  # less bookkeeping for each small operation than no_grad
            passes = self._ready(model, prompts, length)
            self._read_prompt(passes, rows, input_ids, kept.bool(), position_ids, pad, inputs)
            while not all(row.done for row in rows):
                self._step(passes, rows, length)

        self.stats.chunks += prompts
        self.stats.tokens += sum(len(row.tokens) for row in rows)
        self.stats.accepted += sum(row.accepted for row in rows)
        longest = max(len(row.tokens) for row in rows)
        answers = [row.tokens + [pad] * (longest - len(row.tokens)) for row in rows]
        return torch.cat([input_ids, torch.tensor(answers, device=input_ids.device)], 1)

    def release(self) -> None:
        """Give back the memory of the cache and of captured passes."""
        self._passes = self._prefix = None

    def _ready(self, model: PreTrainedModel, rows: int, length: int) -> Passes:
        """A cache for these prompts, the last one if it fits; with it, on a GPU, its graphs."""
        weights = [(weight.data_ptr(), weight._version) for weight in model.parameters()]
        if weights != self._weights:
            self._weights, self._passes, self._prefix = weights, None, None
        needed = length + self.grammar.max_new_tokens + TRY_SLOTS + 1
        if self._passes is None or self._passes.rows != rows or self._passes.capacity < needed:
            self._passes = Passes(
                model,
                torch.as_tensor(self.grammar.token_ids, device=model.device),
                rows,
                -(-needed // CAPACITY_STEP) * CAPACITY_STEP,
                self.options.small_head,
                self.options.graphs,
            )
        return self._passes

    def _read_prompt(self, passes, rows, input_ids, kept, position_ids, pad, inputs) -> None:
        """The prompt, what is forced at an answer's beginning, and the beginning of its draft, in one pass."""
        trees = [row.grow(0, self._guess(passes, row, len(rows)), []) for row in rows]
        known = [[token for token, *_ in tree.tokens] for tree in trees]
        width = max(map(len, known))
        ids = torch.tensor([tokens + [pad] * (width - len(tokens)) for tokens in known], dtype=torch.int64)
        images = _image_inputs(passes.model, inputs, input_ids.shape)
        skip = self._insert_prefix(passes, input_ids, kept, position_ids)
        if skip:
            # Left of a row's rest is padding or its own copy of the prefix, neither of which is to be seen.
            kept = torch.cat([torch.ones_like(kept[:, :skip]), kept[:, :-skip]], 1)
        logits = passes.prompt(
            torch.cat([input_ids, ids.to(input_ids.device)], 1), kept, position_ids, skip, width + 1, **images
        )
        # A tree begins with an answer's first certain token, the logits with the prompt's last, which is token −1.
        for row, tree, row_logits in zip(rows, trees, np.roll(logits, -1, axis=1), strict=True):
            row.follow(tree, row_logits)
        self._count(trees)

    def _step(self, passes: Passes, rows: list[Row], first: int) -> None:
        """One pass for all rows that are not done."""
        active = [(index, row) for index, row in enumerate(rows) if not row.done]
        trees = []
        for _, row in active:
            guess = self._guess(passes, row, len(active))
            most = min(TRY_SLOTS, MAX_TRIES.get(passes.device.type, 0) // len(active))
            few = len(self.grammar.choices(row.count, row.state)) <= most  # not with one token a number
            tries = row.tries() if self.options.tries and few and not guess else []
            trees.append(row.grow(first, guess, tries if sum(map(len, tries)) <= most else []))
        tokens = passes.padding(max(len(tree.tokens) for tree in trees))
        for (index, _), tree in zip(active, trees, strict=True):
            tokens[index, : len(tree.tokens)] = tree.tokens
        logits = passes.step(tokens)
        for (index, row), tree in zip(active, trees, strict=True):
            row.follow(tree, logits[index])
        self._count(trees)

    def _guess(self, passes: Passes, row: Row, rows: int) -> list[int]:
        limit = MAX_DRAFTED.get(passes.device.type, 0) // rows
        return row.guess(limit) if limit >= FEWEST_DRAFTED else []

    def _insert_prefix(
        self, passes: Passes, input_ids: torch.Tensor, kept: torch.Tensor, positions: torch.Tensor
    ) -> int:
        """Put the prefix's keys and values into the cache; how many columns that spares, 0 if it can't be done."""
        width = len(self.prefix)
        if not self.options.reuse_prefix or width < SHORTEST_PREFIX:
            return 0
        if any(weight.requires_grad for weight in passes.model.parameters()):
            return 0  # they may change at any time, and some optimizers don't tell torch that they do
        columns = (~kept).sum(1, keepdim=True) + torch.arange(width, device=kept.device)
        wanted = torch.tensor(self.prefix, device=kept.device)
        if int(columns.max()) >= kept.shape[1] or not bool((input_ids.gather(1, columns) == wanted).all()):
            return 0
        if self._prefix is None:
            self._prefix = passes.read_apart(wanted[None], positions[..., :1, :][..., columns[0]])
        passes.insert(self._prefix)
        return width

    def _count(self, trees: list[Tree]) -> None:
        self.stats.passes += 1
        self.stats.drafted += sum(tree.guesses for tree in trees)


def _image_inputs(model: PreTrainedModel, inputs: dict[str, Any], shape: torch.Size) -> dict[str, Any]:
    """Of what `generate` prepared, what the model's own signature asks for beside the inputs that we make ourselves.

    Pixels or image features, that is. A cache, under whichever name, is for `generate`'s own loop; inputs for each
    token of the prompts, such as token types, have done their part in the position ids.
    """
    known = inspect.signature(type(model.base_model).forward).parameters.keys() - OUR_INPUTS
    return {
        name: value
        for name, value in inputs.items()
        if name in known and not isinstance(value, Cache) and not (torch.is_tensor(value) and value.shape == shape)
    }
