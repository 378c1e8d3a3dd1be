"""Muon for a model's hidden matrices, AdamW for the rest: `optim: muon` of a recipe.

Muon (Jordan 2024, "Muon: an optimizer for hidden layers in neural networks") orthogonalises each matrix's momentum.
This is the arithmetic of `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"` (Liu et al. 2025, arXiv:2502.16982),
which takes one matrix at a time: here those of one shape go through the matrix products together.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw

MUON = "muon"  # as a recipe's `optim`
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz iteration, as in torch.optim.Muon
_ITERATIONS = 5
_MATRICES = "hidden_matrices"  # key of a parameter group: whether Muon or AdamW updates it


class MuonAdamW(torch.optim.Optimizer):
    """Muon with Nesterov momentum on some parameters, AdamW on others, in one optimizer with one state.

    Parameters in bfloat16 keep a float32 copy in the state, which is what is updated: most updates are smaller than a
    bfloat16's last bit.

    Args:
        matrices: parameters of at least two dimensions, all but the first of which are flattened.
        others (`Iterable[dict]`): groups for AdamW: `params`, and `lr` or `weight_decay` of their own.
        lr, weight_decay (`float`): of the matrices, and of groups that say nothing else.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        groups = [{"params": list(matrices), _MATRICES: True}, *({**group, _MATRICES: False} for group in others)]
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": eps}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure=None):
        """One update of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            masters = [self._master(parameter) for parameter in parameters]
            gradients = [parameter.grad.float() for parameter in parameters]
            update = self._muon if group[_MATRICES] else self._adamw
            update(group, [self.state[parameter] for parameter in parameters], masters, gradients)
            for parameter, master in zip(parameters, masters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which casts state to the parameters' type: float32 stays float32 here."""
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, saved in state_dict["state"].items():
            parameter = parameters[index]
            for name, value in saved.items():
                if name != "step":
                    self.state[parameter][name] = value.to(parameter.device, torch.float32, copy=True)

    def _master(self, parameter: nn.Parameter) -> torch.Tensor:
        if parameter.dtype == torch.float32:
            return parameter
        state = self.state[parameter]
        if "master" not in state:
            state["master"] = parameter.detach().float()
        return state["master"]

    def _muon(
        self, group: dict[str, Any], states: list[dict], masters: list[torch.Tensor], gradients: list[torch.Tensor]
    ) -> None:
        momentum, by_shape = group["momentum"], {}
        for state, master, gradient in zip(states, masters, gradients, strict=True):
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            buffer = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
            direction = gradient.lerp(buffer, momentum).flatten(1)
            by_shape.setdefault(direction.shape, []).append((master, direction))
        for shape, members in by_shape.items():
            updates = orthogonalize(torch.stack([direction for _, direction in members]))
            step_size = group["lr"] * 0.2 * max(shape) ** 0.5  # as large as AdamW's in root mean square
            for (master, _), update in zip(members, updates, strict=True):
                master.mul_(1 - group["lr"] * group["weight_decay"])
                master.add_(update.view_as(master), alpha=-step_size)

    def _adamw(
        self, group: dict[str, Any], states: list[dict], masters: list[torch.Tensor], gradients: list[torch.Tensor]
    ) -> None:
        for state, gradient in zip(states, gradients, strict=True):
            if "step" not in state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        averages = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        beta1, beta2 = group["betas"]
        options = {"lr": group["lr"], "weight_decay": group["weight_decay"], "eps": group["eps"]}
        options |= {"beta1": beta1, "beta2": beta2, "amsgrad": False, "maximize": False, "foreach": True}
        adamw(masters, gradients, *averages, [], [state["step"] for state in states], **options)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Nearly orthogonal matrices with the singular vectors of these, (B, rows, columns); float32 from bfloat16."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.to(torch.bfloat16)
    x = x.mT.contiguous() if tall else x
    x = x / x.float().norm(dim=(1, 2), keepdim=True).clamp(min=1e-7).to(x.dtype)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()


def build_muon(model: nn.Module, learning_rate: float, others_learning_rate: float, **options: Any) -> MuonAdamW:
    """The optimizer of a model's trained parameters.

    Muon takes what maps hidden states to hidden states, convolutions too; embeddings, the language model's head,
    biases and norms are AdamW's. As usual, vectors do not decay.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    tables |= {id(head.weight)} if head is not None else set()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [p for p in trained if p.ndim > 1 and id(p) not in tables]
    others = [
        {"params": [p for p in trained if id(p) in tables], "lr": others_learning_rate},
        {"params": [p for p in trained if p.ndim < 2], "lr": others_learning_rate, "weight_decay": 0.0},
    ]
    return MuonAdamW(matrices, others, learning_rate, **options)
