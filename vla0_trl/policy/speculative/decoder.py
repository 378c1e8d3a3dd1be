"""Decoding of action chunks under `generate()`: the tokens of greedy decoding under the grammar, in fewer passes.

Answers have a known form. Five methods use it, none of them changes a token, and each can be switched off:

- *forced tokens*: a token without an alternative needs no pass (a space after a number of full width);
- *small head*: logits only for the dozen tokens that the grammar ever allows, not for 49k to 152k;
- *candidates*: all tokens that may come next, mostly ten digits, and those that they force, are read in the pass that
  chooses among them, so it also gives the logits after the chosen one: two tokens per pass over the weights;
- *drafts*: a guess of the whole answer is read in one pass, with the prompt, and its correct first part becomes the
  answer's. A row that left its draft rejoins it at the next number. Without a draft, a step is guessed to equal the
  step before it. (Speculative decoding, Leviathan et al. 2023; from the text itself: prompt lookup, Saxena 2023.)
- *own drafts*: the draft is the model's own answer with all numbers hidden from each other, see [`parallel`].

With `mode="parallel"` that answer is not verified: other tokens, in the fewest passes.

Exact means: each token is the argmax over what the grammar allows, of logits that are mathematically those of stock
greedy decoding. In floating point a pass over several tokens rounds differently from a pass over one, as a batch
rounds differently from a single row: where two logits agree to the last bits (in bfloat16, to a few %), the other
may win.
"""

import inspect
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import Cache, PreTrainedModel

from vla0_trl.internals import PARALLEL
from vla0_trl.policy.grammar import ActionGrammar
from vla0_trl.policy.speculative.draft_state import DraftState, Speller
from vla0_trl.policy.speculative.options import DecodingOptions, DecodingStats, DraftChoice, PromptError, check_length
from vla0_trl.policy.speculative.parallel import ParallelReader, Reading
from vla0_trl.policy.speculative.tree_forward import TreeForward

# Tokens of candidates in a pass, summed over its rows, up to which they cost less than the passes that they save. CPUs
# become compute-bound early (on one core, 12 tokens cost SmolVLM2-500M as much as 1.7 passes over one token); a GPU's
# passes are limited by reading the weights up to hundreds of tokens.
MAX_CANDIDATES = {"cpu": 12, "cuda": 512}
CANDIDATE_SLOTS = 64  # room for candidates in the cache of each row
# The same limit for tokens of drafts; fewer than `FEWEST_DRAFTED` per row are not worth a wider pass.
MAX_DRAFTED = {"cpu": 64, "cuda": 1024}
FEWEST_DRAFTED = 8
# Tokens of a pass, over all rows, that cost as much as reading the weights: for choosing between drafts.
TOKENS_PER_PASS = {"cpu": 16, "cuda": 512}
# A prompt prefix shorter than this is read again for each prompt: that costs next to nothing.
SHORTEST_PREFIX = 8
# The cache's size is a multiple of this, so that most prompts fit the cache, and the CUDA graphs, of the last one.
CAPACITY_STEP = 128
# Inputs of a model that [`TreeForward`] makes itself, beside the cache.
OUR_INPUTS = {"input_ids", "attention_mask", "position_ids", "use_cache"}


class ChunkDecoder:
    """A `custom_generate` function for `generate()`, which also takes `drafts`; with any generation config.

    Args:
        grammar ([`ActionGrammar`]): of the answers.
        options ([`DecodingOptions`], *optional*): everything on by default.
        prefix (`Sequence[int]`, *optional*): ids that all prompts begin with, up to the first image: read only once.
        period (`int`, *optional*): numbers per step: steps without a draft are guessed to equal the one before.
        reader ([`ParallelReader`], *optional*): for parallel decoding and own drafts.

    Attributes:
        stats ([`DecodingStats`]): may be replaced to start counting anew.
        kept_batch_sizes (`int`): batch sizes whose caches and CUDA graphs are kept: one, unless batches of several
            sizes alternate, as they do in a server.
        reading ([`Reading`] or `None`): the last parallel reading.
        scores (`list`): of the last exact answers, for each token that was chosen: row, place, float32 (columns).

    `ValueError`: parallel decoding without a reader, or with more rounds than numbers.
    """

    def __init__(
        self,
        grammar: ActionGrammar,
        options: DecodingOptions | None = None,
        prefix: Sequence[int] = (),
        period: int | None = None,
        reader: ParallelReader | None = None,
    ):
        self.grammar, self.options = grammar, options or DecodingOptions()
        self.prefix, self.period, self.reader = list(prefix), period, reader
        if self.options.mode == PARALLEL and reader is None:
            raise ValueError("parallel decoding needs a ParallelReader")
        self.options.check_rounds(grammar.num_values)
        self.stats = DecodingStats()
        self.reading: Reading | None = None
        self.scores: list[tuple[int, int, np.ndarray]] = []
        # One for answers with an available draft, one for those without.
        self._choices = {True: DraftChoice(), False: DraftChoice()}
        self._speller = Speller(grammar, self.options.forced_tokens)
        self.kept_batch_sizes = 1
        self._kept: OrderedDict[int, TreeForward] = OrderedDict()
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
        noise: np.ndarray | None = None,
        **inputs,
    ) -> torch.Tensor:
        """(B, P) prompts, padded on the left -> (B, P + A) with the answers, padded on the right.

        Args:
            drafts: one guess per row, as token ids from the prefix through the end of the turn.
            beginnings: token ids that each row's answer begins with, whatever the model thinks of them.
            noise: float32 (B, most tokens of an answer, columns), added to the logits that exact decoding chooses by.
            inputs: as `generate` prepares them: `attention_mask` (B, P), None without padding; `position_ids`
                (…, B, P); other inputs of the prompt's pass, such as `pixel_values`.

        `PromptError`: prompt and answer are longer than the model's positions, or drafts don't match the batch.
        """
        prompts, length = input_ids.shape
        if drafts is not None and len(drafts) != prompts:
            raise PromptError(f"{len(drafts)} drafts for {prompts} prompts")
        check_length(length, self.grammar.max_new_tokens, model.config.get_text_config().max_position_embeddings)
        if drafts is None or not self.options.drafts:
            drafts = [None] * prompts
        pad = int(generation_config.pad_token_id)
        # Not parameters: `generate` would hand over the caller's own beside those that it has prepared.
        mask, position_ids = inputs.pop("attention_mask"), inputs.pop("position_ids")
        prompt_mask = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
        with torch.inference_mode():  # less bookkeeping for each small operation than no_grad
            forward = self._ready(model, prompts, length)
            passes, tokens = forward.passes, forward.tokens
            read_prompt = partial(self._read_prompt, forward, input_ids, prompt_mask, position_ids, pad, inputs)
            if self.options.mode == PARALLEL:
                given = list(map(self.reader.parse, beginnings or [[]] * prompts))
                self.reading = self.reader.read(forward, length, read_prompt, given, self.options.refine)
                answers = list(map(self.reader.answer, self.reading.numbers))
            else:
                own = not beginnings and self._own_drafts(forward, prompts, drafts)
                answers = self._exact(forward, length, read_prompt, drafts, beginnings, own, noise)
            passes, tokens = forward.passes - passes, forward.tokens - tokens
        if self.options.mode != PARALLEL:
            choice = self._choices[any(draft is not None for draft in drafts)]
            choice.record(own, passes + tokens / TOKENS_PER_PASS.get(forward.device.type, 1))
        self.stats.chunks += prompts
        self.stats.passes += passes
        longest = max(map(len, answers))
        padded = [answer + [pad] * (longest - len(answer)) for answer in answers]
        return torch.cat([input_ids, torch.tensor(padded, device=input_ids.device)], 1)

    def release(self) -> None:
        """Give back the memory of the cache and of captured passes."""
        self._forward = self._prefix = None
        self._kept.clear()

    def _ready(self, model: PreTrainedModel, rows: int, length: int) -> TreeForward:
        """A forward with a large enough cache: the last one of as many rows, with its CUDA graphs, if it fits."""
        weights = [(weight.data_ptr(), weight._version) for weight in model.parameters()]
        if weights != self._weights:
            self.release()
            self._weights = weights
        longest = max(self.grammar.max_new_tokens, self.reader.num_slots if self.reader else 0)
        needed = length + longest + CANDIDATE_SLOTS + 1
        self._forward = self._kept.get(rows)
        if self._forward is None or self._forward.capacity < needed:
            self._forward = self._kept[rows] = TreeForward(
                model,
                torch.as_tensor(self.grammar.token_ids, device=model.device),
                rows,
                -(-needed // CAPACITY_STEP) * CAPACITY_STEP,
                self.options.small_head,
                self.options.graphs,
            )
        self._kept.move_to_end(rows)
        while len(self._kept) > self.kept_batch_sizes:
            self._kept.popitem(last=False)
        return self._forward

    def _own_drafts(self, forward: TreeForward, rows: int, drafts: list[list[int] | None]) -> bool:
        """Whether to draft by a parallel reading."""
        if self.reader is None or not (self.options.drafts and self.options.own_drafts):
            return False
        if MAX_DRAFTED.get(forward.device.type, 0) // rows < FEWEST_DRAFTED:
            return False
        return self._choices[any(draft is not None for draft in drafts)].own()

    def _exact(self, forward: TreeForward, first_slot, read_prompt, drafts, beginnings, own, noise) -> list[list[int]]:
        """The answers of greedy decoding, or those that the noise draws."""
        if own:
            self.reading = self.reader.read(forward, first_slot, read_prompt, [[]] * len(drafts))
            drafts = list(map(self.reader.answer, self.reading.numbers))
            self.stats.own_drafts += len(drafts)
        period = self.period if self.options.drafts else None
        noises = [None] * len(drafts) if noise is None else noise
        rows = [DraftState(self._speller, draft, period, n) for draft, n in zip(drafts, noises, strict=True)]
        for row, tokens in zip(rows, beginnings or [], strict=False):
            row.begin_with(tokens)
        # After a parallel reading the first token is chosen already, and its draft is still to be read.
        trees = [row.grow(0, [] if own else self._guess(forward, row, len(rows)), []) for row in rows]
        logits = self.reading.logits if own else read_prompt([[token.token_id for token in t.tokens] for t in trees])
        # Here and below: a tree begins with an answer's first certain token; the logits after the prompt are last.
        for row, tree, row_logits in zip(rows, trees, logits, strict=True):
            row.follow(tree, row_logits)
        while not all(row.done for row in rows):
            self._step(forward, rows, first_slot)
        self.stats.drafted += sum(row.drafted for row in rows)
        self.stats.accepted += sum(row.accepted for row in rows)
        self.scores = [(index, *score) for index, row in enumerate(rows) for score in row.scores]
        return [row.tokens for row in rows]

    def _read_prompt(
        self, forward: TreeForward, input_ids, prompt_mask, position_ids, pad: int, inputs, known: list[list[int]]
    ) -> np.ndarray:
        """One pass over the prompts and what is known, or guessed, of the answers.

        Returns float32 (B, longest + 1, columns): logits after each known token and, last, after the prompt.
        """
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
        return np.roll(logits, -1, axis=1)

    def _step(self, forward: TreeForward, rows: list[DraftState], first_slot: int) -> None:
        """One pass for all rows that are not done."""
        active = [(index, row) for index, row in enumerate(rows) if not row.done]
        trees = []
        for _, row in active:
            guess = self._guess(forward, row, len(active))
            most = min(CANDIDATE_SLOTS, MAX_CANDIDATES.get(forward.device.type, 0) // len(active))
            few = len(self.grammar.choices(row.count, row.state)) <= most  # too many where one token spells a number
            candidates = row.candidates() if self.options.candidates and few and not guess else []
            trees.append(row.grow(first_slot, guess, candidates if sum(map(len, candidates)) <= most else []))
        tokens = forward.padding(max(len(tree.tokens) for tree in trees))
        for (index, _), tree in zip(active, trees, strict=True):
            tokens[index, : len(tree.tokens)] = tree.tokens
        logits = forward.step(tokens)
        for (index, row), tree in zip(active, trees, strict=True):
            row.follow(tree, logits[index])

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
