"""What makes a pruned network differ in structure from its original: plain data, taken from one and given to a fresh other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from knowiso_train.errors import ShapeError
from knowiso_train.features import bare

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # `training` among them: a mode is no structure
_MISSING = object()


@dataclass(frozen=True)
class Changes:
    """Structure that a pruned network has and its original has not.

    Attributes:
        attributes: for each module by name, its plain attributes with another value: `in_channels`, `groups`, `num_heads`, `normalized_shape`, ….
        added: parameters that the original lacks, such as biases that took up a mean.
        removed: parameters of the original that are gone.
    """

    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)


def is_plain(value: Any) -> bool:
    """Whether a value is numbers, words, truth values, None, or lists and tuples of them: what JSON can hold."""
    if type(value) in (list, tuple, torch.Size):
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def attribute_changes(original: nn.Module, pruned: nn.Module) -> Changes:
    """What has to be set on a network of the original's structure, besides its shapes, to make it the pruned one.

    Args:
        original: the network before pruning; neither network is changed.
        pruned: what has become of it.

    Raises:
        ShapeError: networks whose modules differ in name or class: that is more than widths.

    Example:
        >>> changes = attribute_changes(nn.Sequential(nn.Linear(3, 2, bias=False)), nn.Sequential(nn.Linear(3, 1)))
        >>> changes.attributes, changes.added
        ({'0': {'out_features': 1}}, ['0.bias'])
    """
    before, after = dict(bare(original).named_modules()), dict(bare(pruned).named_modules())
    for name in [*before, *after]:
        found = [type(modules[name]).__name__ if name in modules else "nothing" for modules in (before, after)]
        if found[0] != found[1]:
            raise ShapeError(
                f"module {name!r} is {found[0]} in the original and {found[1]} in the pruned network; expected networks that differ in widths only. "
                "Give the network that was pruned as the original; where that is what timm built anew, pass factory=(name, arguments) with all "
                "arguments that made it"
            )
    attributes = {name: changed for name in before if (changed := _changed(before[name], after[name]))}
    old, new = _parameters(original), _parameters(pruned)
    return Changes(attributes, [name for name in new if name not in old], [name for name in old if name not in new])


def state_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the state dict."""
    return {name: tuple(value.shape) for name, value in bare(model).state_dict().items()}


def reshape(model: nn.Module, changes: Changes, shapes: Mapping[str, Sequence[int]]) -> nn.Module:
    """Give a freshly built network the structure of a pruned one; no tracing, no forward pass.

    Args:
        model: of the original's structure; changed in place.
        changes: from `attribute_changes`.
        shapes: of the pruned network's tensors, from `state_shapes`. Tensors of another shape are replaced by empty ones.

    Returns:
        The model.

    Raises:
        ShapeError: changes of modules, attributes or tensors that the model does not have.

    Example:
        >>> pruned = nn.Sequential(nn.Linear(3, 1))
        >>> fresh = nn.Sequential(nn.Linear(3, 2, bias=False))
        >>> reshape(fresh, attribute_changes(fresh, pruned), state_shapes(pruned))
        Sequential(
          (0): Linear(in_features=3, out_features=1, bias=True)
        )
    """
    inner = bare(model)
    modules = dict(inner.named_modules(remove_duplicate=False))
    for name, values in changes.attributes.items():
        for attribute, value in values.items():
            _check_attribute(modules.get(name), name, attribute, value)
            setattr(modules[name], attribute, value)
    for name in changes.removed:
        module, leaf = _owner(modules, name)
        module.register_parameter(leaf, None)
    for name in changes.added:
        module, leaf = _owner(modules, name)
        if name not in shapes or (name not in _parameters(inner) and getattr(module, leaf, None) is not None):
            raise ShapeError(f"parameter {name!r} cannot be added to {type(inner).__name__}: it has no shape, or its place is taken")
        like = next(inner.parameters(), torch.empty(0))
        setattr(module, leaf, nn.Parameter(like.new_empty(tuple(shapes[name]))))
    _resize(inner, modules, shapes)
    return model


def _resize(model: nn.Module, modules: Mapping[str, nn.Module], shapes: Mapping[str, Sequence[int]]) -> None:
    tensors: dict[str, Tensor] = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    made: dict[int, Tensor] = {}  # tied parameters stay tied
    for name, shape in shapes.items():
        if name not in tensors:
            raise ShapeError(f"{type(model).__name__} has no parameter or buffer {name!r} to be given the shape {tuple(shape)}")
        old = tensors[name]
        if tuple(old.shape) == tuple(shape):
            continue
        module, leaf = _owner(modules, name)
        new = made.get(id(old))
        if new is None or new.shape != torch.Size(shape):
            new = old.detach().new_empty(tuple(shape))
            new = made[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
        setattr(module, leaf, new)


def _changed(before: nn.Module, after: nn.Module) -> dict[str, Any]:
    old, new = vars(before), vars(after)
    return {
        name: value
        for name, value in new.items()
        if name not in _OF_EVERY_MODULE
        and is_plain(value)
        and (name not in old or is_plain(old[name]))
        and _exact(value) != _exact(old.get(name, _MISSING))
    }


def _exact(value: Any) -> Any:
    """Comparable with the type: 1, 1.0 and True are three values, as are (1,) and [1]."""
    return (type(value), tuple(map(_exact, value))) if isinstance(value, (list, tuple)) else (type(value), value)


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(bare(model).named_parameters(remove_duplicate=False))


def _owner(modules: Mapping[str, nn.Module], name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    if path not in modules:
        raise ShapeError(f"there is no module {path!r} to hold {name!r}; the network is not of the original's structure")
    return modules[path], leaf


def _check_attribute(module: nn.Module | None, name: str, attribute: str, value: Any) -> None:
    if module is None:
        raise ShapeError(f"there is no module {name!r} to set {attribute!r} of; the network is not of the original's structure")
    taken = attribute in _OF_EVERY_MODULE or isinstance(getattr(type(module), attribute, None), property)
    if taken or not is_plain(getattr(module, attribute, None)) or not is_plain(value):
        raise ShapeError(
            f"{attribute!r} of module {name!r} is no plain attribute, or {value!r} no plain value; methods, submodules and tensors are not set"
        )
