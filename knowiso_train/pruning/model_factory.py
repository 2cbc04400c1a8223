"""Construction of unpruned networks from their recorded factory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from knowiso_train.errors import OptionError
from knowiso_train.features.state import preserve_state
from knowiso_train.loading.timm import load_model
from knowiso_train.pruning.structure import state_shapes

Factory = tuple[str, dict[str, Any]]
READ_FILES = {
    "checkpoint",
    "checkpoint_path",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "cache_dir",
    "in_order",
    "scriptable",
}


def find_factory(original: nn.Module, given: Any) -> Factory | None:
    """The timm name and arguments that make a network; None for one that is said to come from elsewhere.

    Args:
        original: the network before pruning.
        given: (name, arguments), "external", or None to read them off the network.

    Raises:
        OptionError: not to be read off, or of no meaning.

    Example:
        >>> find_factory(load_model("test_resnet", pretrained=False, num_classes=4), None)
        ('test_resnet.r160_in1k', {'num_classes': 4})
    """
    if isinstance(given, str) and given == "external":
        return None
    if given is not None:
        if not (
            isinstance(given, (tuple, list))
            and len(given) == 2
            and isinstance(given[0], str)
            and isinstance(given[1], Mapping)
        ):
            raise OptionError(f'factory must be (name in timm, arguments), "external" or None, got {given!r}')
        return given[0], dict(given[1])
    config = getattr(original, "pretrained_cfg", None) or getattr(original, "default_cfg", None) or {}
    name = config.get("architecture") if isinstance(config, Mapping) else None
    if not isinstance(name, str) or not name:
        raise OptionError(
            f"{type(original).__name__} does not say which timm architecture it is; pass factory=(name, arguments) as for timm.create_model, "
            'or factory="external" and give load_pruned a fresh network'
        )
    classes = getattr(original, "num_classes", None)
    tag = config.get("tag")
    return f"{name}.{tag}" if tag else name, {"num_classes": classes} if isinstance(classes, int) else {}


def build_network(factory: Factory) -> nn.Module:
    """A timm network with random weights, made without reading any file; the random state stays as it was.

    Raises:
        OptionError: no such network, or arguments that it does not take, among them all that would read weights.
    """
    name, arguments = factory
    if ":" in name or (reading := READ_FILES & set(arguments)):
        found = "a name with ':'" if ":" in name else ", ".join(sorted(reading))
        raise OptionError(
            f"the factory of a pruned network makes random weights and reads no file; {found} has no place in it ({name!r})"
        )
    try:
        with preserve_state():
            return load_model(name, pretrained=False, **arguments)
    except (TypeError, RuntimeError, AssertionError, ValueError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"timm.create_model({name!r}) does not take the arguments {arguments}: {error}") from error


def input_shape(model: nn.Module) -> tuple[int, ...]:
    """Shape of one image for a timm network, at the size that it was made for.

    Raises:
        OptionError: the network does not say.
    """
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    size = config.get("input_size") if isinstance(config, Mapping) else None
    if not size:
        raise OptionError(
            f"{type(model).__name__} does not say which input it takes; pass example=, an input or its shape"
        )
    sides = getattr(getattr(model, "patch_embed", None), "img_size", None) or size[1:]
    return (1, int(size[0]), int(sides[0]), int(sides[1]))


def structure_difference(model: nn.Module, expected: Mapping[str, Sequence[int]]) -> str | None:
    """The first tensor of a network's state that is not of the expected shape, in words; None where all are.

    Example:
        >>> structure_difference(nn.Linear(3, 2), {"weight": (2, 4), "bias": (2,)})
        "'weight' was expected with shape (2, 4), got (2, 3)"
    """
    own = state_shapes(model)
    for name in [*expected, *own]:
        wanted, found = (tuple(shapes[name]) if name in shapes else None for shapes in (expected, own))
        if wanted != found:
            return f"{name!r} was " + (
                f"expected with shape {wanted}, got {found}" if wanted is not None else f"not expected, got {found}"
            )
    return None
