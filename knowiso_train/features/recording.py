"""Recording of module outputs with forward hooks that are removed afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def record_outputs(
    modules: Mapping[str, nn.Module], convert: Callable[[Any], Any] | None = None
) -> Iterator[dict[str, list[Any]]]:
    """Record the outputs of modules during the block; the hooks are removed at its end, also after an error.

    Args:
        modules: Modules to hook, by name.
        convert: Function of an output that returns the value to record. None: the output itself, not a copy.

    Yields:
        Recorded values of each module, one per call. Modules are in the order of their first completed call; those that
        were not called are absent.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> with record_outputs(dict(model.named_children()), lambda output: tuple(output.shape)) as shapes:
        ...     _ = model(torch.zeros(4, 2))
        >>> shapes
        {'0': [(4, 3)], '1': [(4, 3)]}
    """
    values: dict[str, list[Any]] = {}

    def record(name: str, output: Any) -> None:
        values.setdefault(name, []).append(output if convert is None else convert(output))

    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: record(name, output))
        for name, module in modules.items()
    ]
    with remove_afterwards(handles):
        yield values


@contextmanager
def remove_afterwards(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end of the block, also after an error.

    Examples:
        >>> layer = nn.ReLU()
        >>> with remove_afterwards([layer.register_forward_hook(lambda module, args, output: output + 1)]):
        ...     layer(torch.zeros(1)), len(layer._forward_hooks)
        (tensor([1.]), 1)
        >>> len(layer._forward_hooks)
        0
    """
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
