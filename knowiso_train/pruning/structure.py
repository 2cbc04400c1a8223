"""Structural differences between networks, and fingerprints of their outputs."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from knowiso_train.errors import FormatError, InputTypeError, NonFiniteError, OptionError, ShapeError
from knowiso_train.features.modules import unwrap_model
from knowiso_train.features.state import preserve_state
from knowiso_train.utils.hashing import hash_unit

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # `training` among them: a mode is no structure
_MISSING = object()

NUM_PROJECTIONS, FINGERPRINT_TOLERANCE = 8, 1e-4


@dataclass(frozen=True)
class StructureDiff:
    """Structure that a pruned network has and its original has not.

    Attributes:
        attributes: for each module by name, its plain attributes with another value: `in_channels`, `groups`,
            `num_heads`, `normalized_shape`, ….
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


def structure_diff(original: nn.Module, pruned: nn.Module) -> StructureDiff:
    """What has to be set on a network of the original's structure, besides its shapes, to make it the pruned one.

    Args:
        original: the network before pruning; neither network is changed.
        pruned: what has become of it.

    Raises:
        ShapeError: networks whose modules differ in name or class: that is more than widths.

    Example:
        >>> changes = structure_diff(nn.Sequential(nn.Linear(3, 2, bias=False)), nn.Sequential(nn.Linear(3, 1)))
        >>> changes.attributes, changes.added
        ({'0': {'out_features': 1}}, ['0.bias'])
    """
    before, after = dict(unwrap_model(original).named_modules()), dict(unwrap_model(pruned).named_modules())
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
    return StructureDiff(
        attributes, [name for name in new if name not in old], [name for name in old if name not in new]
    )


def state_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the state dict."""
    return {name: tuple(value.shape) for name, value in unwrap_model(model).state_dict().items()}


def apply_structure(model: nn.Module, changes: StructureDiff, shapes: Mapping[str, Sequence[int]]) -> nn.Module:
    """Give a freshly built network the structure of a pruned one; no tracing, no forward pass.

    Args:
        model: of the original's structure; changed in place.
        changes: from `structure_diff`.
        shapes: of the pruned network's tensors, from `state_shapes`. Tensors of another shape are replaced by empty
            ones.

    Returns:
        The model.

    Raises:
        ShapeError: changes of modules, attributes or tensors that the model does not have.

    Example:
        >>> pruned = nn.Sequential(nn.Linear(3, 1))
        >>> fresh = nn.Sequential(nn.Linear(3, 2, bias=False))
        >>> apply_structure(fresh, structure_diff(fresh, pruned), state_shapes(pruned))
        Sequential(
          (0): Linear(in_features=3, out_features=1, bias=True)
        )
    """
    inner = unwrap_model(model)
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
            raise ShapeError(
                f"parameter {name!r} cannot be added to {type(inner).__name__}: it has no shape, or its place is taken"
            )
        like = next(inner.parameters(), torch.empty(0))
        setattr(module, leaf, nn.Parameter(like.new_empty(tuple(shapes[name]))))
    _resize(inner, modules, shapes)
    return model


def _resize(model: nn.Module, modules: Mapping[str, nn.Module], shapes: Mapping[str, Sequence[int]]) -> None:
    tensors: dict[str, Tensor] = dict(
        [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    )
    made: dict[int, Tensor] = {}  # tied parameters stay tied
    for name, shape in shapes.items():
        if name not in tensors:
            raise ShapeError(
                f"{type(model).__name__} has no parameter or buffer {name!r} to be given the shape {tuple(shape)}"
            )
        old = tensors[name]
        if tuple(old.shape) == tuple(shape):
            continue
        module, leaf = _owner(modules, name)
        new = made.get(id(old))
        if new is None or new.shape != torch.Size(shape):
            new = old.detach().new_empty(tuple(shape))
            new = made[id(old)] = (
                nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
            )
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
    return dict(unwrap_model(model).named_parameters(remove_duplicate=False))


def _owner(modules: Mapping[str, nn.Module], name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    if path not in modules:
        raise ShapeError(
            f"there is no module {path!r} to hold {name!r}; the network is not of the original's structure"
        )
    return modules[path], leaf


def _check_attribute(module: nn.Module | None, name: str, attribute: str, value: Any) -> None:
    if module is None:
        raise ShapeError(
            f"there is no module {name!r} to set {attribute!r} of; the network is not of the original's structure"
        )
    taken = attribute in _OF_EVERY_MODULE or isinstance(getattr(type(module), attribute, None), property)
    if taken or not is_plain(getattr(module, attribute, None)) or not is_plain(value):
        raise ShapeError(
            f"{attribute!r} of module {name!r} is no plain attribute, or {value!r} no plain value; methods, submodules and tensors are not set"
        )


@dataclass(frozen=True)
class OutputFingerprint:
    """A network's answer to an input that every machine can make again.

    Attributes:
        shape: of the input.
        seed: of the input and of the projections.
        norm: of the output, all its tensors as one vector.
        projections: of the output onto vectors of random signs, each about as large as the norm.
    """

    shape: tuple[int, ...]
    seed: int
    norm: float
    projections: tuple[float, ...]

    @classmethod
    def of(cls, model: nn.Module, shape: Sequence[int], seed: int = 0) -> OutputFingerprint:
        """Run a network, or a copy of it where it is elsewhere than on the CPU in float32; modes and random state are left as they were.

        Args:
            model: takes one float tensor and gives tensors, alone or in tuples and mappings.
            shape: of the input.
            seed: of input and projections.

        Raises:
            OptionError: the network does not take such an input.
            NonFiniteError: NaN or Inf in the output.

        Example:
            >>> model = nn.Linear(3, 2)
            >>> probe = OutputFingerprint.of(model, (1, 3))
            >>> probe.check(OutputFingerprint.of(model, (1, 3)), "the model")
            >>> len(probe.projections)
            8
        """
        model = unwrap_model(model)
        if any(
            tensor.is_floating_point() and (tensor.device.type, tensor.dtype) != ("cpu", torch.float32)
            for tensor in model.state_dict().values()
        ):
            model = copy.deepcopy(model).cpu().float()
        numbers = hash_unit(np.arange(math.prod(shape)), seed)
        # Mean 0, variance 1
        example = torch.from_numpy((numbers - 0.5) * math.sqrt(12)).float().view(tuple(shape))
        with preserve_state(model), torch.no_grad(), torch.autocast("cpu", enabled=False):
            try:
                output = model(example)
            except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
                reason = str(error).partition("\n")[0]
                raise OptionError(
                    f"{type(model).__name__} does not take the probe, a float tensor of shape {tuple(shape)} ({type(error).__name__}: {reason})."
                ) from error
        vector = torch.cat([tensor.double().flatten() for tensor in _tensors(output)])
        if not vector.isfinite().all():
            raise NonFiniteError(
                f"the output of {type(model).__name__} for the probe input of shape {tuple(shape)} is not finite"
            )
        return cls(
            tuple(shape),
            seed,
            float(vector.norm()),
            tuple(_projection(vector, seed, 1 + row) for row in range(NUM_PROJECTIONS)),
        )

    def check(self, other: OutputFingerprint, what: str) -> None:
        """Compare with the probe of another network.

        Args:
            other: what arrived.
            what: for the message.

        Raises:
            FormatError: the outputs differ by more than 1e-4 of their norm.
        """
        pairs = zip((self.norm, *self.projections), (other.norm, *other.projections), strict=True)
        off = max(abs(mine - theirs) for mine, theirs in pairs) / max(self.norm, 1e-12)
        if not off <= FINGERPRINT_TOLERANCE:
            raise FormatError(
                f"{what} does not compute what the pruned network computed: for the probe input of shape {self.shape} an output of norm "
                f"{self.norm:.6g} was expected and {other.norm:.6g} arrived; they differ by {off:.2g} of it, at most {FINGERPRINT_TOLERANCE:g} is rounding."
            )


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of the names.

    Example:
        >>> weights_hash({"a": torch.zeros(2)}) == weights_hash({"a": torch.zeros(1, 2)})
        False
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _projection(vector: Tensor, seed: int, stream: int) -> float:
    signs = torch.from_numpy(np.sign(hash_unit(np.arange(len(vector)), seed, stream) - 0.5))
    return float(vector @ signs)


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (list, tuple)) and output:
        return [tensor for entry in output for tensor in _tensors(entry)]
    raise InputTypeError(
        f"expected a network that gives tensors, alone or in tuples and mappings, got {type(output).__name__}"
    )
