"""Digests of networks, batches and files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import partial
from itertools import chain
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from knowiso_train.errors import FormatError
from knowiso_train.features.wrappers import unwrap_model
from knowiso_train.utils.batch import tensor_leaves

DIGEST_SIZE_BYTES = 16
READ_BYTES = 2**20


def network_digest(network: nn.Module) -> str:
    """Return a digest of a network's modules, and of the names and values of its state.

    Examples:
        >>> network = nn.Linear(2, 2)
        >>> network_digest(network) == network_digest(nn.Linear(2, 2))
        False
    """
    plain = unwrap_model(network)
    state = plain.state_dict().items()
    parts = (part for name, value in state for part in (name.encode(), *map(_tensor_bytes, tensor_leaves(value))))
    return hexadecimal_digest(chain([repr(plain).encode()], parts))


def function_identity(function: Any) -> str:
    """Return the name of a function and a digest of its code, arguments and closure.

    Objects in them that are no plain values, functions, tensors or networks count by their class.

    Examples:
        >>> function_identity(lambda x: x) == function_identity(lambda x: 2 * x)
        False
        >>> function_identity(partial(pow, 2)) == function_identity(partial(pow, 3))
        False
    """
    name = getattr(function, "__qualname__", type(function).__name__)
    return f"{name} {hexadecimal_digest([_described(function).encode()])[:8]}"


def _described(value: Any) -> str:
    """Return a text that is equal in another process for an equal value."""
    if isinstance(value, partial):
        return _described((value.func, value.args, value.keywords))
    if isinstance(value, MethodType):
        return _described((value.__func__, type(value.__self__).__name__))
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell.cell_contents is not value]
        return _described((value.__qualname__, value.__code__, value.__defaults__, value.__kwdefaults__, cells))
    if isinstance(value, CodeType):
        return _described((value.co_code.hex(), value.co_names, value.co_consts))
    if isinstance(value, nn.Module):
        return f"{value!r} {network_digest(value)}"
    if isinstance(value, Tensor):
        return batch_digest(value)
    if isinstance(value, dict):
        return str([(str(key), _described(item)) for key, item in value.items()])
    if isinstance(value, (set, frozenset)):
        return str(sorted(map(_described, value)))
    if isinstance(value, (tuple, list)):
        return str([_described(item) for item in value])
    # The default text of an object holds its address
    text = repr(value)
    return type(value).__qualname__ if " at 0x" in text else text


def batch_digest(batch: Any) -> str:
    """Return a digest of the tensors of a batch.

    Examples:
        >>> batch_digest((torch.zeros(2), torch.ones(1))) == batch_digest([torch.zeros(2), torch.ones(1)])
        True
    """
    return hexadecimal_digest(map(_tensor_bytes, tensor_leaves(batch)))


def file_digest(paths: Iterable[Path]) -> str:
    """Return a digest of the contents of files.

    Raises:
        FormatError: A file that cannot be read.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_SIZE_BYTES)
    for path in paths:
        try:
            with path.open("rb") as file:
                while part := file.read(READ_BYTES):
                    digest.update(part)
        except OSError as error:
            raise FormatError(f"{path} cannot be read: {error}") from error
    return digest.hexdigest()


def hexadecimal_digest(parts: Iterable[bytes]) -> str:
    """Return a digest of several parts in order.

    Examples:
        >>> len(hexadecimal_digest([b"a", b"b"]))
        32
    """
    digest = hashlib.blake2b(digest_size=DIGEST_SIZE_BYTES)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _tensor_bytes(tensor: Tensor) -> bytes:
    plain = tensor.detach().dequantize() if tensor.is_quantized else tensor.detach()
    # Bytes of any dtype, also of bfloat16
    return plain.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
