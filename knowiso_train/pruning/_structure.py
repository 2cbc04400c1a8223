"""Structural differences between models, and fingerprints of their outputs."""

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
from knowiso_train.features.state import preserve_state
from knowiso_train.features.wrappers import unwrap_model
from knowiso_train.utils.batch import tensor_leaves
from knowiso_train.utils.hashing import hash_unit

# Attributes of every module, such as `training`, are no structure
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
_MISSING = object()

NUM_PROJECTIONS = 8
# Largest difference of two fingerprints, relative to the norm of the output
OUTPUT_TOLERANCE = 1e-4
MAX_INPUT_NUMBERS = 2**26  # of the input of a fingerprint, 512 MiB of its random numbers


@dataclass(frozen=True)
class StructureDiff:
    """Structure of a pruned model that differs from its original's, besides the shapes of tensors.

    Attributes:
        attributes: Changed plain attributes by module name, such as `in_channels`, `num_heads` and `normalized_shape`.
        added: Parameters that the original lacks, such as biases that absorbed a mean.
        removed: Parameters of the original that the pruned model lacks.
    """

    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)


def is_plain(value: Any) -> bool:
    """Return True for numbers, strings, booleans, None, and lists and tuples of them: values that JSON can hold."""
    if type(value) in (list, tuple, torch.Size):
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def structure_diff(original: nn.Module, pruned: nn.Module) -> StructureDiff:
    """Return the changes of attributes and parameters from the original to the pruned model.

    Args:
        original: Model before pruning; not modified.
        pruned: Model after pruning; not modified.

    Raises:
        ShapeError: Modules that differ in name or class, which is more than widths.

    Examples:
        >>> diff = structure_diff(nn.Sequential(nn.Linear(3, 2, bias=False)), nn.Sequential(nn.Linear(3, 1)))
        >>> diff.attributes, diff.added
        ({'0': {'out_features': 1}}, ['0.bias'])
    """
    before, after = dict(unwrap_model(original).named_modules()), dict(unwrap_model(pruned).named_modules())
    for name in [*before, *after]:
        old, new = (type(modules[name]).__name__ if name in modules else "absent" for modules in (before, after))
        if old != new:
            raise ShapeError(
                f"module {name!r} is {old} in the original and {new} in the pruned model; expected models that differ "
                "in widths only. Pass the model that was pruned as the original, or factory=(name, arguments) with all "
                "arguments that built it"
            )
    attributes = {name: changed for name in before if (changed := _changed_attributes(before[name], after[name]))}
    parameters, pruned_parameters = _parameters(original), _parameters(pruned)
    return StructureDiff(
        attributes,
        added=[name for name in pruned_parameters if name not in parameters],
        removed=[name for name in parameters if name not in pruned_parameters],
    )


def state_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the state dict."""
    return {name: tuple(value.shape) for name, value in unwrap_model(model).state_dict().items()}


def apply_structure(model: nn.Module, diff: StructureDiff, shapes: Mapping[str, Sequence[int]]) -> nn.Module:
    """Give a freshly built model the structure of a pruned one, without tracing or a forward pass.

    Args:
        model: Model of the original's structure; changed in place.
        diff: Changes from `structure_diff`.
        shapes: Shapes of the pruned model's tensors, from `state_shapes`. Tensors of another shape are replaced by
            uninitialized ones.

    Returns:
        The model.

    Raises:
        ShapeError: Changes of modules, attributes or tensors that the model lacks.

    Examples:
        >>> pruned = nn.Sequential(nn.Linear(3, 1))
        >>> fresh = nn.Sequential(nn.Linear(3, 2, bias=False))
        >>> apply_structure(fresh, structure_diff(fresh, pruned), state_shapes(pruned))
        Sequential(
          (0): Linear(in_features=3, out_features=1, bias=True)
        )
    """
    inner = unwrap_model(model)
    modules = dict(inner.named_modules(remove_duplicate=False))
    for name, values in diff.attributes.items():
        for attribute, value in values.items():
            _check_attribute(modules.get(name), name, attribute, value)
            setattr(modules[name], attribute, value)
    for name in diff.removed:
        module, leaf = _owner(modules, name)
        module.register_parameter(leaf, None)
    for name in diff.added:
        module, leaf = _owner(modules, name)
        if name not in shapes or (name not in _parameters(inner) and getattr(module, leaf, None) is not None):
            raise ShapeError(
                f"parameter {name!r} cannot be added to {type(inner).__name__}: it has no shape, or its name is taken"
            )
        like = next(inner.parameters(), torch.empty(0))
        setattr(module, leaf, nn.Parameter(like.new_empty(tuple(shapes[name]))))
    _resize_tensors(inner, modules, shapes)
    return model


def restore_memory_format(model: nn.Module, original: nn.Module) -> None:
    """Give weights the memory format channels_last where the original's are in it; cutting channels may lose it.

    Args:
        model: Pruned model, changed in place.
        original: Model before pruning.
    """
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    originals = _parameters(original)
    for name, parameter in _parameters(model).items():
        old, memory_format = originals.get(name), formats.get(parameter.ndim)
        # Weights of one position or one channel are in both formats
        if old is None or memory_format is None or old.ndim != parameter.ndim or old.is_contiguous():
            continue
        if old.is_contiguous(memory_format=memory_format):
            parameter.data = parameter.data.contiguous(memory_format=memory_format)


def _resize_tensors(model: nn.Module, modules: Mapping[str, nn.Module], shapes: Mapping[str, Sequence[int]]) -> None:
    """Replace parameters and buffers of other shapes by uninitialized ones."""
    tensors: dict[str, Tensor] = dict(
        [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    )
    # By identity of the old tensor, so that tied parameters stay tied
    replacements: dict[int, Tensor] = {}
    for name, shape in shapes.items():
        if name not in tensors:
            raise ShapeError(f"{type(model).__name__} has no parameter or buffer {name!r} for the shape {tuple(shape)}")
        old = tensors[name]
        if tuple(old.shape) == tuple(shape):
            continue
        module, leaf = _owner(modules, name)
        new = replacements.get(id(old))
        if new is None or new.shape != torch.Size(shape):
            new = old.detach().new_empty(tuple(shape))
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            replacements[id(old)] = new
        setattr(module, leaf, new)


def _changed_attributes(before: nn.Module, after: nn.Module) -> dict[str, Any]:
    old, new = vars(before), vars(after)
    return {
        name: value
        for name, value in new.items()
        if name not in _MODULE_ATTRIBUTES
        and is_plain(value)
        and (name not in old or is_plain(old[name]))
        and _with_type(value) != _with_type(old.get(name, _MISSING))
    }


def _with_type(value: Any) -> Any:
    """Return a value that compares with its type: 1, 1.0 and True differ, as do (1,) and [1]."""
    return (type(value), tuple(map(_with_type, value)) if isinstance(value, (list, tuple)) else value)


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(unwrap_model(model).named_parameters(remove_duplicate=False))


def _owner(modules: Mapping[str, nn.Module], name: str) -> tuple[nn.Module, str]:
    """Return the module of a tensor, and the tensor's name within it."""
    path, _, leaf = name.rpartition(".")
    if path not in modules:
        raise ShapeError(f"there is no module {path!r} for {name!r}; the model is not of the original's structure")
    return modules[path], leaf


def _check_attribute(module: nn.Module | None, name: str, attribute: str, value: Any) -> None:
    if module is None:
        raise ShapeError(
            f"there is no module {name!r} for the attribute {attribute!r}; the model is not of the original's structure"
        )
    is_reserved = attribute in _MODULE_ATTRIBUTES or isinstance(getattr(type(module), attribute, None), property)
    if is_reserved or not is_plain(getattr(module, attribute, None)) or not is_plain(value):
        raise ShapeError(
            f"{attribute!r} of module {name!r} is no plain attribute, or {value!r} no plain value. Methods, submodules "
            "and tensors cannot be set"
        )


@dataclass(frozen=True)
class OutputFingerprint:
    """Norm and random projections of a model's output for a reproducible pseudo-random input.

    Attributes:
        shape: Shape of the input.
        seed: Seed of the input and of the projections.
        norm: Norm of the output, all its tensors as one vector.
        projections: Products of this vector with vectors of random signs, each about as large as the norm.
    """

    shape: tuple[int, ...]
    seed: int
    norm: float
    projections: tuple[float, ...]

    @classmethod
    def compute(cls, model: nn.Module, shape: Sequence[int], seed: int = 0) -> OutputFingerprint:
        """Run a model on the CPU in float32, as a copy if it is elsewhere; modes and random state are preserved.

        Args:
            model: Model of one float tensor, whose output holds tensors, see `tensor_leaves`.
            shape: Shape of the input.
            seed: Seed of the input and of the projections.

        Raises:
            OptionError: The model does not take such an input.
            NonFiniteError: NaN or Inf in the output.

        Examples:
            >>> model = nn.Linear(3, 2)
            >>> fingerprint = OutputFingerprint.compute(model, (1, 3))
            >>> fingerprint.check_equal(OutputFingerprint.compute(model, (1, 3)), "the model")
            >>> len(fingerprint.projections)
            8
        """
        model = unwrap_model(model)
        if not all(type(side) is int and side >= 0 for side in shape) or math.prod(shape) > MAX_INPUT_NUMBERS:
            raise OptionError(
                f"expected the shape of an input of at most {MAX_INPUT_NUMBERS} numbers, got {tuple(shape)}; use a "
                "smaller batch or image."
            )
        if any(
            tensor.is_floating_point() and (tensor.device.type, tensor.dtype) != ("cpu", torch.float32)
            for tensor in model.state_dict().values()
        ):
            model = copy.deepcopy(model).cpu().float()
        # Hashed numbers are equal on every machine. A uniform variable of width √12 has variance 1
        uniform = hash_unit(np.arange(math.prod(shape)), seed)
        example = torch.from_numpy((uniform - 0.5) * math.sqrt(12)).float().view(tuple(shape))
        with preserve_state(model), torch.no_grad(), torch.autocast("cpu", enabled=False):
            try:
                output = model(example)
            except Exception as error:
                reason = str(error).partition("\n")[0]
                raise OptionError(
                    f"{type(model).__name__} does not take a float tensor of shape {tuple(shape)} "
                    f"({type(error).__name__}: {reason})."
                ) from error
        tensors = tensor_leaves(output)
        if not tensors:
            raise InputTypeError(f"expected a model whose output holds a tensor, got {type(output).__name__}")
        vector = torch.cat([tensor.double().flatten() for tensor in tensors])
        if not vector.isfinite().all():
            raise NonFiniteError(
                f"the output of {type(model).__name__} for an input of shape {tuple(shape)} is not finite"
            )
        projections = tuple(_project(vector, seed, stream) for stream in range(1, NUM_PROJECTIONS + 1))
        return cls(tuple(shape), seed, float(vector.norm()), projections)

    def check_equal(self, other: OutputFingerprint, name: str) -> None:
        """Compare with the fingerprint of another model.

        Args:
            other: Fingerprint of that model.
            name: Name of that model in the error message.

        Raises:
            FormatError: The outputs differ by more than 1e-4 of their norm.
        """
        pairs = zip((self.norm, *self.projections), (other.norm, *other.projections), strict=True)
        difference = max(abs(expected - value) for expected, value in pairs) / max(self.norm, 1e-12)
        # Written so that NaN fails
        if not difference <= OUTPUT_TOLERANCE:
            raise FormatError(
                f"{name} does not compute what the pruned model computed: for an input of shape {self.shape} the "
                f"expected norm of the output is {self.norm:.6g}, got {other.norm:.6g}; outputs differ by "
                f"{difference:.2g} of it, and rounding by at most {OUTPUT_TOLERANCE:g}."
            )


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and bytes, in the order of the names.

    Examples:
        >>> weights_hash({"a": torch.zeros(2)}) == weights_hash({"a": torch.zeros(1, 2)})
        False
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _project(vector: Tensor, seed: int, stream: int) -> float:
    signs = torch.from_numpy(np.sign(hash_unit(np.arange(len(vector)), seed, stream) - 0.5))
    return float(vector @ signs)
