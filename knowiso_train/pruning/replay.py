"""What layers gave, given again: the part of a network that nothing has changed need not be computed twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


class Replay:
    """Outputs of layers that run once, for one batch.

    Args:
        layers: by name, in the order in which they run.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> replay, x = Replay({"0": model[0], "2": model[2]}), torch.randn(3, 4)
        >>> with replay.recording():
        ...     before = model(x)
        >>> with replay.ahead_of(["2"]):  # the first layer is not asked
        ...     torch.equal(model(torch.zeros(3, 4)), before)
        True
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = dict(layers)
        self.outputs: dict[str, Tensor] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what the layers give within, in place of what was kept before."""
        self.outputs.clear()

        def hook(name: str) -> Callable[..., None]:
            def keep(layer: nn.Module, inputs: Any, output: Tensor) -> None:
                self.outputs[name] = output.clone()  # which activations may overwrite

            return keep

        with ExitStack() as stack:
            for name, layer in self.layers.items():
                stack.callback(layer.register_forward_hook(hook(name)).remove)
            yield

    @contextmanager
    def ahead_of(self, names: Sequence[str]) -> Iterator[None]:
        """Within, layers that run before the first of these give what they gave; none do where one of these is unknown."""
        order = list(self.layers)
        first = min(map(order.index, names)) if names and set(names) <= set(order) else 0
        with ExitStack() as stack:
            for name in order[:first]:
                stack.callback(_giving(self.layers[name], self.outputs[name]))
            yield


def _giving(layer: nn.Module, output: Tensor) -> Callable[[], None]:
    """Has a layer give this; returns what undoes it."""
    before = layer.__dict__.get("forward")

    def undo() -> None:
        del layer.forward
        if before is not None:
            layer.forward = before

    layer.forward = lambda *inputs, **more: output.clone()
    return undo
