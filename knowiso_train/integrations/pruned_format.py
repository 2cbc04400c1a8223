"""The files of a saved pruned network: safetensors and JSON, written whole or not at all, and read without running code from them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knowiso_train.errors import DataError, FormatError, OptionError
from knowiso_train.pruning.fingerprint import weights_hash
from knowiso_train.pruning.shape import is_plain

FORMAT_VERSION = 1
WEIGHTS, DESCRIPTION = "model.safetensors", "pruned.json"
FIELDS: dict[str, type | tuple[type, ...]] = {
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


def write(folder: Path, description: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write both files; each appears under its name only when it is complete, the description last."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    own = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}  # no memory is shared
    content = {"format_version": FORMAT_VERSION, **description, "sha256": weights_hash(own)}
    _replace(folder / WEIGHTS, lambda path: save_file(own, path, metadata={"format": "pt"}))
    _replace(folder / DESCRIPTION, lambda path: path.write_text(json.dumps(content, indent=1) + "\n"))


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and check both files.

    Raises:
        DataError: no such files.
        FormatError: damaged files, files of two different saves, or a newer format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    description = read_description(folder)
    try:
        weights = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise DataError(f"expected {WEIGHTS} beside {DESCRIPTION} in {folder}; it is not there") from error
    except SafetensorError as error:
        raise FormatError(f"{folder / WEIGHTS} is damaged, it is no complete safetensors file ({error}); save or copy it again") from error
    if (found := weights_hash(weights)) != description["sha256"]:
        raise FormatError(
            f"{folder / WEIGHTS} does not hold the weights that {DESCRIPTION} was written for: expected SHA-256 {description['sha256'][:12]}…, "
            f"got {found[:12]}…. A file is damaged, or comes from another save; save or copy both again"
        )
    return description, weights


def read_description(folder: Path) -> dict[str, Any]:
    """Read and check `pruned.json` alone."""
    path = folder / DESCRIPTION
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"expected a folder that save_pruned wrote, with {WEIGHTS} and {DESCRIPTION}; {path} is not there") from error
    except ValueError as error:  # no JSON, or no text
        raise FormatError(f"{path} is damaged, it is no JSON ({error}); save or copy it again") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if type(version) is not int or version < 1:
        raise FormatError(f"{path} does not describe a pruned network: expected a format_version of 1 or more, got {version!r}")
    if version > FORMAT_VERSION:
        versions = content.get("versions")
        written = versions.get("knowiso_train", "a later version") if isinstance(versions, dict) else "a later version"
        raise FormatError(
            f"{path} has format version {version}, written by knowiso_train {written}; this version reads up to {FORMAT_VERSION}. "
            "Upgrade knowiso_train"
        )
    for key, kind in FIELDS.items():
        if key not in content or not isinstance(content[key], kind):
            raise FormatError(f"{path} is damaged: its field {key!r} is {'not there' if key not in content else type(content[key]).__name__}")
    return dict(content)


def encode(value: Any, what: str) -> Any:
    """Plain data as JSON that keeps tuples and `torch.Size` apart from lists.

    Raises:
        OptionError: not plain.

    Example:
        >>> encode((1, [2, torch.Size([3])]), "it")
        {'tuple': [1, [2, {'size': [3]}]]}
        >>> decode(_)
        (1, [2, torch.Size([3])])
    """
    if not is_plain(value):
        raise OptionError(f"{what} is {value!r}; only numbers, words, truth values, None, and lists and tuples of them can be saved")
    if isinstance(value, (list, tuple)):
        entries = [encode(entry, what) for entry in value]
        return entries if isinstance(value, list) else {"size" if isinstance(value, torch.Size) else "tuple": entries}
    return value


def decode(value: Any) -> Any:
    """What `encode` was given.

    Raises:
        FormatError: not made by `encode`.
    """
    if isinstance(value, list):
        return [decode(entry) for entry in value]
    if isinstance(value, dict):
        if len(value) == 1 and isinstance(entries := value.get("tuple", value.get("size")), list):
            made = tuple(decode(entry) for entry in entries)
            return torch.Size(made) if "size" in value else made
        raise FormatError(f'expected {{"tuple": […]}} or {{"size": […]}}, got {value!r}')
    return value


def _replace(path: Path, fill: Callable[[Path], Any]) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as beside:  # the same disk, so that the move is one step
        fill(Path(beside) / path.name)
        os.replace(Path(beside) / path.name, path)
