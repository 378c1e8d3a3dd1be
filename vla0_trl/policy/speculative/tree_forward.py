"""Forward passes of a stock language model over tokens that are no plain continuation: several, at different places.

A pass says of each token its place in the answer, the slot of the cache that its keys and values go to, and the slots
that it sees. So rows of a batch stand at different places, and a row tries several next tokens at once (tree attention
as in SpecInfer, Miao et al. 2024, one level deep). All that is given to the model is what every transformers decoder
takes: a 4-D mask, position ids and a `Cache`.

Slots: prompt and answer in order, then room for tries; the last one takes what pads a batch.
"""

from __future__ import annotations

import inspect
import logging
from functools import cache

import numpy as np
import torch
from torch import nn
from transformers import Cache, PreTrainedModel

logger = logging.getLogger(__name__)

# What a pass must know of a token: its id, its place behind the prompt, the slot that it is written to, and what it
# sees: the slots up to one, and those from another to its own.
FIELDS = 5
# Captured passes are as wide as the next of these: a graph has fixed shapes.
GRAPH_WIDTHS = (2, 4, 8, 16, 32, 64, 128)


@cache
def cache_parameter(model_class: type[PreTrainedModel]) -> str:
    """The name under which a model's forward takes its cache: `cache` since transformers 5.24, before another."""
    parameters = inspect.signature(model_class.forward).parameters.values()
    for parameter in parameters:
        if "Cache" in str(parameter.annotation):
            return parameter.name
    raise TypeError(f"{model_class.__name__}.forward takes no Cache")


class SlotCache(Cache):
    """Keys and values of a fixed number of slots; each pass sets `slots` (B, Q) and how many are `used`."""

    def __init__(self, num_layers: int, rows: int, capacity: int, device: torch.device):
        super().__init__(layers=[])
        self.shape = (num_layers, rows, capacity)
        self.row_index = torch.arange(rows, device=device)[:, None]
        self.slots: torch.Tensor | None = None
        self.used = capacity
        # (2, layers, B, heads, slots, width), made when the model shows the last number.
        self.store: torch.Tensor | None = None

    def update(self, key_states, value_states, layer_idx, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (B, heads, Q, width) to `slots`; give all used slots, (B, heads, used, width)."""
        if self.store is None:
            self.allocate(key_states)
        for store, states in zip(self.store[:, layer_idx], (key_states, value_states), strict=True):
            store[self.row_index, :, self.slots] = states.transpose(1, 2)
        keys, values = self.store[:, layer_idx, :, :, : self.used]
        return keys, values

    def allocate(self, like: torch.Tensor) -> None:
        """Make the store for keys like these, (B, heads, Q, width)."""
        layers, rows, capacity = self.shape
        # Zeros, not empty: a slot that is masked still takes part in 0 · x.
        self.store = like.new_zeros((2, layers, rows, like.shape[-3], capacity, like.shape[-1]))

    def get_seq_length(self, *args) -> int:
        """Positions come from outside: the model must not count for itself."""
        return 0


class Passes:
    """A model with a cache for a batch of prompts; on a GPU also its captured graphs.

    Args:
        model: the whole model, for its decoder, head and image encoder.
        token_ids: the only tokens whose logits are wanted, (columns,).
        rows, capacity: size of the cache.
        small_head: multiply with the rows of the LM head that are wanted, not with all and then select.
        graphs: capture passes as CUDA graphs; ignored elsewhere, where shapes change with every pass.
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
        dtype = model.get_input_embeddings().weight.dtype
        self._hidden_mask = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=self.device)
        self._seen_mask = torch.zeros_like(self._hidden_mask)
        self._keys = torch.arange(capacity, device=self.device)
        self._open = torch.ones(rows, capacity, dtype=torch.bool, device=self.device)
        self._base: torch.Tensor | None = None
        # A head that is wrapped (LoRA) or packed (quantised) is no plain matrix: it is asked for all its logits.
        self._small_head = small_head and type(model.get_output_embeddings()) is nn.Linear
        self._weight, self._bias = self._head_rows()
        self._use_graphs = graphs and self.device.type == "cuda"
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
        length, width = kept.shape[1], ids.shape[1]
        for kept_rows, now in zip((self._weight, self._bias), self._head_rows(), strict=True):
            if kept_rows is not None:
                kept_rows.copy_(now)  # the model may have been trained since
        self._open.fill_(True)
        self._open[:, :length] = kept
        base = positions[..., -1:] + 1
        if self._base is None:
            self._base = base.clone()
        self._base.copy_(base)
        after = base + torch.arange(width - length, device=self.device)
        slots = self._keys[skip:width].expand(self.rows, -1)
        hidden = self._read(
            self.model.base_model,
            ids[:, skip:],
            torch.cat([positions, after], -1)[..., skip:],
            slots,
            slots,
            slots,
            used=width,
            **images,
        )
        return self._logits(hidden[:, -last:]).cpu().numpy()

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """One pass: int64 (B, Q, FIELDS) -> logits float32 (B, Q, columns)."""
        width = next((width for width in GRAPH_WIDTHS if width >= tokens.shape[1]), None)
        if self._use_graphs and width is not None and (width in self._graphs or self._capture(width)):
            graph, inputs, logits = self._graphs[width]
            inputs.copy_(torch.from_numpy(self.padding(width)))
            inputs[:, : tokens.shape[1]] = torch.from_numpy(tokens).to(self.device)
            graph.replay()
            return logits[:, : tokens.shape[1]].cpu().numpy()
        used = self.capacity if self._use_graphs else int(tokens[..., 3].max()) + 1 + tokens.shape[1]
        return self._step(torch.from_numpy(tokens).to(self.device), min(used, self.capacity)).cpu().numpy()

    def padding(self, width: int) -> np.ndarray:
        """Tokens (B, width, FIELDS) that nobody sees."""
        return np.tile(np.array([0, 0, self.capacity - 1, -1, self.capacity - 1]), (self.rows, width, 1))

    def read_apart(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Keys and values of plain text ids (1, L) at positions (…, 1, L): (2, layers, 1, heads, L, width)."""
        apart = Passes(self.model, self.token_ids, 1, ids.shape[1], graphs=False)
        slots = apart._keys[None]
        apart._read(apart.decoder, ids, positions, slots, slots, slots, used=ids.shape[1])
        return apart.cache.store

    def insert(self, states: torch.Tensor) -> None:
        """Put what `read_apart` gave to the beginning of all prompts."""
        if self.cache.store is None:
            self.cache.allocate(states)
        self.cache.store[..., : states.shape[-2], :] = states

    def _step(self, tokens: torch.Tensor, used: int) -> torch.Tensor:
        ids, places, *slots = tokens.unbind(-1)
        return self._logits(self._read(self.decoder, ids, self._base + places, *slots, used))

    def _read(self, module, ids, positions, slots, limits, begins, used: int, **images) -> torch.Tensor:
        """(B, Q) ids, written to `slots`, that see those up to `limits` and from `begins` -> (B, Q, hidden)."""
        keys, slots, limits, begins = self._keys[:used], slots[..., None], limits[..., None], begins[..., None]
        seen = (keys <= limits) & self._open[:, None, :used] | (begins <= keys) & (keys <= slots)
        self.cache.slots, self.cache.used = slots[..., 0], used
        return module(
            input_ids=ids,
            position_ids=positions,
            # Additive, which eager attention needs; and finite, so that a padding query has no NaN.
            attention_mask=torch.where(seen, self._seen_mask, self._hidden_mask)[:, None],
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
        """Record a pass of this width; False, from then on and said once, if the GPU has no room for it.

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
