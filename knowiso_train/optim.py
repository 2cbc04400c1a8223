"""Optimizers with orthogonalized momentum."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from knowiso_train.ops.linalg import MIN_NORM, orthogonalize, orthogonalize_all

MUON_MOMENTUM, ADAM_BETAS, BIAS_LR_FACTOR = 0.9, (0.9, 0.99), 0.2
# Learning rate of norms and biases relative to that of matrices: a step of Adam is absolute, that of a matrix is
# relative to its norm
FINETUNE_BIAS_LR_FACTOR = 0.05
FINETUNE_WARMUP_FRACTION = 0.05


class Muon(torch.optim.Optimizer):
    """One step changes a matrix (a convolution's weight as C_out × C_in·k²) by about `lr / √fan_in` an element, whatever the scale of the gradient.

    Args:
        parameters: weights of convolutions and biases.
        lr: step, relative to the scale of a standard initialization.
        weight_decay: decoupled, on matrices.
        largest: matrices whose smaller side exceeds this take Adam's step instead, which is cheaper.
    """

    def __init__(self, parameters: Sequence[Tensor], lr: float, weight_decay: float, largest: int) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "largest": largest})
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group["lr"], group["weight_decay"], group["largest"])

    def _update(self, p: Tensor, gradient: Tensor, lr: float, weight_decay: float, largest: int) -> None:
        state = self.state[p]
        mean = state.setdefault("mean", torch.zeros_like(p)).lerp_(gradient, 1 - MUON_MOMENTUM)
        fan_in = p[0].numel()
        if p.ndim > 1 and min(len(p), fan_in) <= largest:
            nesterov = torch.lerp(gradient, mean, MUON_MOMENTUM).flatten(1)
            p.mul_(1 - lr * weight_decay)
            p.add_(orthogonalize(nesterov).view(p.shape), alpha=-lr * (max(len(p), fan_in) / fan_in) ** 0.5)
            return
        square = state.setdefault("square", torch.zeros_like(p)).lerp_(gradient.square(), 1 - ADAM_BETAS[1])
        deviation = (square / (1 - ADAM_BETAS[1] ** self.steps)).sqrt_().add_(1e-8)
        p.addcdiv_(
            mean / (1 - ADAM_BETAS[0] ** self.steps),
            deviation,
            value=-lr * (BIAS_LR_FACTOR if p.ndim == 1 else fan_in**-0.5),
        )


class OrthogonalMomentum(Optimizer):
    """Each matrix moves along its momentum with the singular values made one, by a share of its own norm.

    Directions that carry little gradient are learned as fast as the others, which is what a layer needs whose inputs
    are correlated; and a relative
    step means the same in every layer, whatever the scale of its weights. Source: Jordan et al., *Muon* (2024); the
    relative step is ours.

    Args:
        params: weights with two axes or more, taken as matrices (outputs, everything else).
        lr: length of a step, relative to the weight's norm.
        momentum: share of the former momentum that stays.

    Example:
        >>> weight = nn.Parameter(torch.eye(3))
        >>> optimizer = OrthogonalMomentum([weight], lr=0.1)
        >>> (weight * torch.tensor([1.0, 2.0, 4.0])).sum().backward()
        >>> optimizer.step()
        >>> round(((weight - torch.eye(3)).norm() / torch.eye(3).norm()).item(), 4)
        0.1
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not moved:
                continue
            gradients = [parameter.grad for parameter in moved]
            momenta = [self.state[parameter].setdefault("momentum", torch.zeros_like(parameter)) for parameter in moved]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov's
            directions = orthogonalize_all([gradient.flatten(1) for gradient in ahead])
            steps = [direction.reshape(parameter.shape) for direction, parameter in zip(directions, moved, strict=True)]
            lengths, own = (torch.stack(torch._foreach_norm(tensors)) for tensors in (moved, steps))
            torch._foreach_mul_(steps, list((lengths / own.clamp_min(MIN_NORM)).unbind()))
            torch._foreach_sub_(moved, steps, alpha=group["lr"])
        return loss


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters: matrices of linear layers and convolutions, and the rest (norms, biases, depthwise and grouped convolutions).

    Example:
        >>> matrices, rest = split_parameters(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Linear(4, 2)))
        >>> [tuple(parameter.shape) for parameter in matrices], len(rest)
        ([(2, 4)], 3)
    """
    matrices = {
        id(layer.weight)
        for layer in model.modules()
        if isinstance(layer, nn.Linear)
        or (isinstance(layer, nn.modules.conv._ConvNd) and layer.groups == 1 and not layer.transposed)
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [parameter for parameter in trained if id(parameter) in matrices], [
        parameter for parameter in trained if id(parameter) not in matrices
    ]


def build_optimizers(model: nn.Module, lr: float) -> list[tuple[Optimizer, float]]:
    """Return the optimizers of a short fine-tuning run, each with its peak learning rate.

    Matrices take `OrthogonalMomentum`. Norms, biases, depthwise and grouped convolutions take Adam.

    Args:
        model: Model with at least one trainable parameter.
        lr: Peak step of a matrix, relative to its norm.

    Example:
        >>> [(type(optimizer).__name__, lr) for optimizer, lr in build_optimizers(nn.Linear(4, 2), 1.0)]
        [('OrthogonalMomentum', 1.0), ('Adam', 0.05)]
    """
    matrices, rest = split_parameters(model)
    optimizers: list[tuple[Optimizer, float]] = []
    if matrices:
        optimizers.append((OrthogonalMomentum(matrices, lr), lr))
    if rest:
        bias_lr = FINETUNE_BIAS_LR_FACTOR * lr
        optimizers.append((torch.optim.Adam(rest, bias_lr, betas=ADAM_BETAS), bias_lr))
    return optimizers
