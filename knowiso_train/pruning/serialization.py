"""Saving and loading of pruned models."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from knowiso_train.errors import DataError, FormatError, InputTypeError, NonFiniteError, OptionError, ShapeError
from knowiso_train.features.modules import unwrap_model
from knowiso_train.pruning.kept_indices import KeptIndices, index_kept, to_axis_indices
from knowiso_train.pruning.model_factory import (
    Factory,
    build_model,
    first_shape_difference,
    input_shape,
    resolve_factory,
)
from knowiso_train.pruning.structure import (
    OutputFingerprint,
    StructureDiff,
    apply_structure,
    is_plain,
    state_shapes,
    structure_diff,
    weights_hash,
)
from knowiso_train.utils.environment import library_versions
from knowiso_train.utils.serialization import dump_json, parse_json, replace_file, write_file

PRUNED_FORMAT_VERSION = 1
PRUNED_WEIGHTS_FILE, PRUNED_DESCRIPTION_FILE = "model.safetensors", "pruned.json"
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
    """Save a pruned model as `model.safetensors` and `pruned.json`; `load_pruned` needs no pruning library.

    The model is rebuilt from the description before it is written, so that one that could not be loaded is rejected.

    Args:
        folder: Folder of both files, created if missing. Each file of an earlier save is replaced atomically.
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

    Example:
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
    _write_folder(Path(folder), description, weights)


def load_pruned(folder: str | Path, *, model: nn.Module | None = None) -> nn.Module:
    """Build a saved pruned model: a plain module on the CPU, in eval mode.

    Weights are checked by their hash, and the output for a pseudo-random input within rounding.

    Args:
        folder: Folder written by `save_pruned`.
        model: Fresh original, for models saved with factory="external"; changed in place and returned. Default: built
            by timm.

    Raises:
        DataError: Missing files.
        FormatError: Damaged files, a newer format, or a model of another structure or function.
        OptionError: No `model` although one is needed, or an architecture that the installed timm lacks.

    Example:
        >>> import tempfile
        >>> make = lambda width: nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pruned(folder, make(2), make(8), factory="external", example=(1, 3))
        ...     load_pruned(folder, model=make(8))[0]
        Linear(in_features=3, out_features=2, bias=True)
    """
    folder = Path(folder)
    description, weights = _read_folder(folder)
    if model is None:
        if description["factory"] is None:
            raise OptionError(
                f"{folder} has a {description['class']} that no factory builds. Pass model=, a fresh model as it was "
                "before pruning"
            )
        model = build_model(_factory_from_json(description["factory"], folder))
    elif not isinstance(model, nn.Module):
        raise InputTypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    try:
        return _rebuild(model, description, weights, str(folder))
    except FormatError as error:
        raise FormatError(f"{error} {_version_differences(description['versions'])}".rstrip()) from error
    except (ShapeError, OptionError, NonFiniteError) as error:
        versions = _version_differences(description["versions"])
        raise FormatError(f"{folder} cannot be built: {error} {versions}".rstrip()) from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise FormatError(
            f"{folder / PRUNED_DESCRIPTION_FILE} is damaged, it does not describe a pruned model "
            f"({type(error).__name__}: {error})"
        ) from error


def load_kept_indices(folder: str | Path) -> dict[str, KeptIndices] | None:
    """Return the kept indices of a saved model, as of `to_axis_indices`; None if they were not saved.

    Raises:
        DataError: Missing file.
        FormatError: A damaged file or a newer format.
    """
    kept = _read_description(Path(folder))["kept"]
    if kept is None:
        return None
    return {name: torch.tensor(value["flat"]) if isinstance(value, dict) else value for name, value in kept.items()}


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
        description: Content of `pruned.json`.
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
    state = dict(weights) | {name: weights[source] for name, source in description["tied"].items()}
    shapes = {name: tuple(shape) for name, shape in description["shapes"].items()}
    if shapes != {name: tuple(value.shape) for name, value in state.items()}:
        raise FormatError(f"the weights of {label} do not have the shapes of its description. Save or copy both again.")
    apply_structure(inner, _structure_from_json(description), description["shapes"])
    try:
        # Assigned, not copied: the saved types replace those of the fresh model
        inner.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise FormatError(f"the weights of {label} do not fit the model of its description: {error}") from error
    for name, source in description["tied"].items():
        path, _, leaf = name.rpartition(".")
        setattr(inner.get_submodule(path), leaf, inner.get_parameter(source))
    saved = description["fingerprint"]
    expected = OutputFingerprint(tuple(saved["shape"]), saved["seed"], saved["norm"], tuple(saved["projections"]))
    expected.check_equal(OutputFingerprint.compute(inner, expected.shape, expected.seed), label)
    return model.eval()


def _tied_parameters(model: nn.Module) -> dict[str, str]:
    """Return the first name of each parameter that has several, by its other names."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: source for name, value in named if (source := first.setdefault(id(value), name)) != name}


def _write_folder(folder: Path, description: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write both files atomically, the description last."""
    from safetensors.torch import save_file

    # Clones share no memory, which safetensors rejects
    weights = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()
    }
    content = {"format_version": PRUNED_FORMAT_VERSION, **description, "sha256": weights_hash(weights)}
    text = dump_json(content) + "\n"
    with replace_file(folder / PRUNED_WEIGHTS_FILE) as partial:
        save_file(weights, partial, metadata={"format": "pt"})
    write_file(folder / PRUNED_DESCRIPTION_FILE, text)


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and check both files.

    Raises:
        DataError: Missing files.
        FormatError: Damaged files, files of two different saves, or a newer format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    description = _read_description(folder)
    path = folder / PRUNED_WEIGHTS_FILE
    try:
        weights = load_file(path)
    except FileNotFoundError as error:
        raise DataError(f"{path} is not there; expected it beside {PRUNED_DESCRIPTION_FILE}") from error
    except SafetensorError as error:
        raise FormatError(
            f"{path} is damaged, it is no complete safetensors file ({error}). Save or copy it again"
        ) from error
    digest, expected = weights_hash(weights), description["sha256"]
    if digest != expected:
        raise FormatError(
            f"{path} does not hold the weights that {PRUNED_DESCRIPTION_FILE} was written for: expected SHA-256 "
            f"{expected[:12]}…, got {digest[:12]}…. Save or copy both files again"
        )
    return description, weights


def _read_description(folder: Path) -> dict[str, Any]:
    """Read and check `pruned.json`.

    Raises:
        DataError: Missing file.
        FormatError: A damaged file or a newer format.
    """
    path = folder / PRUNED_DESCRIPTION_FILE
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"{path} is not there; expected a folder with {PRUNED_WEIGHTS_FILE} and {PRUNED_DESCRIPTION_FILE}, written "
            "by save_pruned"
        ) from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise FormatError(f"{path} is damaged, it is no JSON ({error}). Save or copy it again") from error
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


def _factory_from_json(content: Mapping[str, Any], folder: Path) -> Factory:
    name, arguments = content.get("name"), content.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise FormatError(f"{folder / PRUNED_DESCRIPTION_FILE} is damaged: its factory is {content!r}")
    return name, {key: _decode(value) for key, value in arguments.items()}


def _encode(value: Any, label: str) -> Any:
    """Convert a plain value to JSON that distinguishes tuples and `torch.Size` from lists.

    Raises:
        OptionError: Not a plain value.

    Example:
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
