"""Weights of networks from files."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from knowiso_train.errors import DataError, FormatError
from knowiso_train.utils.serialization import read_json, read_tensors

CHECKPOINT_SUFFIXES = (".safetensors", ".pth", ".pt", ".th", ".ckpt", ".bin", ".tar")
# Names of the weights in the folder of a checkpoint, by transformers and accelerate
FOLDER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
STATE_DICT_KEYS = ("state_dict", "model", "model_state_dict", "state_dict_ema")


def load_checkpoint(model: nn.Module, path: str | Path, *, in_order: bool = False) -> None:
    """Load a weight file into a network; the tensors of both must match one to one.

    Args:
        model: Network.
        path: File .safetensors, or of `torch.save` (.pth, .pt, .th, .ckpt, .bin, .pth.tar) with a state dict, plain or
            under 'state_dict', 'model', 'model_state_dict' or 'state_dict_ema'; or a folder, see `weight_files`. A
            common prefix of the network's names, such as `model.` of Lightning, is removed.
        in_order: Assign tensors in order if their names differ and their shapes agree.

    Raises:
        DataError: No such file.
        FormatError: Not a state dict, or one of another network; the message shows the first mismatch.
    """
    own = model.state_dict()
    weights = read_checkpoint(path, own)
    if set(weights) != set(own) and in_order:
        weights = dict(zip(own, _in_order(own, weights, path), strict=True))
    _check(own, weights, path, model)
    # The dict of the model holds the versions of its modules, which safetensors files lack and some modules check
    own.update(weights)
    model.load_state_dict(own)


def read_checkpoint(path: str | Path, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a file or folder under the names of a network, see `load_checkpoint`.

    Args:
        path: File or folder.
        own: State dict of the network. Only its names are read.

    Raises:
        DataError: No such file, or a folder without weights.
        FormatError: Not a state dict.
    """
    return _without_prefix(_read_all(Path(path)), own)


def weight_files(path: str | Path) -> list[Path]:
    """Return the weight files of a checkpoint: the file itself, or those in a folder of transformers or accelerate.

    Args:
        path: File, or folder with `model.safetensors` or `pytorch_model.bin`, whole or in shards with an index.

    Returns:
        Files; none for a folder without weights.

    Raises:
        FormatError: An index of shards that is damaged.

    Examples:
        >>> weight_files("run/model.safetensors") == [Path("run/model.safetensors")]
        True
    """
    path = Path(path)
    if not path.is_dir():
        return [path]
    for name in FOLDER_WEIGHTS:
        if (path / name).is_file():
            return [path / name]
        index = path / f"{name}.index.json"
        if index.is_file():
            content = read_json(index)
            shards = content.get("weight_map") if isinstance(content, Mapping) else None
            if not isinstance(shards, Mapping) or not all(isinstance(shard, str) for shard in shards.values()):
                raise FormatError(f"{index} holds no 'weight_map' from tensors to files; save or copy it again")
            return [path / Path(shard).name for shard in dict.fromkeys(shards.values())]
    return []


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict of a file and strip `module.` from its names."""
    path = Path(path)
    if path.suffix not in CHECKPOINT_SUFFIXES:
        raise FormatError(
            f"expected a weight file that ends in one of {', '.join(CHECKPOINT_SUFFIXES)}, got {path.name!r}"
        )
    if not path.is_file():
        raise DataError(f"no weight file at {path}")
    content = _read(path)
    for _ in STATE_DICT_KEYS:
        inner = next((content[key] for key in STATE_DICT_KEYS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not content or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
        found = ", ".join(f"{name}: {type(value).__name__}" for name, value in list(content.items())[:6]) or "nothing"
        raise FormatError(
            f"{path} holds no state dict, neither plain nor under one of {STATE_DICT_KEYS}; it holds {found}"
        )
    return {name.removeprefix("module."): value for name, value in content.items()}


def _read_all(path: Path) -> dict[str, Tensor]:
    """Read all weight files of a checkpoint."""
    files = weight_files(path)
    if not files:
        raise DataError(f"no weights in the folder {path}; expected one of {', '.join(FOLDER_WEIGHTS)}")
    return {name: value for file in files for name, value in read_weights(file).items()}


def _without_prefix(weights: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights below the only prefix that has exactly a network's names; all weights if there is none."""
    first = next(iter(own), None)
    if first is None or first in weights:
        return weights
    prefixes = [name.removesuffix(first) for name in weights if name.endswith(f".{first}")]
    parts = [
        {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        for prefix in prefixes
    ]
    fitting = [part for part in parts if part.keys() == own.keys()]
    return fitting[0] if len(fitting) == 1 else weights


def _read(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    try:
        # timm's checkpoints hold their arguments; a namespace runs no code
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise FormatError(
            f"{path} holds pickled Python objects, which are refused because reading them runs their code. "
            "If you trust the file, save its state_dict alone and pass that."
        ) from error
    except Exception as error:  # torch.load documents none of its errors for damaged files
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise FormatError(f"{path} is not a file that torch.save wrote: {reason}") from error
    if not isinstance(content, Mapping):
        raise FormatError(f"{path} holds a {type(content).__name__}, expected a state dict")
    return content


def _in_order(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], path: str | Path) -> list[Tensor]:
    for i, ((name, mine), (other, theirs)) in enumerate(zip(own.items(), weights.items(), strict=False)):
        if mine.shape != theirs.shape:
            raise FormatError(
                f"{path} does not map in order: tensor {i} is {name!r} {tuple(mine.shape)} in the network "
                f"and {other!r} {tuple(theirs.shape)} in the file"
            )
    if len(own) != len(weights):
        raise FormatError(f"{path} does not map in order: the network has {len(own)} tensors, the file {len(weights)}")
    return list(weights.values())


def _check(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], path: str | Path, model: nn.Module) -> None:
    missing, unknown = [name for name in own if name not in weights], [name for name in weights if name not in own]
    if missing or unknown:
        same = [value.shape for value in own.values()] == [value.shape for value in weights.values()]
        hint = (
            " The shapes agree one for one: pass in_order=True (--checkpoints-in-order) to map them in order."
            if same
            else ""
        )
        raise FormatError(
            f"{path} is not a checkpoint of {type(model).__name__}: "
            f"{len(missing)} of its {len(own)} tensors are missing"
            f"{_first(missing)}, {len(unknown)} are unknown to it{_first(unknown)}.{hint}"
        )
    for name, mine in own.items():
        if mine.shape != weights[name].shape:
            raise FormatError(
                f"{path}: {name!r} has shape {tuple(weights[name].shape)}, "
                f"{type(model).__name__} expects {tuple(mine.shape)}. For another number of classes pass num_classes=."
            )


def _first(names: list[str]) -> str:
    return f" (first: {names[0]!r})" if names else ""
