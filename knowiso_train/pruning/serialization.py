"""Saving and loading of pruned networks."""

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
from knowiso_train.pruning.model_factory import Factory, build_network, find_factory, input_shape, structure_difference
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
    "probe": dict,
    "sha256": str,
}


def _write_folder(folder: Path, description: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write both files; each appears under its name only when it is complete, the description last."""
    from safetensors.torch import save_file

    # No memory is shared
    own = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}
    content = {"format_version": PRUNED_FORMAT_VERSION, **description, "sha256": weights_hash(own)}
    text = dump_json(content) + "\n"
    with replace_file(folder / PRUNED_WEIGHTS_FILE) as partial:
        save_file(own, partial, metadata={"format": "pt"})
    write_file(folder / PRUNED_DESCRIPTION_FILE, text)


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and check both files.

    Raises:
        DataError: no such files.
        FormatError: damaged files, files of two different saves, or a newer format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    description = _read_description(folder)
    try:
        weights = load_file(folder / PRUNED_WEIGHTS_FILE)
    except FileNotFoundError as error:
        raise DataError(
            f"expected {PRUNED_WEIGHTS_FILE} beside {PRUNED_DESCRIPTION_FILE} in {folder}; it is not there"
        ) from error
    except SafetensorError as error:
        raise FormatError(
            f"{folder / PRUNED_WEIGHTS_FILE} is damaged, it is no complete safetensors file ({error}); save or copy it again"
        ) from error
    if (found := weights_hash(weights)) != description["sha256"]:
        raise FormatError(
            f"{folder / PRUNED_WEIGHTS_FILE} does not hold the weights that {PRUNED_DESCRIPTION_FILE} was written for: expected SHA-256 {description['sha256'][:12]}…, "
            f"got {found[:12]}…. A file is damaged, or comes from another save; save or copy both again"
        )
    return description, weights


def _read_description(folder: Path) -> dict[str, Any]:
    """Read and check `pruned.json` alone."""
    path = folder / PRUNED_DESCRIPTION_FILE
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"expected a folder that save_pruned wrote, with {PRUNED_WEIGHTS_FILE} and {PRUNED_DESCRIPTION_FILE}; {path} is not there"
        ) from error
    except ValueError as error:  # no JSON, or no text
        raise FormatError(f"{path} is damaged, it is no JSON ({error}); save or copy it again") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if type(version) is not int or version < 1:
        raise FormatError(
            f"{path} does not describe a pruned network: expected a format_version of 1 or more, got {version!r}"
        )
    if version > PRUNED_FORMAT_VERSION:
        versions = content.get("versions")
        written = versions.get("knowiso_train", "a later version") if isinstance(versions, dict) else "a later version"
        raise FormatError(
            f"{path} has format version {version}, written by knowiso_train {written}; this version reads up to {PRUNED_FORMAT_VERSION}. "
            "Upgrade knowiso_train"
        )
    for key, kind in DESCRIPTION_FIELDS.items():
        if key not in content or not isinstance(content[key], kind):
            raise FormatError(
                f"{path} is damaged: its field {key!r} is {'not there' if key not in content else type(content[key]).__name__}"
            )
    return dict(content)


def _encode(value: Any, what: str) -> Any:
    """Plain data as JSON that keeps tuples and `torch.Size` apart from lists.

    Raises:
        OptionError: not plain.

    Example:
        >>> _encode((1, [2, torch.Size([3])]), "it")
        {'tuple': [1, [2, {'size': [3]}]]}
        >>> _decode(_)
        (1, [2, torch.Size([3])])
    """
    if not is_plain(value):
        raise OptionError(
            f"{what} is {value!r}; only numbers, words, truth values, None, and lists and tuples of them can be saved"
        )
    if isinstance(value, (list, tuple)):
        entries = [_encode(entry, what) for entry in value]
        return entries if isinstance(value, list) else {"size" if isinstance(value, torch.Size) else "tuple": entries}
    return value


def _decode(value: Any) -> Any:
    """What `_encode` was given.

    Raises:
        FormatError: not made by `_encode`.
    """
    if isinstance(value, list):
        return [_decode(entry) for entry in value]
    if isinstance(value, dict):
        if len(value) == 1 and isinstance(entries := value.get("tuple", value.get("size")), list):
            made = tuple(_decode(entry) for entry in entries)
            return torch.Size(made) if "size" in value else made
        raise FormatError(f'expected {{"tuple": […]}} or {{"size": […]}}, got {value!r}')
    return value


def save_pruned(
    folder: str | Path,
    pruned: nn.Module,
    original: nn.Module,
    *,
    factory: tuple[str, Mapping[str, Any]] | Literal["external"] | None = None,
    kept: Mapping[str, KeptIndices] | None = None,
    example: Tensor | Sequence[int] | None = None,
) -> None:
    """Save a pruned network as `model.safetensors` and `pruned.json`, from which `load_pruned` builds it without a pruning library.

    What is written is loaded once before it is written, so that a network that could not come back is refused here and
    not there.

    Args:
        folder: made if it is not there; what an earlier save left in it is replaced, each file at once.
        pruned: the pruned network, trained since or not.
        original: the network before pruning; only its structure is read, so a freshly built one will do.
        factory: name in timm and arguments of `timm.create_model`; None reads architecture and number of classes off
            the original; "external" for a
            network that is not timm's, or not as timm makes it: `load_pruned` is then given a fresh original.
        kept: which entries of the original stayed, from `recording`, `kept_entries` or `to_axis_indices`;
            `load_kept_indices` reads them.
        example: an input, or its shape, for the check of the output; None is the input size of a timm network. Always
            one float tensor.

    Raises:
        OptionError: no timm architecture can be read off the original, or not one of these shapes; arguments that JSON
            does not hold; no such input.
        ShapeError: networks that differ in more than widths, or `kept` that does not fit them.
        NonFiniteError: NaN or Inf in the output.
        FormatError: what would be written does not come back as the same network.

    Example:
        >>> import tempfile
        >>> from knowiso_train.loading.timm import load_model
        >>> pruned = load_model("test_resnet", pretrained=False, num_classes=4)
        >>> block = pruned.layer1[0]
        >>> with torch.no_grad():
        ...     for layer in (block.conv1, block.bn1):
        ...         layer.weight = nn.Parameter(layer.weight[:16])
        ...     for layer, name in ((block.bn1, "bias"), (block.bn1, "running_mean"), (block.bn1, "running_var")):
        ...         setattr(layer, name, nn.Parameter(layer.bias[:16]) if name == "bias" else getattr(layer, name)[:16])
        ...     block.conv2.weight = nn.Parameter(block.conv2.weight[:, :16])
        >>> block.conv1.out_channels = block.bn1.num_features = block.conv2.in_channels = 16
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pruned(folder, pruned, load_model("test_resnet", pretrained=False, num_classes=4), example=(1, 3, 32, 32))
        ...     load_pruned(folder).layer1[0].conv1
        Conv2d(32, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)
    """
    pruned, original = unwrap_model(pruned), unwrap_model(original)
    made = find_factory(original, factory)
    skeleton = build_network(made) if made is not None else copy.deepcopy(original)
    if made is not None and (difference := structure_difference(skeleton, state_shapes(original))):
        words = "".join(f", {name}={value!r}" for name, value in made[1].items())
        raise OptionError(
            f"timm.create_model({made[0]!r}{words}) does not make the original: {difference}. Pass factory=(name, arguments) with all arguments that "
            'made it, or factory="external" and give load_pruned a fresh network. What was pruned twice is saved by save_pruned, with the network '
            "before both as the original"
        )
    before = state_shapes(skeleton)
    changes = structure_diff(skeleton, pruned)
    shape = tuple(example.shape if isinstance(example, Tensor) else example or input_shape(original))
    try:
        probe = OutputFingerprint.of(pruned, shape)
    except OptionError as error:
        raise OptionError(f"{error} Give one that it takes, or its shape, with example=") from error
    tied, state = _tied(pruned), pruned.state_dict()
    description = {
        "factory": None
        if made is None
        else {"name": made[0], "arguments": _encoded(made[1], "argument", "of the factory")},
        "class": type(original).__name__,
        "versions": library_versions(),
        "original_shapes": {name: list(value) for name, value in before.items()},
        "shapes": {name: list(value) for name, value in state_shapes(pruned).items()},
        "attributes": {
            name: _encoded(values, "attribute", f"of module {name!r}") for name, values in changes.attributes.items()
        },
        "added": changes.added,
        "removed": changes.removed,
        "tied": tied,
        "kept": None if kept is None else _kept_as_json(kept, before, state),
        "probe": vars(probe),
    }
    weights = {name: value for name, value in state.items() if name not in tied}
    try:
        _rebuild(
            skeleton,
            description,
            {name: value.detach().cpu().clone() for name, value in weights.items()},
            "the network that would be saved",
        )
    except FormatError as error:
        raise FormatError(
            f"{error} Something besides shapes and plain attributes was changed by hand: "
            'make the original with it and pass factory="external", or factory=(name, arguments) that make it'
        ) from error
    _write_folder(Path(folder), description, weights)


def load_pruned(folder: str | Path, *, model: nn.Module | None = None) -> nn.Module:
    """Build a saved pruned network: a plain module on the CPU, in eval mode.

    Weights are checked to the bit, and the output for a probe input within rounding.

    Args:
        folder: written by `save_pruned`.
        model: a fresh original, for networks that were saved with factory="external"; it is changed in place and
            returned. None builds it with timm.

    Raises:
        DataError: no such files.
        FormatError: damaged files, a newer format, a network that is not of the original's structure or computes
            something else.
        OptionError: no `model` where one is needed, or an architecture that this timm does not have.

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
    saved = description["factory"]
    if model is None:
        if saved is None:
            raise OptionError(
                f"{folder} holds a {description['class']} that no factory makes; pass model=, a fresh network as it was before pruning"
            )
        model = build_network(_factory_from_json(saved, folder))
    elif not isinstance(model, nn.Module):
        raise InputTypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    try:
        return _rebuild(model, description, weights, str(folder))
    except FormatError as error:
        raise FormatError(f"{error} {_versions_differ(description['versions'])}".rstrip()) from error
    except (ShapeError, OptionError, NonFiniteError) as error:
        raise FormatError(
            f"{folder} cannot be built: {error} {_versions_differ(description['versions'])}".rstrip()
        ) from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise FormatError(
            f"{folder / PRUNED_DESCRIPTION_FILE} is damaged, it does not describe a pruned network ({type(error).__name__}: {error})"
        ) from error


def load_kept_indices(folder: str | Path) -> dict[str, KeptIndices] | None:
    """Which entries of the original a saved network still has, as of `to_axis_indices`; None where this was not saved.

    Raises:
        DataError: no such file.
        FormatError: a damaged file or a newer format.
    """
    kept = _read_description(Path(folder))["kept"]
    if kept is None:
        return None
    return {name: torch.tensor(value["flat"]) if isinstance(value, dict) else value for name, value in kept.items()}


def _rebuild(model: nn.Module, description: Mapping[str, Any], weights: Mapping[str, Tensor], what: str) -> nn.Module:
    inner = unwrap_model(model).cpu()
    if difference := structure_difference(inner, description["original_shapes"]):
        raise FormatError(
            f"the {type(inner).__name__} is not built as the original of {what}, a {description['class']}: {difference}. "
            "Pass model=, a fresh network made as the original was."
        )
    full = dict(weights) | {name: weights[of] for name, of in description["tied"].items()}
    if {name: tuple(shape) for name, shape in description["shapes"].items()} != {
        name: tuple(value.shape) for name, value in full.items()
    }:
        raise FormatError(
            f"the weights of {what} do not have the shapes of its description; a file is damaged, save or copy both again."
        )
    attributes = {
        module: {name: _decode(value) for name, value in values.items()}
        for module, values in description["attributes"].items()
    }
    apply_structure(
        inner, StructureDiff(attributes, description["added"], description["removed"]), description["shapes"]
    )
    try:
        # Assign: the saved types, whatever the fresh network's
        inner.load_state_dict(full, strict=True, assign=True)
    except RuntimeError as error:
        raise FormatError(
            f"the weights of {what} do not fit the network that its description builds: {error}"
        ) from error
    for name, of in description["tied"].items():
        path, _, leaf = name.rpartition(".")
        setattr(inner.get_submodule(path), leaf, inner.get_parameter(of))
    probe = description["probe"]
    expected = OutputFingerprint(tuple(probe["shape"]), probe["seed"], probe["norm"], tuple(probe["projections"]))
    expected.check(OutputFingerprint.of(inner, expected.shape, expected.seed), what)
    return model.eval()


def _tied(model: nn.Module) -> dict[str, str]:
    """Parameters that are another one under a second name."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: of for name, parameter in named if (of := first.setdefault(id(parameter), name)) != name}


def _kept_as_json(
    kept: Mapping[str, KeptIndices], before: Mapping[str, Sequence[int]], state: Mapping[str, Tensor]
) -> dict[str, Any]:
    found = {}
    for name, value in kept.items():
        if name not in before or name not in state:
            raise ShapeError(f"kept names {name!r}, which is no tensor of both the original and the pruned network")
        if (shape := index_kept(torch.empty(tuple(before[name])), value).shape) != state[name].shape:
            raise ShapeError(
                f"kept leaves a shape of {tuple(shape)} of {name!r}, the pruned network has {tuple(state[name].shape)}"
            )
        if isinstance(value, Tensor):
            value = to_axis_indices({name: value}, before)[name]
        found[name] = (
            {"flat": value.tolist()}
            if isinstance(value, Tensor)
            else [axis if axis is None else list(map(int, axis)) for axis in value]
        )
    return found


def _encoded(values: Mapping[str, Any], kind: str, of: str) -> dict[str, Any]:
    return {name: _encode(value, f"{kind} {name!r} {of}") for name, value in values.items()}


def _factory_from_json(saved: Mapping[str, Any], folder: Path) -> Factory:
    name, arguments = saved.get("name"), saved.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise FormatError(f"{folder / PRUNED_DESCRIPTION_FILE} is damaged: its factory is {saved!r}")
    return name, {key: _decode(value) for key, value in arguments.items()}


def _versions_differ(saved: Mapping[str, str]) -> str:
    here = library_versions()
    other = [
        f"{name} {saved.get(name, '?')} (here {here[name]})"
        for name in ("timm", "torch", "knowiso_train")
        if saved.get(name) != here[name]
    ]
    return f"It was saved with {', '.join(other)}." if other else ""
