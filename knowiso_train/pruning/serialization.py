"""Saving and loading of pruned models."""

from __future__ import annotations

import copy
import math
import operator
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from knowiso_train.errors import DataError, FormatError, InputTypeError, NonFiniteError, OptionError, ShapeError
from knowiso_train.features.wrappers import unwrap_model
from knowiso_train.pruning._model_factory import (
    Factory,
    build_model,
    first_shape_difference,
    input_shape,
    resolve_factory,
)
from knowiso_train.pruning._structure import (
    OutputFingerprint,
    StructureDiff,
    apply_structure,
    is_plain,
    state_shapes,
    structure_diff,
    weights_hash,
)
from knowiso_train.pruning.kept_indices import KeptIndices, index_kept, to_axis_indices
from knowiso_train.utils.environment import library_versions
from knowiso_train.utils.serialization import read_description, read_tensors, write_tensors

PRUNED_FORMAT_VERSION = 1
PRUNED_FILE = "model.safetensors"
# Largest number of weights of an original, relative to those of the pruned model, and in any case allowed. A file
# beyond it is damaged: building its original could exceed the memory
MAX_ORIGINAL_RATIO, MIN_MAX_ORIGINAL_WEIGHTS = 1024, 2**24
# Integers among the arguments of a factory, such as an image size, may be as large as a dimension of the original or
# as this
MAX_FACTORY_INTEGER = 4096
DESCRIPTION_FIELDS: dict[str, type | tuple[type, ...]] = {
    "factory": (dict, type(None)),
    "class": str,
    "versions": dict,
    "original_shapes": dict,
    "shapes": dict,
    "attributes": dict,
    "added": list,
    "removed": list,
    "tied": dict,
    "kept": (dict, type(None)),
    "metadata": dict,
    "fingerprint": dict,
    "sha256": str,
}


def save_pruned(
    folder: str | Path,
    pruned: nn.Module,
    original: nn.Module,
    *,
    factory: tuple[str, Mapping[str, Any]] | Literal["external"] | None = None,
    kept: Mapping[str, KeptIndices] | None = None,
    example: Tensor | Sequence[int] | None = None,
) -> None:
    """Save a pruned model as `model.safetensors`; `load_pruned` needs no pruning library.

    The file holds the state dict, and as a text entry the description that `load_pruned` builds the model from.

    The model is rebuilt from the description before it is written, so that one that could not be loaded is rejected.

    Args:
        folder: Folder of the file, created if missing. The file of an earlier save is replaced atomically.
        pruned: Pruned model, trained since or not.
        original: Model before pruning. Only its structure is used, hence a freshly built one suffices.
        factory: Name and arguments of `timm.create_model`. Default: architecture and number of classes recorded in the
            original. "external": a model that timm does not build; `load_pruned` then takes a fresh original.
        kept: Kept indices, from `prune` or `track_kept_indices`; see `load_kept_indices`.
        example: Input for the check of the output, or its shape; always one float tensor. Default: the input size of a
            timm model.

    Raises:
        OptionError: A factory that does not build the original, arguments that JSON cannot hold, or a wrong `example`.
        ShapeError: Models that differ in more than widths, or `kept` that does not fit them.
        NonFiniteError: NaN or Inf in the output.
        FormatError: The rebuilt model differs from the pruned one.

    Examples:
        >>> import tempfile
        >>> from knowiso_train.loading.timm import load_model
        >>> pruned = load_model("test_resnet", pretrained=False, num_classes=4)
        >>> block = pruned.layer1[0]
        >>> with torch.no_grad():
        ...     for layer in (block.conv1, block.bn1):
        ...         layer.weight = nn.Parameter(layer.weight[:16])
        ...     block.bn1.bias = nn.Parameter(block.bn1.bias[:16])
        ...     block.bn1.running_mean, block.bn1.running_var = block.bn1.running_mean[:16], block.bn1.running_var[:16]
        ...     block.conv2.weight = nn.Parameter(block.conv2.weight[:, :16])
        >>> block.conv1.out_channels = block.bn1.num_features = block.conv2.in_channels = 16
        >>> original = load_model("test_resnet", pretrained=False, num_classes=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pruned(folder, pruned, original, example=(1, 3, 32, 32))
        ...     load_pruned(folder).layer1[0].conv1
        Conv2d(32, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)
    """
    pruned, original = unwrap_model(pruned), unwrap_model(original)
    resolved = resolve_factory(original, factory)
    fresh = copy.deepcopy(original) if resolved is None else _build_original(resolved, original)
    shape = tuple(example.shape if isinstance(example, Tensor) else example or input_shape(original))
    state, tied = pruned.state_dict(), _tied_parameters(pruned)
    weights = {name: value for name, value in state.items() if name not in tied}
    description = {
        "factory": None if resolved is None else _factory_to_json(resolved),
        "class": type(original).__name__,
        "versions": library_versions(),
        **_structure_to_json(fresh, pruned),
        "tied": tied,
        "kept": None if kept is None else _kept_to_json(kept, state_shapes(fresh), state),
        "metadata": _state_metadata(pruned),
        "fingerprint": vars(_fingerprint(pruned, shape)),
    }
    try:
        copies = {name: value.detach().cpu().clone() for name, value in weights.items()}
        _rebuild(fresh, description, copies, "the rebuilt model")
    except FormatError as error:
        raise FormatError(
            f"{error} Something besides shapes and plain attributes was changed by hand: build the original with it "
            'and pass factory="external", or factory=(name, arguments) that build it'
        ) from error
    content = {"format_version": PRUNED_FORMAT_VERSION, **description, "sha256": weights_hash(weights)}
    write_tensors(Path(folder) / PRUNED_FILE, weights, content)


def load_pruned(folder: str | Path, *, model: nn.Module | None = None) -> nn.Module:
    """Build a saved pruned model: a plain module on the CPU, in eval mode.

    Weights are checked by their hash, and the output for a pseudo-random input within rounding.

    Args:
        folder: Folder written by `save_pruned`.
        model: Fresh original, for models saved with factory="external"; changed in place and returned. Default: built
            by timm.

    Raises:
        DataError: Missing file.
        FormatError: A damaged file, a newer format, or a model of another structure or function.
        OptionError: No `model` although one is needed, or an architecture that the installed timm lacks.

    Examples:
        >>> import tempfile
        >>> make = lambda width: nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pruned(folder, make(2), make(8), factory="external", example=(1, 3))
        ...     load_pruned(folder, model=make(8))[0]
        Linear(in_features=3, out_features=2, bias=True)
    """
    path = Path(folder) / PRUNED_FILE
    weights, description = _read_pruned(path)
    if model is None:
        if description["factory"] is None:
            raise OptionError(
                f"{path} has a {description['class']} that no factory builds. Pass model=, a fresh model as it was "
                "before pruning"
            )
        model = build_model(_factory_from_json(description, weights, path))
    elif not isinstance(model, nn.Module):
        raise InputTypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    try:
        return _rebuild(model, description, weights, str(path))
    except (FormatError, ShapeError, OptionError, NonFiniteError) as error:
        label = "" if str(path) in str(error) else f"{path} cannot be built: "
        versions = _version_differences(description["versions"])
        raise FormatError(f"{label}{error} {versions}".rstrip()) from error
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, ArithmeticError, MemoryError) as error:
        raise FormatError(
            f"{path} is damaged, it does not describe a pruned model ({type(error).__name__}: {error}). "
            "Save or copy it again"
        ) from error


def load_kept_indices(folder: str | Path) -> dict[str, KeptIndices] | None:
    """Return the kept indices of a saved model, as of `to_axis_indices`; None if they were not saved.

    Raises:
        DataError: Missing file.
        FormatError: A damaged file or a newer format.
    """
    path = Path(folder) / PRUNED_FILE
    kept = _check_description(read_description(_existing(path)), path)["kept"]
    if kept is None:
        return None
    try:
        indices = {name: _kept_from_json(value) for name, value in kept.items()}
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise FormatError(f"{path} is damaged, its kept indices are no integers ({error}). Save it again") from error
    return indices


def _build_original(factory: Factory, original: nn.Module) -> nn.Module:
    """Build the original with timm, and check its structure.

    Raises:
        OptionError: A model of other shapes.
    """
    fresh = build_model(factory)
    if difference := first_shape_difference(fresh, state_shapes(original)):
        arguments = "".join(f", {name}={value!r}" for name, value in factory[1].items())
        raise OptionError(
            f"timm.create_model({factory[0]!r}{arguments}) does not make the original: {difference}. Pass "
            'factory=(name, arguments) with all arguments, or factory="external" and a fresh model to load_pruned; '
            "for a model that was pruned twice, pass the model before both as the original"
        )
    return fresh


def _fingerprint(pruned: nn.Module, shape: Sequence[int]) -> OutputFingerprint:
    try:
        return OutputFingerprint.compute(pruned, shape)
    except OptionError as error:
        raise OptionError(f"{error} Pass an accepted input, or its shape, with example=") from error


def _rebuild(model: nn.Module, description: Mapping[str, Any], weights: Mapping[str, Tensor], label: str) -> nn.Module:
    """Turn a fresh original into the described pruned model, in place.

    Args:
        model: Fresh original.
        description: Description that was saved with the weights.
        weights: Tensors of `model.safetensors`.
        label: Name of the pruned model in error messages.

    Raises:
        FormatError: A model of another structure or function than the description's.
    """
    inner = unwrap_model(model).cpu()
    if difference := first_shape_difference(inner, description["original_shapes"]):
        raise FormatError(
            f"the {type(inner).__name__} is not built as the original of {label}, a {description['class']}: "
            f"{difference}. Pass model=, a fresh model built as the original was."
        )
    state = OrderedDict(weights) | {name: weights[source] for name, source in description["tied"].items()}
    # load_state_dict hands the metadata of this name to the modules
    state._metadata = description["metadata"]  # type: ignore[attr-defined]
    shapes = {name: tuple(shape) for name, shape in description["shapes"].items()}
    _check_attributes(inner, description, label)
    if shapes != {name: tuple(value.shape) for name, value in state.items()}:
        raise FormatError(f"the weights of {label} do not have the shapes of its description. Save or copy both again.")
    apply_structure(inner, _structure_from_json(description), description["shapes"])
    try:
        # Assigned, not copied: the saved types replace those of the fresh model
        inner.load_state_dict(state, strict=True, assign=True)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise FormatError(f"the weights of {label} do not fit the model of its description: {error}") from error
    for name, source in description["tied"].items():
        path, _, leaf = name.rpartition(".")
        setattr(inner.get_submodule(path), leaf, inner.get_parameter(source))
    saved = description["fingerprint"]
    expected = OutputFingerprint(tuple(saved["shape"]), saved["seed"], saved["norm"], tuple(saved["projections"]))
    expected.check_equal(OutputFingerprint.compute(inner, expected.shape, expected.seed), label)
    return model.eval()


def _check_attributes(model: nn.Module, description: Mapping[str, Any], label: str) -> None:
    """Check that no integer attribute is larger than both the original's value and every size of its tensors.

    A larger padding or stride of a damaged file would exceed the memory in the first forward.

    Raises:
        FormatError: A larger integer.
    """
    sizes = [side for shape in description["original_shapes"].values() for side in shape]
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, values in description["attributes"].items():
        for name, value in values.items():
            original = getattr(modules.get(path), name, 0)
            maximum = max([1, _largest_integer(original), *sizes])
            if (integer := _largest_integer(_decode(value))) > maximum:
                raise FormatError(
                    f"the attribute {name!r} of module {path!r} of {label} is {integer:.4g}, above the original's and "
                    "above every size of its tensors. Save or copy it again"
                )


def _state_metadata(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the metadata of the state dict by module, such as the version of its tensors' layout."""
    metadata: Mapping[str, Mapping[str, Any]] = getattr(model.state_dict(), "_metadata", {})
    return {
        module: {key: value for key, value in values.items() if is_plain(value)} for module, values in metadata.items()
    }


def _tied_parameters(model: nn.Module) -> dict[str, str]:
    """Return the first name of each parameter that has several, by its other names."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: source for name, value in named if (source := first.setdefault(id(value), name)) != name}


def _existing(path: Path) -> Path:
    if not path.exists():
        raise DataError(f"{path} is not there; expected a folder with {PRUNED_FILE}, written by save_pruned")
    return path


def _read_pruned(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read and check the file of a pruned model.

    Raises:
        DataError: Missing file.
        FormatError: A damaged file or a newer format.
    """
    weights, description = read_tensors(_existing(path))
    description = _check_description(description, path)
    digest, expected = weights_hash(weights), description["sha256"]
    if digest != expected:
        raise FormatError(
            f"{path} does not hold the weights that its description was written for: expected SHA-256 "
            f"{expected[:12]}…, got {digest[:12]}…. Save or copy it again"
        )
    return weights, description


def _check_description(content: Any, path: Path) -> dict[str, Any]:
    """Return the description of a pruned model, checked for version and fields.

    Raises:
        FormatError: A damaged file or a newer format.
    """
    version = content.get("format_version") if isinstance(content, dict) else None
    if type(version) is not int or version < 1:
        raise FormatError(
            f"{path} does not describe a pruned model: expected a format_version of 1 or more, got {version!r}"
        )
    if version > PRUNED_FORMAT_VERSION:
        versions = content.get("versions")
        writer = versions.get("knowiso_train", "a later version") if isinstance(versions, dict) else "a later version"
        raise FormatError(
            f"{path} has format version {version}, written by knowiso_train {writer}; this version supports up to "
            f"{PRUNED_FORMAT_VERSION}. Upgrade knowiso_train"
        )
    for key, kind in DESCRIPTION_FIELDS.items():
        if key not in content or not isinstance(content[key], kind):
            problem = type(content[key]).__name__ if key in content else "not there"
            raise FormatError(f"{path} is damaged: its field {key!r} is {problem}. Save or copy it again")
    return dict(content)


def _structure_to_json(original: nn.Module, pruned: nn.Module) -> dict[str, Any]:
    """Return the fields of the description that `_structure_from_json` and `_rebuild` take."""
    diff = structure_diff(original, pruned)
    return {
        "original_shapes": {name: list(shape) for name, shape in state_shapes(original).items()},
        "shapes": {name: list(shape) for name, shape in state_shapes(pruned).items()},
        "attributes": {
            module: {name: _encode(value, f"attribute {name!r} of module {module!r}") for name, value in values.items()}
            for module, values in diff.attributes.items()
        },
        "added": diff.added,
        "removed": diff.removed,
    }


def _structure_from_json(description: Mapping[str, Any]) -> StructureDiff:
    attributes = {
        module: {name: _decode(value) for name, value in values.items()}
        for module, values in description["attributes"].items()
    }
    return StructureDiff(attributes, description["added"], description["removed"])


def _kept_to_json(
    kept: Mapping[str, KeptIndices], original_shapes: Mapping[str, Sequence[int]], state: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Return kept indices as lists by name: one list per axis, or {"flat": nested lists}.

    Raises:
        ShapeError: Indices that do not lead from the original's shapes to those of the state.
    """
    content: dict[str, Any] = {}
    for name, value in kept.items():
        if name not in original_shapes or name not in state:
            raise ShapeError(f"kept names {name!r}, which is no tensor of both the original and the pruned model")
        shape = index_kept(torch.empty(tuple(original_shapes[name])), value).shape
        if shape != state[name].shape:
            raise ShapeError(
                f"kept leads to shape {tuple(shape)} of {name!r}, and the pruned model has {tuple(state[name].shape)}"
            )
        if isinstance(value, Tensor):
            value = to_axis_indices({name: value}, original_shapes)[name]
        if isinstance(value, Tensor):
            content[name] = {"flat": value.tolist()}
        else:
            content[name] = [axis if axis is None else list(map(int, axis)) for axis in value]
    return content


def _factory_to_json(factory: Factory) -> dict[str, Any]:
    name, arguments = factory
    encoded = {key: _encode(value, f"argument {key!r} of the factory") for key, value in arguments.items()}
    return {"name": name, "arguments": encoded}


def _kept_from_json(value: Any) -> KeptIndices:
    """Invert `_kept_to_json` for one tensor."""
    if isinstance(value, dict):
        return torch.tensor(value["flat"], dtype=torch.long)
    return [axis if axis is None else [operator.index(unit) for unit in axis] for axis in value]


def _factory_from_json(description: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path) -> Factory:
    """Return name and arguments of the original, if these and its shapes are plausible for the weights of the file.

    Raises:
        FormatError: A damaged factory, or an original that is too large.
    """
    content = description["factory"]
    name, arguments = content.get("name"), content.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise FormatError(f"{path} is damaged: its factory is {content!r}. Save or copy it again")
    try:
        shapes = [[operator.index(side) for side in shape] for shape in description["original_shapes"].values()]
    except TypeError as error:
        raise FormatError(f"{path} is damaged: a shape of the original is no list of integers ({error})") from error
    num_weights = sum(value.numel() for value in weights.values())
    largest = max(MIN_MAX_ORIGINAL_WEIGHTS, MAX_ORIGINAL_RATIO * num_weights)
    if sum(map(math.prod, shapes)) > largest:
        raise FormatError(f"{path} is damaged: expected an original of at most {largest} weights. Save it again")
    arguments = {key: _decode(value) for key, value in arguments.items()}
    maximum = max([MAX_FACTORY_INTEGER, len(shapes), *(side for shape in shapes for side in shape)])
    if (integer := _largest_integer(list(arguments.values()))) > maximum:
        raise FormatError(
            f"{path} is damaged: its factory has the argument {integer:.4g}, above every size of the original. "
            "Save or copy it again"
        )
    return name, arguments


def _largest_integer(value: Any) -> int:
    """Return the largest absolute value among the integers of nested lists and tuples, 0 without any."""
    if isinstance(value, (list, tuple)):
        return max(map(_largest_integer, value), default=0)
    return abs(value) if type(value) is int else 0


def _encode(value: Any, label: str) -> Any:
    """Convert a plain value to JSON that distinguishes tuples and `torch.Size` from lists.

    Raises:
        OptionError: Not a plain value.

    Examples:
        >>> _encode((1, [2, torch.Size([3])]), "it")
        {'tuple': [1, [2, {'size': [3]}]]}
        >>> _decode(_)
        (1, [2, torch.Size([3])])
    """
    if not is_plain(value):
        raise OptionError(
            f"{label} is {value!r}. Only numbers, strings, booleans, None, and lists and tuples of them can be saved"
        )
    if isinstance(value, (list, tuple)):
        entries = [_encode(entry, label) for entry in value]
        return entries if isinstance(value, list) else {"size" if isinstance(value, torch.Size) else "tuple": entries}
    return value


def _decode(value: Any) -> Any:
    """Invert `_encode`.

    Raises:
        FormatError: A value that `_encode` does not return.
    """
    if isinstance(value, list):
        return [_decode(entry) for entry in value]
    if isinstance(value, dict):
        if len(value) == 1 and isinstance(entries := value.get("tuple", value.get("size")), list):
            decoded = tuple(_decode(entry) for entry in entries)
            return torch.Size(decoded) if "size" in value else decoded
        raise FormatError(f'expected {{"tuple": […]}} or {{"size": […]}}, got {value!r}')
    return value


def _version_differences(saved: Mapping[str, str]) -> str:
    """Return a sentence on the libraries whose version differs from the saved one, empty if none does."""
    installed = library_versions()
    differences = [
        f"{name} {saved.get(name, '?')} (here {installed[name]})"
        for name in ("timm", "torch", "knowiso_train")
        if saved.get(name) != installed[name]
    ]
    return f"It was saved with {', '.join(differences)}." if differences else ""
