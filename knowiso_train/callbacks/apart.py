"""A measurement in the middle of a training step, of which that step notices nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from knowiso_train.features import bare, device_of, undisturbed
from knowiso_train.features.capture import Hook


@contextmanager
def apart(*models: nn.Module) -> Iterator[None]:
    """Networks in eval mode, outside autocast, uncompiled, and unseen by this library's own hooks; afterwards, also by an error, all is as before.

    Of an attached `IsomorphismLoss` or `FeatureTaps` the hooks are off within the block, so what they captured before it still stands after it.

    Args:
        models: wrapped or not. Call the bare networks within: DDP's own forward talks to the other processes.

    Example:
        >>> from knowiso_train import FeatureTaps
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Dropout())
        >>> with FeatureTaps(model, "0") as taps:
        ...     _ = model(torch.ones(4, 2))
        ...     with apart(model):
        ...         _ = model(torch.zeros(7, 2))
        ...     len(taps.collect()["0"]), model.training
        (4, True)
    """
    kinds = {"cpu", *(device.type for device in map(device_of, models) if device is not None)}
    autocasting = [kind for kind in sorted(kinds) if torch.is_autocast_enabled(kind)]
    with ExitStack() as stack:
        stack.enter_context(undisturbed(*models))
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # hooks that come after the first compiled call would not fire
        for kind in autocasting:
            stack.callback(torch.clear_autocast_cache)  # weights cast under no_grad must not serve the training in the same block (torch 2.8)
            stack.enter_context(torch.autocast(kind, enabled=False))
        for model in models:
            for module in bare(model).modules():
                stack.enter_context(_without_hooks(module._forward_pre_hooks))
                stack.enter_context(_without_hooks(module._forward_hooks))
        yield


@contextmanager
def _without_hooks(table: dict[int, Callable[..., Any]]) -> Iterator[None]:
    """Own hooks out of a module's table, and back in their places among those that others left there."""
    before = list(table.items())
    own = {key for key, hook in before if isinstance(hook, Hook)}
    if not own:
        yield
        return
    for key in own:
        del table[key]
    try:
        yield
    finally:
        now = dict(table)
        table.clear()
        table.update({key: hook for key, hook in before if key in own or key in now} | now)
