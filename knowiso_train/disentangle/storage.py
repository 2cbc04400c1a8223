"""Save and load: tensors as safetensors, everything else as JSON beside them; no code is pickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from knowiso_train.errors import FormatError

FORMAT_VERSION = 1
CONFIG, TENSORS = "disentangler.json", "disentangler.safetensors"


def save(folder: str | Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write `disentangler.json` and `disentangler.safetensors` into a folder, made if it is not there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
    (folder / CONFIG).write_text(json.dumps({"format_version": FORMAT_VERSION, **config}, indent=2) + "\n")


def load(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `save` wrote.

    Raises:
        FormatError: no such files, or a format that this version does not read.
    """
    folder = Path(folder)
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / TENSORS)
    except FileNotFoundError as error:
        raise FormatError(f"expected a folder with {CONFIG} and {TENSORS}; {error.filename or folder} is not there") from error
    except (json.JSONDecodeError, ValueError) as error:
        raise FormatError(f"{folder} does not hold a saved disentangler: {error}") from error
    if config.get("format_version") != FORMAT_VERSION:
        raise FormatError(f"{folder} has format version {config.get('format_version')!r}; this version of knowiso_train reads {FORMAT_VERSION}")
    return config, tensors
