"""Checks of the models of a fine-tuning, and its trained parameters and compared layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from knowiso_train.errors import OptionError, ShapeError
from knowiso_train.features.modules import resolve_layers
from knowiso_train.features.wrappers import unwrap_models
from knowiso_train.optim import check_trainable_precision
from knowiso_train.pruning._finetune_targets import (
    forward_with_features,
)
from knowiso_train.pruning._tracing import comparable_blocks
from knowiso_train.pruning.calibration import Calibration


def check_model_pair(pruned: Any, original: Any) -> tuple[nn.Module, nn.Module]:
    """Return both models without wrappers.

    Raises:
        InputTypeError: One of them is not a module.
        OptionError: They are the same module, or have no parameter name in common.
        ShapeError: A parameter of the pruned model is larger than the original's, as with swapped arguments.
    """
    pruned, original = unwrap_models(pruned=pruned, original=original)
    if pruned is original:
        raise OptionError("pruned and original are the same model; pass a copy as one of them")
    after, before = (dict(model.named_parameters()) for model in (pruned, original))
    shared = [name for name in after if name in before]
    if not shared:
        raise OptionError(
            f"expected the model that {type(pruned).__name__} was pruned from as the original, got "
            f"{type(original).__name__}, which has none of its parameter names. Train other pairs with IsomorphismLoss"
        )
    for name in shared:
        # Axes of different numbers are left to the check of the outputs
        if any(size > full for size, full in zip(after[name].shape, before[name].shape, strict=False)):
            raise ShapeError(
                f"expected a pruned model with parameters at most as large as the original's, got {name!r} of shape "
                f"{tuple(after[name].shape)} and {tuple(before[name].shape)} in the original. Pass the pruned model "
                "first and the original second"
            )
    return pruned, original


def check_trainable(model: nn.Module) -> None:
    """Check that a model has trainable parameters, none of them in float16.

    Raises:
        OptionError: Every parameter is frozen, or one is in float16.
    """
    if not trainable_parameters(model):
        raise OptionError("every parameter of the pruned model is frozen. Call requires_grad_() on those to be trained")
    check_trainable_precision(model)


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require gradients."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def resolve_compared_layers(
    pruned: nn.Module, original: nn.Module, images: Calibration, layers: str | Sequence[str] | None
) -> list[str]:
    """Return the names of the layers whose outputs are compared.

    Raises:
        ShapeError: The output of a layer has another shape in the pruned model.
        LayerNameError: No layer has such a name.
    """
    batch = images.first(2)
    if layers is None:
        return comparable_blocks(pruned, original, batch, images.forward)
    names = resolve_layers(original, layers) if layers else []
    with torch.no_grad():
        outputs, reference = (forward_with_features(images, model, names, batch) for model in (pruned, original))
    for name, feature in reference.features.items():
        shape = outputs.features[name].shape
        if shape != feature.shape:
            raise ShapeError(
                f"the output of layer {name!r} has shape {tuple(shape)} in the pruned model and {tuple(feature.shape)} "
                "in the original. Name layers of unchanged width, such as whole blocks, or train with IsomorphismLoss"
            )
    return names
