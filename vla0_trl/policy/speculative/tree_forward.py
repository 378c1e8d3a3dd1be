"""Forward passes of a stock language model over trees of tokens: several candidates for the same position at once.

For each token, a pass states its position in the answer, the cache slot for its keys and values, and the cache slots
that it attends to. So the rows of a batch can be at different positions, and a row can read several candidates for its
next token in one pass (tree attention as in SpecInfer, Miao et al. 2024, one level deep). The model is given only what
every transformers decoder takes: a 4-D mask, position ids and a `Cache`.

Cache slots: the prompt and the answer in order, then room for candidates; the last slot takes a batch's padding.

Example: integers are 0 or 1, the prompt fills cache slots 0 to 3, and "1 " is certain but not read yet. The next token
is 0 or 1, and either forces a space. One pass reads all six tokens ("x": the token attends to this slot):

    token  position  cache_slot  visible_until  visible_from    slot 0 1 2 3 4 5 6 7 8 9
    "1"           0           4              4             4         x x x x x . . . . .
    " "           1           5              5             5         x x x x x x . . . .
    "0"           2           6              5             6         x x x x x x x . . .
    " "           3           7              5             6         x x x x x x x x . .
    "1"           2           8              5             8         x x x x x x . . x .
    " "           3           9              5             8         x x x x x x . . x x

The logits of the second token choose between 0 and 1. If they choose 1, the logits of the last token already choose
what comes next. The next pass reads the chosen "1 " again, into slots 6 and 7, where the following tokens expect it.
"""

import inspect
import logging
from functools import cache

import numpy as np
import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from vla0_trl.processing.branches import PassToken, visible

logger = logging.getLogger(__name__)

# Captured passes are as wide as the next of these: a graph has fixed shapes.
GRAPH_WIDTHS = (2, 4, 8, 16, 32, 64, 128, 256)


@cache
def cache_parameter(model_class: type[PreTrainedModel]) -> str:
    """The name under which a model's forward takes its cache: `cache` since transformers 5.24, before another."""
    parameters = inspect.signature(model_class.forward).parameters.values()
    for parameter in parameters:
        if "Cache" in str(parameter.annotation):
            return parameter.name
    raise TypeError(f"{model_class.__name__}.forward takes no Cache")


class SlotCache(Cache):
    """Keys and values in a fixed number of slots; each pass sets `cache_slots` (B, Q) and how many are `used`."""

    def __init__(self, num_layers: int, rows: int, capacity: int, device: torch.device):
        super().__init__(layers=[])
        self.shape = (num_layers, rows, capacity)
        self.row_index = torch.arange(rows, device=device)[:, None]
        self.cache_slots: torch.Tensor | None = None
        self.used = capacity
        # (2, layers, B, heads, slots, width), allocated with the first keys, which tell heads and width.
        self.store: torch.Tensor | None = None

    def update(self, key_states, value_states, layer_idx, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (B, heads, Q, width) to `cache_slots`; return all used slots, (B, heads, used, width)."""
        if self.store is None:
            self.allocate(key_states)
        for store, states in zip(self.store[:, layer_idx], (key_states, value_states), strict=True):
            store[self.row_index, :, self.cache_slots] = states.transpose(1, 2)
        keys, values = self.store[:, layer_idx, :, :, : self.used]
        return keys, values

    def allocate(self, like: torch.Tensor) -> None:
        """Allocate the store for keys shaped like these, (B, heads, Q, width)."""
        layers, rows, capacity = self.shape
        # Zeros, not empty: a slot that is masked still takes part in 0 · x.
        self.store = like.new_zeros((2, layers, rows, like.shape[-3], capacity, like.shape[-1]))

    def get_seq_length(self, *args) -> int:
        """0, so that the model does not compute positions itself: each pass states them."""
        return 0


class TreeForward:
    """Forward passes of a model with a cache for a batch of prompts; on a GPU also its captured graphs.

    Args:
        model: the whole model, for its decoder, head and image encoder.
        token_ids: the only tokens whose logits are computed, (columns,).
        rows, capacity: prompts in a batch, and cache slots for each.
        small_head: multiply with these tokens' rows of the LM head only, not with all rows and then select.
        graphs: capture passes as CUDA graphs; ignored on other devices, where shapes change with every pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        token_ids: torch.Tensor,
        rows: int,
        capacity: int,
        small_head: bool = True,
        graphs: bool = True,
    ):
        self.model, self.device, self.token_ids = model, model.device, token_ids
        self.decoder = model.get_decoder()
        self.cache = SlotCache(self.decoder.config.num_hidden_layers, rows, capacity, self.device)
        self.rows, self.capacity = rows, capacity
        self.passes = self.tokens = 0  # read so far; of tokens, those of answers, over all rows
        dtype = model.get_input_embeddings().weight.dtype
        self._hidden_value = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=self.device)
        self._visible_value = torch.zeros_like(self._hidden_value)
        self._all_slots = torch.arange(capacity, device=self.device)
        self._not_padding = torch.ones(rows, capacity, dtype=torch.bool, device=self.device)
        self._base: torch.Tensor | None = None
        # A head that is wrapped (LoRA) or packed (quantised) is not a plain matrix: all its logits are computed.
        self._small_head = small_head and type(model.get_output_embeddings()) is nn.Linear
        self._weight, self._bias = self._head_rows()
        self._use_graphs = graphs and self.device.type == "cuda"
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = {}

    def prompt(
        self, ids: torch.Tensor, prompt_mask: torch.Tensor, positions: torch.Tensor, skip: int, last: int, **images
    ) -> np.ndarray:
        """Read the prompts, and the tokens of the answers that are known or guessed already.

        Args:
            ids: (B, P + A): prompts padded on the left, then answers padded on the right.
            prompt_mask: bool (B, P), False on padding.
            positions: (…, B, P), as `generate` prepares them.
            skip: the number of first columns whose keys and values are in the cache already.
            last: the number of last columns to compute logits for.

        Returns float32 (B, last, columns).
        """
        length, width = prompt_mask.shape[1], ids.shape[1]
        self._count(width - length)
        for copied, current in zip((self._weight, self._bias), self._head_rows(), strict=True):
            if copied is not None:
                copied.copy_(current)  # the model may have been trained since
        self._not_padding.fill_(True)
        self._not_padding[:, :length] = prompt_mask
        base = positions[..., -1:] + 1
        if self._base is None:
            self._base = base.clone()
        self._base.copy_(base)
        after = base + torch.arange(width - length, device=self.device)
        cache_slots = self._all_slots[skip:width].expand(self.rows, -1)
        hidden = self._read(
            self.model.base_model,
            ids[:, skip:],
            torch.cat([positions, after], -1)[..., skip:],
            cache_slots,
            visible_until=cache_slots,
            visible_from=cache_slots,
            used=width,
            **images,
        )
        return self._logits(hidden[:, -last:]).cpu().numpy()

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """One pass over Q [`PassToken`]s per row: int64 (B, Q, 5) -> logits float32 (B, Q, columns)."""
        self._count(tokens.shape[1])
        width = next((width for width in GRAPH_WIDTHS if width >= tokens.shape[1]), None)
        if self._use_graphs and width is not None and (width in self._graphs or self._capture(width)):
            graph, inputs, logits = self._graphs[width]
            inputs.copy_(torch.from_numpy(self.padding(width)))
            inputs[:, : tokens.shape[1]] = torch.from_numpy(tokens).to(self.device)
            graph.replay()
            return logits[:, : tokens.shape[1]].cpu().numpy()
        token = PassToken(*np.moveaxis(tokens, -1, 0))
        used = self.capacity if self._use_graphs else int(token.cache_slot[token.visible_until >= 0].max()) + 1
        return self._step(torch.from_numpy(tokens).to(self.device), used).cpu().numpy()

    def _count(self, width: int) -> None:
        self.passes += 1
        self.tokens += self.rows * width

    def padding(self, width: int) -> np.ndarray:
        """[`PassToken`]s, int64 (B, width, 5), that no other token attends to."""
        last_slot = self.capacity - 1
        token = PassToken(token_id=0, position=0, cache_slot=last_slot, visible_until=-1, visible_from=last_slot)
        return np.tile(np.array(token), (self.rows, width, 1))

    def read_separately(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Keys and values of plain text ids (1, L) at positions (…, 1, L): (2, layers, 1, heads, L, width)."""
        separate = TreeForward(self.model, self.token_ids, 1, ids.shape[1], graphs=False)
        cache_slots = separate._all_slots[None]
        separate._read(separate.decoder, ids, positions, cache_slots, cache_slots, cache_slots, used=ids.shape[1])
        return separate.cache.store

    def insert(self, states: torch.Tensor) -> None:
        """Copy keys and values from [`read_separately`] to the first slots of all rows."""
        if self.cache.store is None:
            self.cache.allocate(states)
        self.cache.store[..., : states.shape[-2], :] = states

    def _step(self, tokens: torch.Tensor, used: int) -> torch.Tensor:
        token = PassToken(*tokens.unbind(-1))
        positions, visible = self._base + token.position, (token.visible_until, token.visible_from)
        return self._logits(self._read(self.decoder, token.token_id, positions, token.cache_slot, *visible, used))

    def _read(
        self, module, ids, positions, cache_slots, visible_until, visible_from, used: int, **images
    ) -> torch.Tensor:
        """(B, Q) ids and the other fields of [`PassToken`] -> hidden states (B, Q, hidden)."""
        slots, not_padding = self._all_slots[:used], self._not_padding[:, :used]
        seen = visible(slots, cache_slots, visible_until, visible_from, not_padding)
        self.cache.cache_slots, self.cache.used = cache_slots, used
        return module(
            input_ids=ids,
            position_ids=positions,
            # Additive, which eager attention needs; and finite, so that a padding query has no NaN.
            attention_mask=torch.where(seen, self._visible_value, self._hidden_value)[:, None],
            use_cache=True,
            **{cache_parameter(type(module)): self.cache},
            **images,
        ).last_hidden_state

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._small_head:
            return nn.functional.linear(hidden, self._weight, self._bias).float()
        return self.model.get_output_embeddings()(hidden)[..., self.token_ids].float()

    def _head_rows(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if not self._small_head:
            return None, None
        head = self.model.get_output_embeddings()
        return head.weight[self.token_ids], None if head.bias is None else head.bias[self.token_ids]

    def _capture(self, width: int) -> bool:
        """Record a pass of this width. If the GPU has no memory for it, warn once, give up graphs and return False.

        As in PyTorch's notes on CUDA graphs: warm up on a side stream, capture, and replay on the same tensors.
        """
        inputs = torch.from_numpy(self.padding(width)).to(self.device)
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):  # lazy initialisation must not be recorded
                    self._step(inputs, self.capacity)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self._step(inputs, self.capacity)
        except RuntimeError as error:  # out of memory is one
            logger.warning("CUDA graphs are off, passes are launched one by one: %s", str(error).splitlines()[0])
            self._use_graphs = False
            self._graphs.clear()
            return False
        self._graphs[width] = (graph, inputs, logits)
        return True
