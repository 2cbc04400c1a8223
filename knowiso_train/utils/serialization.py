"""Strict JSON and atomic file writes."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from knowiso_train.errors import InputTypeError

NON_FINITE_NAMES = ("NaN", "Infinity", "-Infinity")


def dump_json(value: Any, *, indent: int | None = 2) -> str:
    """Serialize a value as strict JSON, with NaN and infinities as the strings "NaN", "Infinity" and "-Infinity".

    Tuples become lists, keys of mappings become strings, NumPy and torch scalars become numbers, and paths, dtypes and
    devices become strings.

    Args:
        value: Nested mappings, lists and tuples of strings, numbers, booleans, None and the types above.
        indent: Spaces per level. None: a single line.

    Raises:
        InputTypeError: A value of another type; the message gives its place in the structure.

    Example:
        >>> dump_json({"ridge": (0.1, float("inf")), "file": Path("a.png")}, indent=None)
        '{"ridge": [0.1, "Infinity"], "file": "a.png"}'
    """
    return json.dumps(_name_non_finite(to_plain(value)), indent=indent, ensure_ascii=False, allow_nan=False)


def to_plain(value: Any) -> Any:
    """Convert a value to dicts, lists, text, numbers, booleans and None; non-finite floats stay floats.

    Raises:
        InputTypeError: A value of another type than `dump_json` accepts.

    Example:
        >>> to_plain({"ridge": (np.float32(0.5), float("inf")), "dtype": torch.float64})
        {'ridge': [0.5, inf], 'dtype': 'torch.float64'}
    """
    return _to_plain(value, "")


def parse_json(text: str | bytes) -> Any:
    """Parse strict JSON; the inverse of `dump_json` for plain values.

    The strings "NaN", "Infinity" and "-Infinity" become floats, so a text of exactly this content cannot be stored.

    Raises:
        ValueError: Text that is not JSON, or a bare NaN or Infinity.

    Example:
        >>> parse_json('{"ridge": [0.1, "Infinity"]}')
        {'ridge': [0.1, inf]}
    """
    return _decode(json.loads(text, parse_constant=_refuse_constant))


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as indented JSON, atomically; see `dump_json` and `replace_file`.

    Raises:
        InputTypeError: A value that JSON cannot hold. The file is not modified.
        OSError: The file cannot be written.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_json(f"{folder}/card.json", {"epochs": 3})
        ...     print(Path(f"{folder}/card.json").read_text(), end="")
        {
          "epochs": 3
        }
    """
    write_file(path, dump_json(value) + "\n")


def write_file(path: str | Path, content: str | bytes) -> None:
    """Write text (UTF-8) or bytes to a file, atomically; see `replace_file`.

    Raises:
        OSError: The file cannot be written.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_file(f"{folder}/log/note.txt", "done")
        ...     Path(f"{folder}/log/note.txt").read_text()
        'done'
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    with replace_file(path) as partial:
        partial.write_bytes(data)


@contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to, and rename that file to `path` when the block ends without an error.

    Readers find the old file or the complete new one, also after a crash. Missing parent folders are created.
    Targets that are not regular files, such as /dev/stdout, are written directly.

    Args:
        path: Final name of the file.

    Raises:
        OSError: The file cannot be written.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replace_file(f"{folder}/weights.bin") as partial:
        ...         _ = partial.write_bytes(b"123")
        ...     [file.name for file in Path(folder).iterdir()]
        ['weights.bin']
    """
    # The target of a symbolic link is replaced, not the link itself.
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        yield path
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # The same folder, hence the same file system: only there is os.replace atomic.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        partial = Path(folder) / path.name
        yield partial
        # Without fsync a power cut after the rename can leave an empty file under the final name.
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)


def _to_plain(value: Any, path: str) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _to_plain(entry, f"{path}[{key!r}]") for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(entry, f"{path}[{i}]") for i, entry in enumerate(value)]
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.ndim == 0):
        value = value.item()
    if isinstance(value, os.PathLike | torch.dtype | torch.device):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise InputTypeError(
        f"expected values that JSON can hold, got {type(value).__name__} at {path or 'the top level'}; "
        "convert it to numbers, text, lists or mappings"
    )


def _name_non_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _name_non_finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_name_non_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decode(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_decode(entry) for entry in value]
    return float(value) if isinstance(value, str) and value in NON_FINITE_NAMES else value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f'expected strict JSON with "{name}" as a string, got a bare {name}')
