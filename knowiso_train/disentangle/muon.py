"""Orthogonalised momentum for matrices, Adam for the rest: what trained hidden maps best per second in `benchmarks/bench_fit.py`.

Source: K. Jordan et al., Muon (2024). torch.optim.Muon exists from torch 2.9 on, takes two-dimensional parameters only and knows no fan-in scaling.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from knowiso_train.ops.orthogonal import orthogonalised

MOMENTUM, ADAM, BIAS_STEP = 0.9, (0.9, 0.99), 0.2


class Muon(torch.optim.Optimizer):
    """One step changes a matrix (a convolution's weight as C_out × C_in·k²) by about `lr / √fan_in` an element, whatever the scale of the gradient.

    Args:
        parameters: weights of convolutions and biases.
        lr: step, relative to the scale of a standard initialisation.
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
        mean = state.setdefault("mean", torch.zeros_like(p)).lerp_(gradient, 1 - MOMENTUM)
        fan_in = p[0].numel()
        if p.ndim > 1 and min(len(p), fan_in) <= largest:
            nesterov = torch.lerp(gradient, mean, MOMENTUM).flatten(1)
            p.mul_(1 - lr * weight_decay)
            p.add_(orthogonalised(nesterov).view(p.shape), alpha=-lr * (max(len(p), fan_in) / fan_in) ** 0.5)
            return
        square = state.setdefault("square", torch.zeros_like(p)).lerp_(gradient.square(), 1 - ADAM[1])
        deviation = (square / (1 - ADAM[1] ** self.steps)).sqrt_().add_(1e-8)
        p.addcdiv_(mean / (1 - ADAM[0] ** self.steps), deviation, value=-lr * (BIAS_STEP if p.ndim == 1 else fan_in**-0.5))
