"""What a layer is called on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from knowiso_train.errors import InputTypeError


def called_on(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The tensor of `layer(x)` and of `layer(input=x)`, as a hook with `with_kwargs=True` sees the call.

    Raises:
        InputTypeError: neither.

    Example:
        >>> import torch
        >>> called_on((), {"input": torch.ones(2)})
        tensor([1., 1.])
    """
    found = args[0] if args else kwargs.get("input")
    if not isinstance(found, Tensor):
        kinds = [type(arg).__name__ for arg in args]
        raise InputTypeError(f"expected a layer that is called on one tensor, layer(x) or layer(input=x); got a call with {kinds} and {list(kwargs)}")
    return found
