"""The forward pass in training computes what transformers computes, without asking the device for values."""

import copy
from contextlib import nullcontext

import pytest
import torch
import trl.trainer.utils as trl_utils
from support.backbones import TINY
from support.general import ONE_MORE, HostSyncs
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vla0_trl.benchmarks.memory import _kernels_like_a_gpus
from vla0_trl.models import attention as forward
from vla0_trl.models.nano import NanoConfig, build_nano


@pytest.mark.parametrize("images", [(2, 2, 2), (2, 0, 1)])
def test_the_forward_pass_is_one_graph_without_syncs_and_equals_transformers(images):
    """On a batch with padding, of two images per row, or of different numbers; compiled, ours and transformers' give
    the same gradients."""
    theirs, _ = build_nano(NanoConfig(**TINY))
    ours = copy.deepcopy(theirs)
    forward.TrainingForward(ours)
    ids = torch.randint(5, 200, (3, 40), generator=torch.manual_seed(0))
    for row, count in zip(ids, images, strict=True):
        for place in (3, 9)[:count]:
            row[place : place + 4] = ours.config.image_token_id
    kept = (torch.arange(40) < torch.tensor([[40], [33], [28]])).long()
    inputs = {"input_ids": ids, "attention_mask": kept, "pixel_values": torch.randn(1, sum(images), 3, 48, 48)}
    if len(set(images)) == 1:
        inputs["pixel_values"] = inputs["pixel_values"].view(3, 2, 3, 48, 48)
    compiled = torch.compile(ours.model, backend="aot_eager", fullgraph=True)
    features, gradients, syncs = [], [], []
    for call, model in ((theirs.model, theirs), (ours.model, ours), (compiled, ours)):
        model.zero_grad()
        with HostSyncs() if call is not compiled else nullcontext(HostSyncs()) as counter:
            out = call(**inputs, use_cache=False).last_hidden_state[kept.bool()]
            (out**2).sum().backward()
        features.append(out.detach())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        syncs.append(counter.count)
    for other in (1, 2):
        torch.testing.assert_close(features[other], features[0])
        torch.testing.assert_close(gradients[other], gradients[0], rtol=1e-4, atol=1e-5)
    # One is the test's own: the choice of kept positions.
    assert syncs[0] > 4 and syncs[1] == 1 + ONE_MORE


@pytest.mark.parametrize("length", [60, 128, 300])
@pytest.mark.parametrize("causal", [True, False])
def test_bfloat16_attention_on_a_cpu_is_as_good_as_torchs(length, causal):
    """Outputs and gradients against float64's, with two query heads a key head, under autocast as in training."""
    generator = torch.manual_seed(0)
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = causal, 2
    exact = [torch.randn(2, heads, length, 32, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)]
    weights = torch.randn(2, length, 4, 32, generator=generator)

    def attend(attention, dtype, autocast):
        inputs = [tensor.to(dtype, copy=True).requires_grad_() for tensor in exact]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = attention(module, *inputs, attention_mask=None, scaling=0.2)[0]
        (out * weights).sum().backward()
        return [out.detach(), *(tensor.grad for tensor in inputs)]

    truth = attend(sdpa_attention_forward, torch.float64, False)
    theirs = attend(sdpa_attention_forward, torch.float32, True)
    ours = attend(forward._attention, torch.float32, True)
    compiled = attend(torch.compile(forward._attention, backend="aot_eager", fullgraph=True), torch.float32, True)
    torch.testing.assert_close(compiled, ours)
    assert ours[0].dtype == theirs[0].dtype == torch.bfloat16 and not torch.equal(ours[0], theirs[0])
    for mine, other, right in zip(ours, theirs, truth, strict=True):
        assert mine.shape == right.shape
        assert (mine - right).norm() < min(2 * (other - right).norm(), 0.01 * right.norm())


def test_other_attention_is_torchs_own(monkeypatch):
    """In float32, with a mask, a cache (more keys than queries) or dropout, and where a CPU stands in for a GPU."""
    module = torch.nn.Module()
    module.is_causal = True
    query, keys = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 9, 8)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    monkeypatch.setattr(forward, "sdpa_attention_forward", lambda *args, **kwargs: "torch")
    assert forward._attention(module, query, query, query, None) == "torch"
    query, keys = query.bfloat16(), keys.bfloat16()
    assert forward._attention(module, query, query, query, mask) == "torch"
    assert forward._attention(module, query, keys, keys, None) == "torch"
    assert forward._attention(module, query, query, query, None, dropout=0.1) == "torch"
    with _kernels_like_a_gpus():
        assert forward._attention(module, query, query, query, None) == "torch"
    assert forward._attention(module, query, query, query, None) != "torch"


def test_only_answers_are_scored_on_a_cpu(monkeypatch):
    model, _ = build_nano(NanoConfig(**TINY))
    trl_utils.add_fused_lm_head(model)
    ours, compiled, counts = forward.TrainingForward(model), forward.TrainingForward(model, compiled=True), []
    apply = trl_utils._ChunkedLogProbFunction.apply
    counting = staticmethod(lambda hidden, *rest: counts.append(len(hidden)) or apply(hidden, *rest))
    monkeypatch.setattr(trl_utils._ChunkedLogProbFunction, "apply", counting)
    labels = torch.randint(5, 200, (3, 20), generator=torch.manual_seed(0))
    inputs = {"input_ids": labels, "labels": labels.where(torch.arange(20) > 14, -100), "fused_lm_head": True}
    found = []
    for way in (ours, compiled, None):
        if way is None:
            ours.use_stock()
        with (way or ours).scored():
            found.append(model(**inputs).log_probs)
    assert counts == [3 * 5, 3 * 19, 3 * 19]
    for log_probs in found[1:]:
        torch.testing.assert_close(log_probs, found[0], rtol=0, atol=1e-5)
    assert not trl_utils._use_triton(torch.device("cpu"))
