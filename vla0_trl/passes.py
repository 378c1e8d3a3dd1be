"""Forward passes of a stock language model over tokens that are no plain continuation: several at different places.

A pass says of each token which position it has, which slot of the cache its keys and values go to, and which slots it
may look at. So rows stand at different places, and one row tries several continuations at once (as in SpecInfer's tree
attention, Miao et al. 2024). All that is given to the model is what every transformers decoder takes: a 4-D mask,
position ids and a `Cache`.

Slots: `scratch` ones for tries, one to throw away what pads a batch, then prompt and answer, in order.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import nn
from transformers import Cache, PreTrainedModel

logger = logging.getLogger(__name__)

# What a pass must know of a token: its id, its place after the prompt, the slot that it is written to, the last slot
# that it sees, and, as bits, the scratch slots that it sees.
FIELDS = 5
MAX_SCRATCH = 62
# Captured passes are as wide as the next of these: a graph has fixed shapes.
GRAPH_WIDTHS = (2, 4, 8, 16, 32, 64, 128)


class SlotCache(Cache):
    """Keys and values of a fixed number of slots; each pass sets `slots` and how many are `used`."""

    def __init__(self, num_layers: int, rows: int, capacity: int, device: torch.device):
        super().__init__(layers=[])
        self.shape = (num_layers, rows, capacity)
        self.row_index = torch.arange(rows, device=device)[:, None]
        self.slots: torch.Tensor | None = None
        self.used = capacity
        self.store: torch.Tensor | None = (
            None  # (2, layers, B, slots, heads, width): made once the model shows the last
        )

    def update(self, key_states, value_states, layer_idx, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (B, heads, Q, width) to `slots` (B, Q); give all used slots, (B, heads, used, width)."""
        if self.store is None:
            self.allocate(key_states)
        stores = []
        for store, states in zip(self.store[:, layer_idx], (key_states, value_states), strict=True):
            if len(store) == 1:
                store.index_copy_(2, self.slots[0], states)
            else:
                store[self.row_index, :, self.slots] = states.transpose(1, 2)
            stores.append(store[:, :, : self.used])
        return stores[0], stores[1]

    def allocate(self, like: torch.Tensor) -> None:
        """Make the store for keys like these, (B, heads, Q, width)."""
        layers, rows, capacity = self.shape
        # Zeros, not empty: a slot that is masked still takes part in 0 · x.
        self.store = like.new_zeros((2, layers, rows, like.shape[-3], capacity, like.shape[-1]))

    def get_seq_length(self, *args) -> int:
        """Positions come from outside: the model must not count for itself."""
        return 0

    def move(self, row: int, sources: list[int], targets: list[int]) -> None:
        """Copy slots within a row, in all layers at once."""
        self.store[:, :, row, :, targets] = self.store[:, :, row, :, sources]


class Passes:
    """A model with a cache, for one batch of prompts; on a GPU also its captured graphs, for all that fit.

    Args:
        model: the whole model, for its decoder, head and image encoder.
        token_ids: the only tokens whose logits are wanted, (columns,).
        rows, capacity: size of the cache.
        scratch: slots for tries.
        small_head: multiply with the rows of the LM head that are wanted, not with all and then select.
        graphs: capture passes as CUDA graphs; ignored elsewhere, where shapes change with every pass.
        compile: compile the decoder as well (a minute, once a width); needs graphs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        token_ids: torch.Tensor,
        rows: int,
        capacity: int,
        scratch: int,
        small_head: bool = True,
        graphs: bool = True,
        compile: bool = False,
    ):
        self.model, self.device = model, model.device
        graphs = graphs and self.device.type == "cuda"
        self.decoder = model.get_decoder()
        self._step = torch.compile(self.decoder, dynamic=False) if compile and graphs else self.decoder
        self.cache = SlotCache(self.decoder.config.num_hidden_layers, rows, capacity, self.device)
        self.scratch, self.first = scratch, scratch + 1
        self.rows, self.capacity = rows, capacity
        self.dtype = model.get_input_embeddings().weight.dtype
        self._keys = torch.arange(capacity, device=self.device)
        self._bits = torch.arange(scratch, device=self.device)
        self._hidden_mask = torch.full((), torch.finfo(self.dtype).min, dtype=self.dtype, device=self.device)
        self._seen_mask = torch.zeros((), dtype=self.dtype, device=self.device)
        self._open = torch.zeros(rows, capacity, dtype=torch.bool, device=self.device)
        self._base: torch.Tensor | None = None
        self.token_ids = token_ids
        # A head that is wrapped (LoRA) or packed (quantised) is no plain matrix: it is asked for all its logits.
        head = model.get_output_embeddings()
        self._small_head = small_head and type(head) is nn.Linear
        self._weight, self._bias = self._head_rows()
        self._use_graphs = graphs
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = {}

    def prompt(
        self, ids: torch.Tensor, kept: torch.Tensor, positions: torch.Tensor, skip: int, last: int, **images
    ) -> np.ndarray:
        """Read the prompts, and what is already known of the answers.

        Args:
            ids: (B, P + A): prompts padded on the left, then answers padded on the right.
            kept: bool (B, P), False on padding.
            positions: (…, B, P), as `generate` prepares them.
            skip: columns whose keys and values are in the cache already.
            last: how many columns, from the right, to give logits for.

        Returns:
            float32 (B, last, columns).
        """
        length = kept.shape[1]
        for kept_rows, now in zip((self._weight, self._bias), self._head_rows(), strict=True):
            if kept_rows is not None:
                kept_rows.copy_(now)  # the model may have been trained since
        self._open.fill_(False)
        self._open[:, self.first + length :] = True
        self._open[:, self.first : self.first + length] = kept
        base = positions[..., -1:] + 1
        if self._base is None:
            self._base = base.clone()
        self._base.copy_(base)
        after = base + torch.arange(ids.shape[1] - length, device=self.device)
        slots = torch.arange(self.first + skip, self.first + ids.shape[1], device=self.device).expand(self.rows, -1)
        self._aim(slots, self.first + ids.shape[1])
        mask = self._mask(slots, None)
        output = self.model.base_model(
            input_ids=ids[:, skip:],
            position_ids=torch.cat([positions, after], -1)[..., skip:],
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            **images,
        )
        return self._to_host(self._logits(output.last_hidden_state[:, -last:]))

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """One pass: int64 (B, Q, FIELDS) -> logits float32 (B, Q, columns)."""
        if self._use_graphs:
            width = next((width for width in GRAPH_WIDTHS if width >= tokens.shape[1]), None)
            if width is not None and (width in self._graphs or self._capture(width)):
                graph, inputs, logits = self._graphs[width]
                padded = np.zeros((self.rows, width, FIELDS), np.int64)
                padded[..., 2], padded[..., 3] = self.scratch, -1
                padded[:, : tokens.shape[1]] = tokens
                inputs.copy_(torch.from_numpy(padded))
                graph.replay()
                return self._to_host(logits)[:, : tokens.shape[1]]
            self._aim(None, self.capacity)
        else:
            self._aim(None, int(tokens[..., 3].max()) + 1)
        return self._to_host(self._forward(torch.from_numpy(tokens).to(self.device)))

    def read_apart(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Keys and values of plain text ids (1, L) at positions (…, 1, L): (2, layers, 1, heads, L, width)."""
        cache = SlotCache(self.cache.shape[0], 1, ids.shape[1], self.device)
        cache.slots = self._keys[None, : ids.shape[1]]
        causal = torch.where(cache.slots[..., None] >= cache.slots, self._seen_mask, self._hidden_mask)[:, None]
        self.decoder(
            input_ids=ids, position_ids=positions, attention_mask=causal, past_key_values=cache, use_cache=True
        )
        return cache.store

    def insert(self, states: torch.Tensor) -> None:
        """Put what `read_apart` gave to the beginning of all prompts."""
        if self.cache.store is None:
            self.cache.allocate(states)
        self.cache.store[..., self.first : self.first + states.shape[-2], :] = states

    def _forward(self, tokens: torch.Tensor) -> torch.Tensor:
        ids, places, slots, limits, bits = tokens.unbind(-1)
        self.cache.slots = slots
        output = self._step(
            input_ids=ids,
            position_ids=self._base + places,
            attention_mask=self._mask(limits, bits),
            past_key_values=self.cache,
            use_cache=True,
        )
        return self._logits(output.last_hidden_state)

    def _aim(self, slots: torch.Tensor | None, used: int) -> None:
        self.cache.slots, self.cache.used = slots, used

    def _mask(self, limits: torch.Tensor, bits: torch.Tensor | None) -> torch.Tensor:
        """(B, Q) last visible slots and bits of visible scratch slots -> additive mask (B, 1, Q, slots)."""
        used = self.cache.used
        seen = (self._keys[:used] <= limits[..., None]) & self._open[:, None, :used]
        if bits is not None and self.scratch:
            seen[..., : self.scratch] = (bits[..., None] >> self._bits) & 1
        # Additive, which eager attention needs; and finite, so that a padding query has no NaN.
        return torch.where(seen, self._seen_mask, self._hidden_mask)[:, None]

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._small_head:
            return nn.functional.linear(hidden, self._weight, self._bias).float()
        return self.model.get_output_embeddings()(hidden)[..., self.token_ids].float()

    def _head_rows(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not self._small_head:
            return torch.empty(0), None
        head = self.model.get_output_embeddings()
        return head.weight[self.token_ids], None if head.bias is None else head.bias[self.token_ids]

    @staticmethod
    def _to_host(logits: torch.Tensor) -> np.ndarray:
        return logits.cpu().numpy()

    def _capture(self, width: int) -> bool:
        """Record a pass of this width; False, from then on and said once, if the GPU has no room for it."""
        inputs = torch.zeros(self.rows, width, FIELDS, dtype=torch.int64, device=self.device)
        inputs[..., 2], inputs[..., 3] = self.scratch, -1
        self._aim(None, self.capacity)
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):  # lazy initialisation and compilation must not be recorded
                    self._forward(inputs)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self._forward(inputs)
        except RuntimeError as error:  # out of memory is one
            logger.warning("CUDA graphs are off, passes are launched one by one: %s", str(error).splitlines()[0])
            self._use_graphs = False
            self._graphs.clear()
            return False
        self._graphs[width] = (graph, inputs, logits)
        return True
