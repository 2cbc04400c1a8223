"""torch-pruning's importances. No labels: where a criterion asks for a gradient, the labels are what the original network says."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

from benchmarks.baselines.tp_pruner import BudgetPruner


@dataclass(frozen=True)
class CalibrationData:
    """What a criterion may look at: images, and what the original network says of them."""

    images: Tensor
    said: Tensor
    seed: int = 0


def accumulate_gradient(model: nn.Module, data: CalibrationData, images: int = 512, batch: int = 64) -> None:
    """Leaves the gradient of the mean cross-entropy in the parameters."""
    model.zero_grad()
    chosen = data.images[:images]
    for x, y in zip(chosen.split(batch), data.said[:images].split(batch), strict=True):
        (F.cross_entropy(model(x), y, reduction="sum") / len(chosen)).backward()


def taylor(model: nn.Module, data: CalibrationData) -> Any:
    accumulate_gradient(model, data)
    return tp.importance.TaylorImportance()


def hessian(model: nn.Module, data: CalibrationData, images: int = 128) -> Any:
    """Squares of single images' gradients. Added up here: torch-pruning's own `accumulate_grad` keeps those of the last image only."""
    scorer = tp.importance.HessianImportance()
    squares: dict[nn.Parameter, Tensor] = {}
    for x, y in zip(data.images[:images].split(1), data.said[:images].split(1), strict=True):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                squares[parameter] = squares.get(parameter, 0) + parameter.grad.square()
    scorer._accu_grad, scorer._counter = squares, dict.fromkeys(squares, images)
    return scorer


def obdc(model: nn.Module, data: CalibrationData, images: int = 128, batch: int = 32) -> Any:
    """EigenDamage's OBD-C as torch-pruning has it: labels drawn from what the network says; layers without bias and of one group only."""
    scorer = tp.importance.OBDCImportance(num_classes=len(model(data.images[:1])[0]))
    torch.manual_seed(data.seed)
    with ExitStack() as stack:
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.bias is None:
                scorer.modules.append(layer)
                stack.callback(layer.register_forward_pre_hook(scorer._save_input).remove)
                stack.callback(layer.register_full_backward_hook(scorer._save_grad_output).remove)
        for x in data.images[:images].split(batch):
            model.zero_grad()
            logits = model(x.clone().requires_grad_())
            drawn = logits.detach().softmax(1).multinomial(1)[:, 0]
            F.cross_entropy(logits, drawn).backward()
            scorer.step()
    return scorer


def activation(model: nn.Module, data: CalibrationData, images: int = 256) -> Any:
    """Mean absolute activation; torch-pruning's hook keeps one batch."""
    scorer = tp.importance.ActivationImportance()
    with scorer.compute_importance(model):
        model(data.images[:images])
    return scorer


def random(model: nn.Module, data: CalibrationData) -> Any:
    torch.manual_seed(data.seed)
    return tp.importance.RandomImportance()


IMPORTANCES: dict[str, Callable[[nn.Module, CalibrationData], Any]] = {
    "L1": lambda model, data: tp.importance.MagnitudeImportance(p=1),
    "L2": lambda model, data: tp.importance.MagnitudeImportance(p=2),
    "LAMP": lambda model, data: tp.importance.LAMPImportance(),
    "FPGM": lambda model, data: tp.importance.FPGMImportance(),
    "BN scale": lambda model, data: tp.importance.BNScaleImportance(),
    "Taylor": taylor,
    "Hessian": hessian,
    "OBD-C": obdc,
    "Activation": activation,
    "Random": random,
}


def prune_with(
    cutter: BudgetPruner,
    prepare: Callable[[nn.Module, CalibrationData], Any],
    data: CalibrationData,
    target: float,
    scope: str = "global",
    steps: int = 1,
) -> None:
    """Prune to `target` multiply-adds in equal parts of what goes; scores, and gradients where needed, are taken anew before each step."""
    whole = cutter.macs(cutter.model)
    for step in range(1, steps + 1):
        importance = prepare(cutter.model, data)
        cutter.cut(importance, whole - (whole - target) * step / steps, scope)
    cutter.model.zero_grad()
    for module in cutter.model.modules():
        vars(module).pop("_importance", None)  # left behind by torch-pruning's activations
