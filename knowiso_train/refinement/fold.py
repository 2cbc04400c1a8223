"""Absorb a 1×1 map of a layer's channels into the layers that read it: no cost at inference, exact or refused."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from knowiso_train.errors import LayerNameError, LayoutError, OptionError, ShapeError


def fold(model: nn.Module, layer: str, consumers: Sequence[str], weight: Tensor, bias: Tensor | None, example: Tensor) -> nn.Module:
    """A copy of `model` whose consumers read `weight @ x + bias` where they read the layer's output x.

    Args:
        model: the network; left as it is.
        layer: name of the layer whose output channels are mapped.
        consumers: names of every `Linear` or ungrouped `Conv2d` that reads this output.
        weight: (channels, channels), or (channels, channels, 1, 1).
        bias: (channels,) or None.
        example: a batch of inputs; the copy is compared on it, in float64 and eval mode, with the model whose layer is mapped by a hook.

    Returns:
        The folded copy, of the same architecture.

    Raises:
        LayerNameError: no layer of this name.
        ShapeError: a map that is k×k or does not fit a consumer's inputs.
        LayoutError: a consumer that cannot absorb the map, or a network where the result differs on the example.
        OptionError: no consumers, or a bias across zero padding.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        >>> folded = fold(net, "0", ["1"], torch.eye(3) * 2, None, torch.randn(5, 4))
        >>> torch.allclose(folded[1].weight, net[1].weight * 2)
        True
    """
    if weight.ndim == 4 and weight.shape[2:] == (1, 1):
        weight = weight[:, :, 0, 0]
    if weight.ndim != 2 or weight.shape[0] != weight.shape[1]:
        raise ShapeError(
            f"layer {layer!r}: expected a 1×1 map (channels, channels), got {tuple(weight.shape)}; a k×k map cannot be folded, fit kernel 1"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(f"layer {layer!r}: expected a bias of shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    names = dict(model.named_modules())
    for name in (layer, *consumers):
        if name not in names:
            raise LayerNameError(f"no layer {name!r} in the model; see `model.named_modules()`")
    if not consumers:
        raise OptionError(f"layer {layer!r}: expected the names of its consumers, got none")
    folded, truth = copy.deepcopy(model), copy.deepcopy(model).double().eval()
    matrix = weight.detach().double()
    shift = torch.zeros_like(matrix[0]) if bias is None else bias.detach().double()
    for name in dict.fromkeys(consumers):
        _absorb(folded.get_submodule(name), name, matrix, shift)

    def mapped(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if output.ndim == 4:
            return torch.einsum("oc,nchw->nohw", matrix.to(output), output) + shift.to(output)[:, None, None]
        return output @ matrix.to(output).T + shift.to(output)

    truth.get_submodule(layer).register_forward_hook(mapped)
    with torch.no_grad():
        wanted, got = truth(example.double()), copy.deepcopy(folded).double().eval()(example.double())
    error = float((wanted - got).abs().max() / wanted.abs().max().clamp_min(1e-12))
    if not error <= 1e-6:
        raise LayoutError(
            f"layer {layer!r}: folded and unfolded outputs differ by {error:.1e} (1e-6 allowed); "
            "a non-linearity lies between the layer and a consumer, or a consumer is missing: name all, or map the layer after the non-linearity"
        )
    return folded


def _absorb(module: nn.Module, name: str, matrix: Tensor, shift: Tensor) -> None:
    if not isinstance(module, (nn.Linear, nn.Conv2d)) or getattr(module, "groups", 1) != 1:
        raise LayoutError(f"consumer {name!r}: expected a Linear or an ungrouped Conv2d, got {module}; the map mixes channels that it cannot mix")
    old = module.weight.detach().double()
    if old.shape[1] != matrix.shape[0]:
        raise ShapeError(f"consumer {name!r}: expected {matrix.shape[0]} input channels, got {old.shape[1]}")
    if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros" and module.padding not in ((0, 0), "valid") and bool(shift.any()):
        raise OptionError(f"consumer {name!r}: a bias cannot be folded across zero padding {module.padding}; use a map without bias")
    matrix, shift = matrix.to(old), shift.to(old)
    added = torch.einsum("oc...,c->o...", old, shift).flatten(1).sum(1) if old.ndim == 4 else old @ shift
    with torch.no_grad():
        kept = module.weight
        kept.copy_(torch.einsum("oc...,ci->oi...", old, matrix))
        if module.bias is not None:
            module.bias.add_(added)
        elif bool(shift.any()):
            module.bias = nn.Parameter(added.to(kept))
