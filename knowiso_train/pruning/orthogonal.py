"""An optimiser for short runs: momenta of weight matrices, with all directions made equally long."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, tuned by its authors for few rounds
ROUNDS = 5
SMALLEST = 1e-12


class OrthogonalMomentum(Optimizer):
    """Each matrix moves along its momentum with the singular values made one, by a share of its own norm.

    Directions that carry little gradient are learned as fast as the others, which is what a layer needs whose inputs are correlated; and a relative
    step means the same in every layer, whatever the scale of its weights. Source: Jordan et al., *Muon* (2024); the relative step is ours.

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
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                ahead = parameter.grad.lerp(momentum, group["momentum"])  # Nesterov's
                direction = orthogonalised(ahead.flatten(1)).view_as(parameter)
                length = parameter.norm() / direction.norm().clamp_min(SMALLEST)
                parameter.sub_(direction * (group["lr"] * length))
        return loss


def orthogonalised(matrix: Tensor) -> Tensor:
    """Nearly the nearest matrix whose singular values are one: between 0.7 and 1.2, which serves as well and takes products only.

    Args:
        matrix: (m, n).

    Example:
        >>> values = torch.linalg.svdvals(orthogonalised(torch.randn(8, 20)))
        >>> 0.5 < values.min().item() <= values.max().item() < 1.3
        True
    """
    a, b, c = COEFFICIENTS
    x: Tensor = matrix / matrix.norm().clamp_min(SMALLEST)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(ROUNDS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


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
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.modules.conv._ConvNd) and layer.groups == 1 and not layer.transposed)
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [parameter for parameter in trained if id(parameter) in matrices], [parameter for parameter in trained if id(parameter) not in matrices]
