"""Networks on another device for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn

from knowiso_train.errors import OptionError
from knowiso_train.features.names import bare


def device_of(model: nn.Module) -> torch.device | None:
    """Device of the first parameter or buffer; None for a network without either."""
    first = next(chain(model.parameters(), model.buffers()), None)  # lazily: this is asked in every step
    return None if first is None else first.device


@contextmanager
def on_device(device: torch.device | str | None, *models: nn.Module) -> Iterator[None]:
    """Move the networks to a device, and back when the block ends, also by an error; None leaves them.

    Raises:
        OptionError: a network that is spread over several devices, which cannot be brought back.

    Example:
        >>> with on_device("meta", model := nn.Linear(2, 2, device="meta")):
        ...     str(device_of(model))
        'meta'
    """
    if device is None:
        yield
        return
    before: list[tuple[nn.Module, torch.device]] = []
    for model in models:
        places = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
        if len(places) > 1:
            kind, found = type(bare(model)).__name__, sorted(map(str, places))
            raise OptionError(f"device={str(device)!r} needs networks on one device each; {kind} is on {found}. Leave device=None")
        before += [(model, place) for place in places]
    try:
        for model in models:
            model.to(device)
        yield
    finally:
        for model, place in before:
            model.to(place)
