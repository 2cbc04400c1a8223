"""Digests of networks, batches and files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from knowiso_train.errors import FormatError
from knowiso_train.features.modules import unwrap_model
from knowiso_train.utils.batch import tensor_leaves

DIGEST_SIZE_BYTES = 16
READ_BYTES = 2**20


def network_digest(network: nn.Module) -> str:
    """Return a digest of the names and values of a network's state.

    Examples:
        >>> network = nn.Linear(2, 2)
        >>> network_digest(network) == network_digest(nn.Linear(2, 2))
        False
    """
    return hexadecimal_digest(
        part
        for name, value in unwrap_model(network).state_dict().items()
        for part in (name.encode(), *map(_tensor_bytes, tensor_leaves(value)))
    )


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
