"""Absorb a 1×1 map of a layer's channels into the layers that read it: no cost at inference, exact or refused."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from knowiso_train.errors import LayerNameError, LayoutError, OptionError, ShapeError
from knowiso_train.features import bare
from knowiso_train.refinement.probing import difference

ALLOWED = 1e-6  # relative, in float64


def fold(model: nn.Module, layer: str, consumers: Sequence[str], weight: Tensor, bias: Tensor | None, example: Tensor) -> nn.Module:
    """A copy of `model` whose consumers read `weight @ x + bias` where they read the layer's output x.

    Whether that is exact is a property of the network, so it is not tried on the example's activations alone, where a ReLU may happen not to act: the
    layer's output is also replaced by random numbers of both signs, from a tenth to thirty times its size, and every consumer's output and the
    network's are compared. In float64 throughout: the copy's own precision cannot refuse a fold, and is the only thing that rounds it.

    Args:
        model: the network; left as it is.
        layer: name of the layer whose output channels are mapped.
        consumers: names of every `Linear` or ungrouped `Conv2d` that reads this output.
        weight: (channels, channels), or (channels, channels, 1, 1).
        bias: (channels,) or None.
        example: a batch of inputs.

    Returns:
        The folded copy, of the same dtype and mode, and of the same architecture; only a consumer without a bias gets one where `bias` is given.

    Raises:
        LayerNameError: no layer of this name.
        ShapeError: a map that is k×k or does not fit a consumer's inputs.
        LayoutError: a consumer that cannot absorb the map, or a network where folded and unfolded differ: a non-linearity lies between the layer and
            a consumer, or a consumer is missing.
        OptionError: no consumers, or a bias across zero padding.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        >>> folded = fold(net, "0", ["1"], torch.eye(3) * 2, None, torch.randn(5, 4))
        >>> torch.allclose(folded[1].weight, net[1].weight * 2)
        True
    """
    matrix, shift = _checked_map(layer, weight, bias)
    names = dict(bare(model).named_modules())
    for name in (layer, *consumers):
        if not name or name not in names:
            raise LayerNameError(f"no layer {name!r} in the model; see `model.named_modules()`")
    if not consumers:
        raise OptionError(f"layer {layer!r}: expected the names of its consumers, got none")
    if layer in consumers:
        raise OptionError(f"layer {layer!r} cannot be its own consumer; name the layers that read its output")
    chosen = list(dict.fromkeys(consumers))
    folded = copy.deepcopy(bare(model))
    exact, truth = copy.deepcopy(folded).double().eval(), copy.deepcopy(folded).double().eval()
    for name in chosen:
        absorb(exact.get_submodule(name), name, matrix, shift)
    error = difference(truth, exact, layer, chosen, matrix, shift, example.double())
    if not error <= ALLOWED:
        raise LayoutError(
            f"layer {layer!r}: folded and unfolded outputs differ by {error:.1e} ({ALLOWED:.0e} allowed); "
            "a non-linearity lies between the layer and a consumer, or a consumer is missing: name all, or map the layer after the non-linearity"
        )
    for name in chosen:
        absorb(folded.get_submodule(name), name, matrix, shift)
    return folded


def absorb(module: nn.Module, name: str, matrix: Tensor, shift: Tensor) -> None:
    """Let a layer read `matrix @ x + shift` where it reads x, in place; computed in float64, kept in the layer's own dtype.

    Args:
        module: `Linear` or ungrouped `Conv2d`.
        name: for messages.
        matrix: (channels, channels).
        shift: (channels,).

    Raises:
        LayoutError: another kind of layer.
        ShapeError: other input channels.
        OptionError: a shift across zero padding.
    """
    if not isinstance(module, (nn.Linear, nn.Conv2d)) or getattr(module, "groups", 1) != 1:
        raise LayoutError(f"consumer {name!r}: expected a Linear or an ungrouped Conv2d, got {module}; the map mixes channels that it cannot mix")
    old = module.weight.detach().double()
    if old.shape[1] != matrix.shape[0]:
        raise ShapeError(f"consumer {name!r}: expected {matrix.shape[0]} input channels, got {old.shape[1]}")
    if bool(shift.any()) and _pads_with_zeros(module):
        raise OptionError(f"consumer {name!r}: a bias cannot be folded across zero padding {module.padding}; use a map without bias")
    matrix, shift = matrix.to(old), shift.to(old)
    added = torch.einsum("oc...,c->o...", old, shift).flatten(1).sum(1) if old.ndim == 4 else old @ shift
    with torch.no_grad():
        kept = module.weight
        kept.copy_(torch.einsum("oc...,ci->oi...", old, matrix))
        if module.bias is not None:
            module.bias.copy_(module.bias.double() + added)
        elif bool(shift.any()):
            module.bias = nn.Parameter(added.to(kept))


def _checked_map(layer: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    if weight.ndim == 4 and weight.shape[2:] == (1, 1):
        weight = weight[:, :, 0, 0]
    if weight.ndim != 2 or weight.shape[0] != weight.shape[1]:
        raise ShapeError(
            f"layer {layer!r}: expected a 1×1 map (channels, channels), got {tuple(weight.shape)}; a k×k map cannot be folded, fit kernel 1"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(f"layer {layer!r}: expected a bias of shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    matrix = weight.detach().double()
    return matrix, torch.zeros_like(matrix[0]) if bias is None else bias.detach().double()


def _pads_with_zeros(module: nn.Linear | nn.Conv2d) -> bool:
    if isinstance(module, nn.Linear) or module.padding_mode != "zeros":
        return False
    if isinstance(module.padding, str):
        return module.padding == "same" and max(module.kernel_size) > 1
    return any(side > 0 for side in module.padding)
