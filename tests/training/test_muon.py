"""Muon is torch.optim.Muon's arithmetic, on the right parameters, with a state that survives a checkpoint."""

import copy

import pytest
import torch
from support.backbones import TINY
from torch import nn

from vla0_trl.models.nano import NanoConfig, build_nano
from vla0_trl.training.arguments import VLASFTConfig
from vla0_trl.training.muon import MuonAdamW, build_muon

SHAPES = [(16, 8), (8, 16), (16, 8), (12, 12)]


def parameters(dtype=torch.float32, seed=0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def give_gradients(targets: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in targets:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def test_matrices_move_as_under_torchs_muon():
    ours, theirs = parameters(), parameters()
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95}
    optimizers = (MuonAdamW(ours, [], **options), torch.optim.Muon(theirs, **options, adjust_lr_fn="match_rms_adamw"))
    for step in range(5):
        for group, optimizer in zip((ours, theirs), optimizers, strict=True):
            give_gradients(group, step)
            optimizer.step()
    for a, b, start in zip(ours, theirs, parameters(), strict=True):
        # Both iterate in bfloat16, in which a batched product rounds otherwise than a single one.
        assert (a - b).norm() < 0.02 * (b - start).norm()


def test_the_rest_moves_as_under_torchs_adamw():
    ours, theirs = parameters(), parameters()
    options = {"lr": 0.02, "weight_decay": 0.1, "betas": (0.9, 0.98), "eps": 1e-8}
    optimizers = (MuonAdamW([], [{"params": ours}], **options), torch.optim.AdamW(theirs, **options))
    for step in range(5):
        for group, optimizer in zip((ours, theirs), optimizers, strict=True):
            give_gradients(group, step)
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_bfloat16_weights_keep_what_is_smaller_than_their_last_bit():
    weights = parameters(torch.bfloat16)
    start = copy.deepcopy(weights)
    optimizer = MuonAdamW(weights[:2], [{"params": weights[2:]}], lr=1e-5)
    give_gradients(weights, 0)
    for _ in range(3):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(weights[2:], start[2:], strict=True))  # each step is too small
    for _ in range(600):
        optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(weights, start, strict=True))
    for weight in weights:
        assert torch.equal(weight, optimizer.state[weight]["master"].to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_state_goes_on_bit_for_bit(dtype):
    def make():
        weights = parameters(dtype)
        return weights, MuonAdamW(weights[:2], [{"params": weights[2:], "lr": 1e-3}], lr=1e-2)

    whole, whole_optimizer = make()
    for step in range(3):
        give_gradients(whole, step)
        whole_optimizer.step()
    resumed, resumed_optimizer = make()
    with torch.no_grad():
        for new, old in zip(resumed, whole, strict=True):
            new.copy_(old)
    resumed_optimizer.load_state_dict(copy.deepcopy(whole_optimizer.state_dict()))
    for step in range(3, 6):
        for weights, optimizer in ((whole, whole_optimizer), (resumed, resumed_optimizer)):
            give_gradients(weights, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_hidden_matrices_are_muons_and_the_rest_adamws():
    model, _ = build_nano(NanoConfig(**TINY))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # untied, as some backbones are
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices, tables, vectors = (
        {names[id(parameter)] for parameter in group["params"]}
        for group in build_muon(model, 1e-2, 1e-3, weight_decay=0.1).param_groups
    )
    assert tables == {
        "model.text_model.embed_tokens.weight",
        "model.vision_model.embeddings.position_embedding.weight",
        "lm_head.weight",
    }
    assert "model.vision_model.embeddings.patch_embedding.weight" in matrices
    assert "model.connector.modality_projection.proj.weight" in matrices
    assert all("norm" in name or name.endswith("bias") for name in vectors)
    assert len(matrices) + len(tables) + len(vectors) == len(names)
    groups = build_muon(model, 1e-2, 1e-3, weight_decay=0.1).param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-2, 0.1), (1e-3, 0.1), (1e-3, 0.0)]


def test_its_own_learning_rate_needs_muon(tmp_path):
    with pytest.raises(ValueError, match=r"muon_adamw_learning_rate=.* optim=adamw_torch.* is not muon"):
        VLASFTConfig(str(tmp_path), optim="adamw_torch", muon_adamw_learning_rate=1e-3, use_cpu=True)
