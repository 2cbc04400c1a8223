"""What `tune` is asked for, checked and resolved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from knowiso_train.errors import InputTypeError, OptionError, ShapeError
from knowiso_train.features import bare, resolve
from knowiso_train.pruning.calibration import Calibration, check_counts
from knowiso_train.pruning.streams import shared_layers
from knowiso_train.pruning.targets import tapped

STEPS = 200


def two_networks(pruned: Any, original: Any) -> tuple[nn.Module, nn.Module]:
    """The bare networks.

    Raises:
        InputTypeError: no network.
        OptionError: one network twice.
    """
    for role, model in (("pruned", pruned), ("original", original)):
        if not isinstance(model, nn.Module):
            raise InputTypeError(f"{role}: expected a torch.nn.Module, got {type(model).__name__}")
    small, whole = bare(pruned), bare(original)
    if small is whole:
        raise OptionError("pruned and original are the same network")
    return small, whole


def check_numbers(lr: float, batch_size: int, temperature: float, held_out: float, others: Sequence[float]) -> None:
    """Raises:
    OptionError: a number without meaning; the others are the weights of the loss and the memory.
    """
    check_counts(batch_size=batch_size)
    if not all(isinstance(value, (int, float)) for value in (lr, temperature, held_out, *others)):
        raise OptionError(
            f"lr, temperature, held_out, the weights and memory must be numbers, got {', '.join(map(repr, (lr, temperature, held_out, *others)))}"
        )
    if not 0 < lr < math.inf or not 0 < temperature < math.inf or not 0 < held_out < 1:
        raise OptionError(f"expected lr > 0, temperature > 0 and 0 < held_out < 1, got {lr!r}, {temperature!r} and {held_out!r}")
    if not all(0 <= value < math.inf for value in others):
        raise OptionError(f"feature_weight, logit_weight, label_weight and memory must be numbers >= 0, got {', '.join(map(repr, others))}")


def updates(steps: int | None, epochs: float | None, count: int, batch_size: int) -> int:
    """Number of updates.

    Example:
        >>> updates(None, 2, 100, 32)
        6
    """
    if steps is not None and epochs is not None:
        raise OptionError(f"give steps or epochs, not both; got {steps!r} and {epochs!r}")
    total = steps if steps is not None else STEPS if epochs is None else math.ceil(epochs * (count // batch_size))
    if not isinstance(total, int) or total < 1:
        raise OptionError(f"expected at least one step, as an integer, got steps={steps!r}, epochs={epochs!r}")
    return total


def compared_layers(small: nn.Module, whole: nn.Module, images: Calibration, layers: str | Sequence[str] | None) -> list[str]:
    """Names of the layers whose outputs are compared.

    Raises:
        ShapeError: a layer that emits another shape in the pruned network.
        LayerNameError: no such layer.
    """
    few = images.some(2)
    if layers is None:
        return shared_layers(small, whole, lambda network: images.run(network, few))
    names = resolve(whole, layers) if layers else []
    with torch.no_grad():
        of_small, of_whole = (tapped(images, network, names, few) for network in (small, whole))
    for name, feature in of_whole.features.items():
        if feature.shape != of_small.features[name].shape:
            raise ShapeError(
                f"layer {name!r} emits {tuple(of_small.features[name].shape)} in the pruned network and {tuple(feature.shape)} in the original; "
                "name layers whose width pruning left, such as the ends of blocks, or train with IsomorphismLoss, which takes any widths"
            )
    return names
