"""Whether a folded network is the unfolded one, whatever its layers emit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from knowiso_train.errors import LayoutError
from knowiso_train.features.layout import infer_layout

SIZES = (0.1, 1.0, 30.0)  # of the random outputs, in root mean squares of the layer's own; a clamp between them is found, one beyond is not


@torch.no_grad()
def difference(truth: nn.Module, folded: nn.Module, layer: str, consumers: Sequence[str], matrix: Tensor, shift: Tensor, example: Tensor) -> float:
    """Largest relative difference of the outputs of consumers and network, the layer mapped in `truth` and its consumers changed in `folded`.

    Args:
        truth: the network as it was, float64, eval mode.
        folded: the one whose consumers have absorbed the map, likewise.
        layer: name of the mapped layer.
        consumers: names of those that read it.
        matrix: (channels, channels), float64.
        shift: (channels,), float64.
        example: a batch of inputs, float64.

    Raises:
        LayoutError: the layer does not emit one tensor with the map's channels.
    """
    emitted = _outputs(truth, [layer], example)[layer][0]
    if not isinstance(emitted, Tensor):
        raise LayoutError(f"layer {layer!r} emits a {type(emitted).__name__}; expected one tensor. Map a layer inside it")
    layout = infer_layout(layer, truth.get_submodule(layer), emitted, truth)
    axis = 1 if layout in ("nc", "nchw", "ncl") else emitted.ndim - 1
    if emitted.shape[axis] != len(matrix):
        raise LayoutError(f"layer {layer!r} emits {emitted.shape[axis]} channels (shape {tuple(emitted.shape)}), the map takes {len(matrix)}")

    def mapped(x: Tensor) -> Tensor:
        return ((x.movedim(axis, -1) @ matrix.to(x).T) + shift.to(x)).movedim(-1, axis)

    generator = torch.Generator().manual_seed(0)
    size = emitted.square().mean().sqrt().clamp_min(1e-6)
    noise = [factor * size * torch.randn(emitted.shape, generator=generator, dtype=torch.float64).to(emitted) for factor in SIZES]
    worst = 0.0
    for replaced in (None, *noise):
        wanted = _outputs(truth, consumers, example, layer, partial(_replaced, replaced, mapped))
        got = _outputs(folded, consumers, example, layer, partial(_replaced, replaced, None))
        for name, outputs in wanted.items():
            if len(outputs) != len(got[name]):
                return float("inf")
            worst = max([worst, *(_relative(a, b) for a, b in zip(outputs, got[name], strict=True))])
    return worst


def _replaced(instead: Tensor | None, mapped: Callable[[Tensor], Tensor] | None, output: Tensor) -> Tensor:
    x = output if instead is None else instead
    return x if mapped is None else mapped(x)


def _outputs(
    model: nn.Module, names: Sequence[str], example: Tensor, layer: str | None = None, change: Callable[[Tensor], Tensor] | None = None
) -> dict[str, list[Any]]:
    """What the named layers and the network (under "") emit, every time they are called, with the output of one layer changed."""
    found: dict[str, list[Any]] = {name: [] for name in names}
    handles = []
    if layer is not None and change is not None:
        handles.append(model.get_submodule(layer).register_forward_hook(lambda module, inputs, output: change(output)))
    for name in names:
        handles.append(model.get_submodule(name).register_forward_hook(lambda module, inputs, output, name=name: found[name].append(_kept(output))))
    try:
        found[""] = [model(example)]
    finally:
        for handle in handles:
            handle.remove()
    return found


def _kept(output: Any) -> Any:
    return output.clone() if isinstance(output, Tensor) else output


def _relative(wanted: Any, got: Any) -> float:
    if isinstance(wanted, (tuple, list)):
        return max((_relative(a, b) for a, b in zip(wanted, got, strict=True)), default=0.0)
    if not isinstance(wanted, Tensor):
        return 0.0
    error = float((wanted - got).abs().max() / wanted.abs().max().clamp_min(1e-12))
    return error if error == error else float("inf")  # NaN: nothing is shown
