"""Count of the hooks of this library."""

from __future__ import annotations

from torch import nn

from knowiso_train.features.hooks import DetachedOnCopyHook


def own_hooks(*models: nn.Module) -> int:
    """Return the number of hooks that this library registered on the modules of the networks."""
    tables = [
        table
        for model in models
        for module in model.modules()
        for table in (module._forward_hooks, module._forward_pre_hooks)
    ]
    return sum(isinstance(hook, DetachedOnCopyHook) for table in tables for hook in table.values())
