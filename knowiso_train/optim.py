"""Muon: momentum whose matrices are orthogonalized, and Adam for the parameters that are no matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from knowiso_train.errors import OptionError
from knowiso_train.ops.linalg import MIN_NORM, NEWTON_SCHULZ_STEPS, orthogonalize_all

ADAM_BETAS = (0.9, 0.99)  # β₂ lower than usual: the second moment must settle within a short run
ADAM_EPS = 1e-8
BIAS_LR_FACTOR = 0.2  # Muon's learning rate of vectors, relative to that of matrices
# Learning rate of norms and biases relative to that of matrices: a step of Adam is absolute, that of a matrix is
# relative to its norm
FINETUNE_BIAS_LR_FACTOR = 0.05
FINETUNE_WARMUP_FRACTION = 0.05

StepSize = Literal["fan_in", "relative"]


class Muon(Optimizer):
    """Momentum with the singular values of every matrix set to one.

    Directions with small gradients are learned as fast as the others, which matters for layers with correlated inputs.
    Weights with two axes or more count as matrices (outputs, everything else). A vector, or a matrix larger than
    `max_side`, takes a step of Adam instead.

    The step of a matrix (m, n) does not depend on the scale of its gradient. With the orthogonalized momentum O:

    - "fan_in": `W ← (1 - lr · weight_decay) W - lr · √(max(m, n) / n) · O`, about `lr / √n` an element. It is relative
      to the scale of a standard initialization.
    - "relative": `W ← W - lr · ‖W‖ / ‖O‖ · O`. It is relative to the norm of trained weights.

    The relative step is our own.

    References:
        Jordan et al. (2024), *Muon*.

    Args:
        params: Parameters or groups of parameters.
        lr: Step size.
        step_size: Unit of the step.
        momentum: Fraction of the former momentum that remains, β₁.
        weight_decay: Decoupled weight decay of matrices, relative to `lr`.
        max_side: Maximum smaller side of an orthogonalized matrix. Default: no limit.
        dtype: Type in which matrices are orthogonalized. Default: theirs.
        newton_schulz_steps: Number of steps of the orthogonalization.

    Examples:
        >>> weight = nn.Parameter(torch.eye(3))
        >>> optimizer = Muon([weight], lr=0.1, step_size="relative")
        >>> (weight * torch.tensor([1.0, 2.0, 4.0])).sum().backward()
        >>> optimizer.step()
        >>> round(((weight - torch.eye(3)).norm() / torch.eye(3).norm()).item(), 4)
        0.1
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        step_size: StepSize = "fan_in",
        momentum: float = ADAM_BETAS[0],
        weight_decay: float = 0.0,
        max_side: int | None = None,
        dtype: torch.dtype | None = None,
        newton_schulz_steps: int = NEWTON_SCHULZ_STEPS,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "max_side": max_side}
        super().__init__(params, defaults | {"step_size": step_size, "dtype": dtype, "steps": newton_schulz_steps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            gradients = [parameter.grad for parameter in parameters]
            # M ← β₁ M + (1 - β₁) G
            momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in parameters]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            matrices = []
            for parameter, gradient, momentum in zip(parameters, gradients, momenta, strict=True):
                if _is_orthogonalized(parameter, group["max_side"]):
                    matrices.append((parameter, gradient, momentum))
                else:
                    self._adam_step(parameter, gradient, momentum, group)
            if matrices:
                self._matrix_step(matrices, group)
        return loss

    def _matrix_step(self, matrices: list[tuple[Tensor, Tensor, Tensor]], group: dict[str, Any]) -> None:
        weights, gradients, momenta = (list(tensors) for tensors in zip(*matrices, strict=True))
        # Nesterov: the momentum after one more step with the same gradient
        lookahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
        directions = orthogonalize_all(
            [matrix.flatten(1).to(group["dtype"] or matrix.dtype) for matrix in lookahead], group["steps"]
        )
        steps = [
            direction.to(weight.dtype).view(weight.shape) for direction, weight in zip(directions, weights, strict=True)
        ]
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        if group["step_size"] == "relative":
            weight_norms, step_norms = (torch.stack(torch._foreach_norm(tensors)) for tensors in (weights, steps))
            torch._foreach_mul_(steps, list((weight_norms / step_norms.clamp_min(MIN_NORM)).unbind()))
            torch._foreach_sub_(weights, steps, alpha=group["lr"])
            return
        for weight, step in zip(weights, steps, strict=True):
            fan_in = weight[0].numel()
            weight.add_(step, alpha=-group["lr"] * (max(len(weight), fan_in) / fan_in) ** 0.5)

    def _adam_step(self, parameter: Tensor, gradient: Tensor, momentum: Tensor, group: dict[str, Any]) -> None:
        state, beta2 = self.state[parameter], ADAM_BETAS[1]
        state["step"] = state.get("step", 0) + 1
        square = state.setdefault("square", torch.zeros_like(parameter)).lerp_(gradient.square(), 1 - beta2)
        # Bias correction, as both averages start at zero
        deviation = (square / (1 - beta2 ** state["step"])).sqrt_().add_(ADAM_EPS)
        mean = momentum / (1 - group["momentum"] ** state["step"])
        factor = BIAS_LR_FACTOR if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        parameter.addcdiv_(mean, deviation, value=-group["lr"] * factor)


def _is_orthogonalized(parameter: Tensor, max_side: int | None) -> bool:
    return parameter.ndim > 1 and (max_side is None or min(len(parameter), parameter[0].numel()) <= max_side)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split the trainable parameters into matrices of linear layers and convolutions, and the rest.

    The rest is norms, biases, and the weights of depthwise, grouped and transposed convolutions.

    Examples:
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
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rest = [parameter for parameter in trainable if id(parameter) not in matrices]
    return [parameter for parameter in trainable if id(parameter) in matrices], rest


def check_trainable_precision(model: nn.Module) -> None:
    """Check that no trainable parameter of a model is in float16.

    Raises:
        OptionError: A parameter in float16.

    Examples:
        >>> check_trainable_precision(nn.Linear(2, 2).bfloat16())
    """
    if any(parameter.requires_grad and parameter.dtype == torch.float16 for parameter in model.parameters()):
        raise OptionError(
            "float16 weights round small updates to zero. Call float() on the models before, and half() afterwards"
        )


def build_optimizers(model: nn.Module, lr: float) -> list[tuple[Optimizer, float]]:
    """Return the optimizers of a short fine-tuning run, each with its peak learning rate.

    Matrices take `Muon`. Norms, biases, depthwise and grouped convolutions take Adam.

    Args:
        model: Model with at least one trainable parameter.
        lr: Peak step of a matrix, relative to its norm.

    Examples:
        >>> [(type(optimizer).__name__, lr) for optimizer, lr in build_optimizers(nn.Linear(4, 2), 1.0)]
        [('Muon', 1.0), ('Adam', 0.05)]
    """
    matrices, rest = split_parameters(model)
    optimizers: list[tuple[Optimizer, float]] = []
    if matrices:
        optimizers.append((Muon(matrices, lr, step_size="relative"), lr))
    if rest:
        bias_lr = FINETUNE_BIAS_LR_FACTOR * lr
        optimizers.append((torch.optim.Adam(rest, bias_lr, betas=ADAM_BETAS), bias_lr))
    return optimizers
