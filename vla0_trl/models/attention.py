"""The forward pass in training: the model's own, made static and as fast as the device allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import trl.trainer.utils as trl_utils
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from vla0_trl.internals import FAST, STOCK, raised
from vla0_trl.models.loading import SMOLVLM

if TYPE_CHECKING:
    from peft import PeftModel

_ATTENTION = "vla0_training"
# By how much the losses of tokens may differ on average, in float32 and below. Measured: 0 and 0.001; 0.1 with the
# images of another row.
_ROUNDING, _ROUNDING_REDUCED = 1e-3, 2e-2
_BLOCK = 128  # queries; 64 to 256 are within a fifth of it, up to 1,400 tokens
blocks_on_cpu = True  # off where a CPU stands in for a GPU: these blocks keep attention weights, flash kernels don't


class TrainingForward:
    """The forward pass in training, made static: no shape depends on data, and the host asks the device for nothing.

    While gradients are on, attention goes without a mask: our training batches are padded on the right, where causal
    attention does not look, and images not at all. SmolVLM's image features go to their places by an index of known
    size, where transformers first looks for empty images. On CPUs, only the answers' positions are scored, as TRL does
    it on GPUs. All compute what transformers and TRL compute, which is checked on the first batch of a run
    ([`TrainingForward.difference`]).

    Args:
        model: changed in place; as it is where none of this applies (other attention than `sdpa`).
        compiled (`bool`): shapes must not depend on data on CPUs either, so all positions are scored.

    Attributes:
        way (`str`): `"fast"`, or `"stock"`.
        sdpa (`bool`): attention is transformers' `sdpa`, or ours in its place.
        checked (`bool`): there is nothing to compare, or it has been compared.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, compiled: bool = False):
        self.compiled = compiled
        if not isinstance(model, PreTrainedModel):  # an adapter that is trained further
            model = model.get_base_model()
        self.model = model
        self.sdpa = model.config._attn_implementation == "sdpa"
        self._images = model.config.model_type in SMOLVLM
        self._hook: RemovableHandle | None = None
        self.way, self.checked = STOCK, not (self.sdpa or self._images)
        if not self.checked:
            self.use_fast()

    def use_fast(self) -> None:
        """Compute it our way."""
        self.way = FAST
        if self.sdpa:
            self.model.set_attn_implementation(_ATTENTION)
        if self._images:
            self._hook = self.model.model.register_forward_pre_hook(_embed_images, with_kwargs=True)

    def use_stock(self) -> None:
        """Compute it as transformers does."""
        self.way = STOCK
        if self.sdpa:
            self.model.set_attn_implementation("sdpa")
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @contextmanager
    def scored(self) -> Iterator[None]:
        """A call of the model with TRL's fused head is in this block, which scores answers alone."""
        if self.way == STOCK or self.compiled:
            yield
            return
        theirs = trl_utils._use_triton  # by which TRL chooses to score the labels' positions alone
        trl_utils._use_triton = lambda device: device.type == "cpu" or theirs(device)
        try:
            yield
        finally:
            trl_utils._use_triton = theirs

    def difference(self, log_probs: Callable[[], torch.Tensor], autocast: bool = False) -> str | None:
        """What is wrong with ours; None if it gives each token the stock loss, within rounding, or if stock fails.

        Per token, because in an untrained model the mean hardly depends on what attention sees. Random numbers, as of
        LoRA's dropout, are the same in both, and in what comes next.

        Args:
            log_probs: a forward pass on the first batch; (B, L), 0 where there is no label.
            autocast: it computes in bfloat16 or float16, whatever the weights are.
        """
        self.checked = True
        device = self.model.device
        generators = [device] if device.type == "cuda" else []
        with torch.compiler.set_stance("force_eager"):  # compiling what runs once would take minutes
            self.use_stock()
            try:
                with torch.random.fork_rng(generators), torch.no_grad():
                    stock = log_probs().float()
            except Exception:  # whatever a library raises: the step itself will, too, and that one is shown
                # There is nothing to go back to: SmolVLM of transformers 5.17 can't place bfloat16 features under
                # autocast.
                return None
            finally:
                self.use_fast()
            try:
                with torch.random.fork_rng(generators):  # and with gradients, without which attention takes its mask
                    ours = log_probs().detach().float()
            except Exception as error:  # what a changed library does to our code can't be told in advance
                return raised(error)
        labels = (stock != 0).sum().clamp(min=1)
        apart, loss = ((ours - stock).abs().sum() / labels).item(), (-stock.sum() / labels).item()
        reduced = autocast or self.model.dtype != torch.float32
        if apart <= (_ROUNDING_REDUCED if reduced else _ROUNDING):
            return None
        return f"gave tokens a loss that is {apart:.3g} from the stock one on average, of {loss:.4g}"


def _without_mask(*args, **kwargs) -> torch.Tensor | None:
    plain = kwargs["mask_function"] in (causal_mask_function, bidirectional_mask_function)
    return None if plain and torch.is_grad_enabled() else sdpa_mask(*args, **kwargs)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """`sdpa`, or `_InBlocks` where that is the same and faster; (B, heads, L, D) each -> (B, L, heads, D)."""
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    faster = blocks_on_cpu and device == "cpu" and dtype == torch.bfloat16
    special = kwargs.get("dropout") or kwargs.get("position_bias") is not None or query.shape[2] != key.shape[2]
    if not faster or special or attention_mask is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    key, value = (repeat_kv(tensor, query.shape[1] // key.shape[1]) for tensor in (key, value))
    causal = kwargs.get("is_causal")
    out = _InBlocks.apply(
        *(tensor.flatten(0, 1) for tensor in (query, key, value)),
        scaling or query.shape[-1] ** -0.5,
        module.is_causal if causal is None else causal,
    )
    return out.unflatten(0, query.shape[:2]).transpose(1, 2).contiguous(), None


class _InBlocks(torch.autograd.Function):
    """Attention as matrix products, (B · heads, L, D) each, a block of queries at a time.

    torch's flash kernel hardly uses what CPUs have for bfloat16: matrix products with a softmax between them need a
    fifth to four fifths of its time, the less the shorter the text; from 1,000 tokens without causality they are
    even. Weights are written over scores, and their gradients over each other: fresh memory is what costs the most.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, causal: bool):
        out, weights = torch.empty_like(query), []
        future = torch.ones(_BLOCK, _BLOCK, dtype=torch.bool).triu(1)
        for part, rows in zip(query.split(_BLOCK, 1), out.split(_BLOCK, 1), strict=True):
            start, size = len(weights) * _BLOCK, part.shape[1]
            seen = start + size if causal else key.shape[1]
            scores = _product(part, key[:, :seen].mT, scaling)
            if causal:
                scores[..., start:].masked_fill_(future[:size, :size], -torch.inf)
            weights.append(torch.softmax(scores, -1, out=scores))
            rows.copy_(scores @ value[:, :seen])
        ctx.save_for_backward(query, key, value, *weights)
        ctx.scaling = scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor):
        query, key, value, *weights = ctx.saved_tensors
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        parts = (tensor.split(_BLOCK, 1) for tensor in (query, grad_out, grad_query))
        for weight, part, grad, rows in zip(weights, *parts, strict=True):
            seen = weight.shape[2]
            grad_value[:, :seen].baddbmm_(weight.mT, grad)
            scores = grad @ value[:, :seen].mT
            torch._softmax_backward_data(scores, weight, -1, weight.dtype, grad_input=scores)
            grad_key[:, :seen].baddbmm_(scores.mT, part, alpha=ctx.scaling)
            rows.copy_(_product(scores, key[:, :seen], ctx.scaling))
        return grad_query, grad_key, grad_value, None, None


def _product(left: torch.Tensor, right: torch.Tensor, factor: float) -> torch.Tensor:
    """`factor * left @ right`, rounded once."""
    return torch.baddbmm(left.new_empty(1), left, right, beta=0, alpha=factor)


AttentionInterface.register(_ATTENTION, _attention)
AttentionMaskInterface.register(_ATTENTION, _without_mask)


def _embed_images(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """`input_ids` (B, L) and `pixel_values` (B, C, 3, H, W) or (1, N, 3, H, W), all real images -> `inputs_embeds`."""
    if kwargs.get("pixel_values") is None:
        return args, kwargs
    ids, pixels = kwargs.pop("input_ids"), kwargs.pop("pixel_values").flatten(0, 1)
    embeds = model.get_input_embeddings()(ids)
    grid = [side // model.config.vision_config.patch_size for side in pixels.shape[-2:]]
    whole = torch.ones(len(pixels), *grid, dtype=torch.bool, device=pixels.device)
    seen = model.vision_model(pixels.to(model.dtype), patch_attention_mask=whole).last_hidden_state
    # Under autocast the connector gives bfloat16, and the embeddings are float32.
    features = model.connector(seen).flatten(0, 1).to(embeds.dtype)
    places = ids == model.config.image_token_id
    which = (places.flatten().cumsum(0) - 1).clamp(min=0)[:, None].expand(-1, embeds.shape[-1])
    kwargs["inputs_embeds"] = torch.where(places[..., None], features.gather(0, which).view_as(embeds), embeds)
    return args, kwargs
