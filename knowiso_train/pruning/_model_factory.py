"""Construction of unpruned models from their recorded factory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from knowiso_train.errors import OptionError
from knowiso_train.features.state import preserve_state
from knowiso_train.loading.timm import input_config, load_model
from knowiso_train.pruning._structure import state_shapes

# Name and keyword arguments of `timm.create_model`
Factory = tuple[str, dict[str, Any]]
# Arguments of `timm.create_model` that read weights or other files
FILE_ARGUMENTS = {
    "checkpoint",
    "checkpoint_path",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "cache_dir",
    "in_order",
    "scriptable",
}


def resolve_factory(original: nn.Module, factory: Any) -> Factory | None:
    """Return the timm name and arguments that build a model, or None for "external".

    Args:
        original: Model before pruning.
        factory: (name, arguments), "external", or None to infer them from the model.

    Raises:
        OptionError: Another value, or a model that does not record its timm architecture.

    Examples:
        >>> resolve_factory(load_model("test_resnet", pretrained=False, num_classes=4), None)
        ('test_resnet.r160_in1k', {'num_classes': 4})
    """
    if isinstance(factory, str) and factory == "external":
        return None
    if factory is not None:
        match factory:
            case (str(architecture), Mapping() as arguments):
                return architecture, dict(arguments)
        raise OptionError(f'factory must be (name in timm, arguments), "external" or None, got {factory!r}')
    config = _timm_config(original)
    name = config.get("architecture")
    if not isinstance(name, str) or not name:
        raise OptionError(
            f"{type(original).__name__} does not record its timm architecture. Pass factory=(name, arguments) as for "
            'timm.create_model, or factory="external" and a fresh model to load_pruned'
        )
    num_classes, tag = getattr(original, "num_classes", None), config.get("tag")
    return f"{name}.{tag}" if tag else name, {"num_classes": num_classes} if isinstance(num_classes, int) else {}


def build_model(factory: Factory) -> nn.Module:
    """Return a timm model with random weights, without reading any file; the random state is preserved.

    Raises:
        OptionError: Unknown name or arguments, or arguments that would read weights.
    """
    name, arguments = factory
    forbidden = ["a name with ':'"] if ":" in name else sorted(FILE_ARGUMENTS & set(arguments))
    if forbidden:
        raise OptionError(
            f"the factory of a pruned model reads no file, but {name!r} was given with {', '.join(forbidden)}. "
            "Pass the architecture's name, and arguments of its structure alone"
        )
    try:
        with preserve_state():
            return load_model(name, pretrained=False, **arguments)
    except (TypeError, RuntimeError, AssertionError, ValueError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"timm.create_model({name!r}) does not take the arguments {arguments}: {error}") from error


def input_shape(model: nn.Module) -> tuple[int, ...]:
    """Return the shape (1, C, H, W) of one input of a timm model.

    Raises:
        OptionError: The model does not record its input size.
    """
    config = input_config(model)
    if config is None:
        raise OptionError(
            f"{type(model).__name__} does not record its input size. Pass example=, an input or its shape"
        )
    return (1, *config.size)


def _timm_config(model: nn.Module) -> Mapping[str, Any]:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    return config if isinstance(config, Mapping) else {}


def first_shape_difference(model: nn.Module, expected: Mapping[str, Sequence[int]]) -> str | None:
    """Return a description of the first tensor of a model's state without the expected shape, or None.

    Examples:
        >>> first_shape_difference(nn.Linear(3, 2), {"weight": (2, 4), "bias": (2,)})
        "'weight' was expected with shape (2, 4), got (2, 3)"
    """
    shapes = state_shapes(model)
    for name in [*expected, *shapes]:
        if name not in expected:
            return f"{name!r} was not expected, got {tuple(shapes[name])}"
        shape = shapes.get(name)
        if shape != tuple(expected[name]):
            return f"{name!r} was expected with shape {tuple(expected[name])}, got {shape}"
    return None
