"""Strict JSON, safetensors files, and atomic file writes."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from knowiso_train.errors import DataError, FormatError, InputTypeError

NON_FINITE_NAMES = ("NaN", "Infinity", "-Infinity")
# Bounds of what is read and written, far above everything that this library writes
MAX_JSON_BYTES, MAX_JSON_DEPTH = 2**28, 64
# A safetensors file starts with the size of its JSON header, which may hold text entries
HEADER_SIZE_BYTES, MAX_HEADER_BYTES = 8, 100_000_000
# Key of the description among the text entries; quotes are escaped within the header
DESCRIPTION_KEY, MAX_DESCRIPTION_BYTES = "knowiso_train", 50_000_000
# Partial files of this age, left by killed processes, are deleted
LEFTOVER_AGE_SECONDS = 3600


def dump_json(value: Any, *, indent: int | None = 2) -> str:
    """Serialize a value as strict JSON, with NaN and infinities as the strings "NaN", "Infinity" and "-Infinity".

    Tuples become lists, keys of mappings become strings, NumPy and torch scalars become numbers, and paths, dtypes and
    devices become strings.

    Args:
        value: Nested mappings, lists and tuples of strings, numbers, booleans, None and the types above.
        indent: Spaces per level. None: a single line.

    Raises:
        InputTypeError: A value of another type; the message gives its place in the structure.

    Examples:
        >>> dump_json({"ridge": (0.1, float("inf")), "file": Path("a.png")}, indent=None)
        '{"ridge": [0.1, "Infinity"], "file": "a.png"}'
    """
    return json.dumps(_name_non_finite(to_plain(value)), indent=indent, ensure_ascii=False, allow_nan=False)


def to_plain(value: Any) -> Any:
    """Convert a value to dicts, lists, text, numbers, booleans and None; non-finite floats stay floats.

    Raises:
        InputTypeError: A value of another type than `dump_json` accepts.

    Examples:
        >>> to_plain({"ridge": (np.float32(0.5), float("inf")), "dtype": torch.float64})
        {'ridge': [0.5, inf], 'dtype': 'torch.float64'}
    """
    return _to_plain(value, "")


def parse_json(text: str | bytes) -> Any:
    """Parse strict JSON; the inverse of `dump_json` for plain values.

    The strings "NaN", "Infinity" and "-Infinity" become floats, so a text of exactly this content cannot be stored.

    Raises:
        ValueError: Text that is not JSON, a bare NaN or Infinity, or more than 64 levels of nesting.

    Examples:
        >>> parse_json('{"ridge": [0.1, "Infinity"]}')
        {'ridge': [0.1, inf]}
    """
    try:
        return _decode(json.loads(text, parse_constant=_refuse_constant), 0)
    except RecursionError as error:
        raise ValueError(f"expected at most {MAX_JSON_DEPTH} levels of nesting, got more") from error


def read_json(path: str | Path) -> Any:
    """Read a strict JSON file; see `parse_json`.

    Raises:
        FormatError: The file is missing, is damaged, or holds more than 256 MiB. The message names the file.

    Examples:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_json(f"{folder}/card.json", {"epochs": 3})
        ...     read_json(f"{folder}/card.json")
        {'epochs': 3}
    """
    path = _regular_file(path, "JSON")
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise FormatError(f"expected at most {MAX_JSON_BYTES} bytes of JSON in {path}, got {size}; check the file")
        return parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error}") from error
    except ValueError as error:  # not JSON, or not UTF-8
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path} is damaged, it is no JSON ({error}). Save or copy it again") from error


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], Any]:
    """Read a safetensors file into memory; nothing is unpickled.

    Returns:
        Tensors by name, and the description given to `write_tensors`. The description is None if there is none.

    Raises:
        FormatError: The file is missing or damaged. The message names the file.

    Examples:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_tensors(f"{folder}/a.safetensors", {"weight": torch.zeros(2)}, {"epochs": 3})
        ...     read_tensors(f"{folder}/a.safetensors")
        ({'weight': tensor([0., 0.])}, {'epochs': 3})
    """
    from safetensors.torch import load

    with _safetensors_errors(path):
        # All bytes of one open file: a second opening could find the file of a later write
        data = _regular_file(path, "safetensors").read_bytes()
        return load(data), _parse_description(data[HEADER_SIZE_BYTES:][: _header_size(data)])


def read_description(path: str | Path) -> Any:
    """Read the description of a safetensors file, as `read_tensors`, without its tensors."""
    with _safetensors_errors(path), _regular_file(path, "safetensors").open("rb") as file:
        return _parse_description(file.read(_header_size(file.read(HEADER_SIZE_BYTES))))


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], description: Any = None) -> None:
    """Write a safetensors file, atomically; see `replace_file`.

    Args:
        path: Final name of the file.
        tensors: Tensors by name, of any device, layout in memory and sharing of memory.
        description: Value for `dump_json`, kept in the same file so that both are always of the same call. None: no
            description.

    Raises:
        InputTypeError: A description that JSON cannot hold, or of more than 50 MB. The file is not modified.
        OSError: The file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    metadata = {"format": "pt"}
    if description is not None:
        metadata[DESCRIPTION_KEY] = text = dump_json(description, indent=None)
        if len(text.encode()) > MAX_DESCRIPTION_BYTES:
            raise InputTypeError(f"expected a description of at most {MAX_DESCRIPTION_BYTES} bytes, got {len(text)}")
    # Clones share no memory, which safetensors rejects
    clones = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    with replace_file(path) as partial:
        try:
            save_file(clones, partial, metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as indented JSON, atomically; see `dump_json` and `replace_file`.

    Raises:
        InputTypeError: A value that JSON cannot hold. The file is not modified.
        OSError: The file cannot be written.

    Examples:
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

    Examples:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_file(f"{folder}/log/note.txt", "done")
        ...     Path(f"{folder}/log/note.txt").read_text()
        'done'
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    with replace_file(path) as partial:
        partial.write_bytes(data)


def write_if_given(text: str, path: str | Path | None) -> str:
    """Write a text to a file where a path is given, and return it.

    Args:
        text: Content of the file.
        path: File to write. None: no file.

    Raises:
        OSError: The file cannot be written.

    Examples:
        >>> write_if_given("done", None)
        'done'
    """
    if path is not None:
        write_file(path, text)
    return text


@contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to, and rename that file to `path` when the block ends without an error.

    Readers find the old file or the complete new one, also after a crash. Missing parent folders are created.
    Partial files of killed processes are deleted by a later write of the same file, once they are an hour old.
    Targets that are not regular files, such as /dev/stdout, are written directly.

    Args:
        path: Final name of the file.

    Raises:
        OSError: The file cannot be written.
        DataError: The path is a folder, or that of its folder is, or goes through, a file.

    Examples:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replace_file(f"{folder}/weights.bin") as partial:
        ...         _ = partial.write_bytes(b"123")
        ...     [file.name for file in Path(folder).iterdir()]
        ['weights.bin']
    """
    if is_special(path):
        yield Path(path)
        return
    # The target of a symbolic link is replaced, not the link itself.
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise DataError(f"expected the name of a file, got the folder {path}. Add a file name to the path")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise DataError(
            f"expected a folder at {path.parent}, to write {path.name} into, got a file on this path. Pass another path"
        ) from error
    # The same folder, hence the same file system: only there is os.replace atomic.
    prefix = f".{path.name}.partial-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent) as folder:
        _delete_leftovers(path.parent, prefix, Path(folder).stat().st_mtime - LEFTOVER_AGE_SECONDS)
        partial = Path(folder) / path.name
        yield partial
        # Without fsync a power cut after the rename can leave an empty file under the final name.
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)


def is_special(path: str | Path) -> bool:
    """Return whether a path is that of a pipe or device, such as /dev/stdout, and not of a file or folder.

    Examples:
        >>> is_special("report.json")
        False
    """
    path = Path(path)
    return path.exists() and not path.is_file() and not path.is_dir()


def _delete_leftovers(folder: Path, prefix: str, time: float) -> None:
    """Delete the partial folders of a file that were last modified before a time."""
    with os.scandir(folder) as entries:
        leftovers = [entry for entry in entries if entry.name.startswith(prefix) and entry.is_dir()]
    for leftover in leftovers:
        # Another writer may have deleted it meanwhile
        with suppress(OSError):
            if leftover.stat().st_mtime < time:
                shutil.rmtree(leftover.path)


def _regular_file(path: str | Path, kind: str) -> Path:
    """Return a path, or raise an error if it is no regular file; reading a pipe or a device may never end."""
    path = Path(path)
    if not os.path.isfile(path):
        raise FormatError(f"expected a {kind} file at {path}, but it is not there, or is no regular file")
    return path


@contextmanager
def _safetensors_errors(path: str | Path) -> Iterator[None]:
    """Turn the errors of a damaged safetensors file into one that names the file."""
    from safetensors import SafetensorError

    try:
        yield
    except FormatError:
        raise
    except (
        SafetensorError,
        OSError,
        RuntimeError,
        TypeError,
        AttributeError,
        LookupError,
        ArithmeticError,
        ValueError,
    ) as error:
        raise FormatError(
            f"{path} is damaged, it is no complete safetensors file ({error}). Save or copy it again"
        ) from error


def _header_size(data: bytes) -> int:
    """Return the size of the JSON header, which the first bytes of a safetensors file state."""
    size = int.from_bytes(data[:HEADER_SIZE_BYTES], "little")
    if size > MAX_HEADER_BYTES:
        raise ValueError(f"expected a header of at most {MAX_HEADER_BYTES} bytes, got {size}")
    return size


def _parse_description(header: bytes) -> Any:
    metadata = parse_json(header).get("__metadata__", {})
    if DESCRIPTION_KEY not in metadata:
        return None
    try:
        return parse_json(metadata[DESCRIPTION_KEY])
    except ValueError as error:
        raise ValueError(f"its description is no JSON: {error}") from error


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


def _decode(value: Any, depth: int) -> Any:
    if depth > MAX_JSON_DEPTH:
        raise ValueError(f"expected at most {MAX_JSON_DEPTH} levels of nesting, got more")
    if isinstance(value, dict):
        return {key: _decode(entry, depth + 1) for key, entry in value.items()}
    if isinstance(value, list):
        return [_decode(entry, depth + 1) for entry in value]
    return float(value) if isinstance(value, str) and value in NON_FINITE_NAMES else value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f'expected strict JSON with "{name}" as a string, got a bare {name}')
