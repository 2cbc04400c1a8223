"""Importances of torch-pruning without labels.

Criteria that need a gradient use the predictions of the original network as labels.
"""

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
    """Images that a criterion may use, and the classes that the original network predicts for them."""

    images: Tensor
    predictions: Tensor
    seed: int = 0


def accumulate_gradient(model: nn.Module, data: CalibrationData, images: int = 512, batch: int = 64) -> None:
    """Set the gradients of the parameters to those of the mean cross-entropy."""
    model.zero_grad()
    subset = data.images[:images]
    for x, y in zip(subset.split(batch), data.predictions[:images].split(batch), strict=True):
        (F.cross_entropy(model(x), y, reduction="sum") / len(subset)).backward()


def taylor(model: nn.Module, data: CalibrationData) -> Any:
    """Prepare the Taylor importance."""
    accumulate_gradient(model, data)
    return tp.importance.TaylorImportance()


def hessian(model: nn.Module, data: CalibrationData, images: int = 128) -> Any:
    """Prepare the Hessian importance: sums of squared gradients of single images.

    They are summed here because torch-pruning's `accumulate_grad` keeps those of the last image only.
    """
    scorer = tp.importance.HessianImportance()
    squares: dict[nn.Parameter, Tensor] = {}
    for x, y in zip(data.images[:images].split(1), data.predictions[:images].split(1), strict=True):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                squares[parameter] = squares.get(parameter, 0) + parameter.grad.square()
    scorer._accu_grad, scorer._counter = squares, dict.fromkeys(squares, images)
    return scorer


def obdc(model: nn.Module, data: CalibrationData, images: int = 128, batch: int = 32) -> Any:
    """Prepare OBD-C of EigenDamage as torch-pruning implements it.

    Labels are drawn from the network's predictions. Only layers without bias and with one group are supported.
    """
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
    """Prepare the mean absolute activation of one batch, because torch-pruning's hook keeps one batch."""
    scorer = tp.importance.ActivationImportance()
    with scorer.compute_importance(model):
        model(data.images[:images])
    return scorer


def random(model: nn.Module, data: CalibrationData) -> Any:
    """Prepare random scores."""
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
    pruner: BudgetPruner,
    prepare: Callable[[nn.Module, CalibrationData], Any],
    data: CalibrationData,
    target: float,
    scope: str = "global",
    steps: int = 1,
) -> None:
    """Prune to `target` multiply-adds in steps of equal size.

    Scores, and gradients where needed, are computed anew before each step.
    """
    macs_before = pruner.macs(pruner.model)
    for step in range(1, steps + 1):
        importance = prepare(pruner.model, data)
        pruner.cut(importance, macs_before - (macs_before - target) * step / steps, scope)
    pruner.model.zero_grad()
    for module in pruner.model.modules():
        vars(module).pop("_importance", None)  # set by torch-pruning's activation importance
