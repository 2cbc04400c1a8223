"""Folding of linear maps into the layers that consume them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from knowiso_train.errors import LayerNameError, LayoutError, OptionError, ShapeError
from knowiso_train.features.hooks import record_outputs, remove_afterwards
from knowiso_train.features.layout import infer_layout
from knowiso_train.features.modules import unwrap_model
from knowiso_train.refinement.heads import FeatureScaling
from knowiso_train.regression.moments import Moments, batch_moments
from knowiso_train.regression.ridge import LinearMap, solve_ridge
from knowiso_train.utils.hashing import split_by_hash

# Of the random outputs, in root mean squares of the layer's own; a clamp between them is found, one beyond is not
PROBE_SCALES = (0.1, 1.0, 30.0)

MAX_FOLD_ERROR = 1e-6  # relative, in float64


@torch.no_grad()
def max_relative_difference(
    truth: nn.Module,
    folded: nn.Module,
    layer: str,
    consumers: Sequence[str],
    matrix: Tensor,
    shift: Tensor,
    example: Tensor,
) -> float:
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
        raise LayoutError(
            f"layer {layer!r} emits a {type(emitted).__name__}; expected one tensor. Map a layer inside it"
        )
    layout = infer_layout(layer, truth.get_submodule(layer), emitted, truth)
    axis = 1 if layout in ("nc", "nchw", "ncl") else emitted.ndim - 1
    if emitted.shape[axis] != len(matrix):
        raise LayoutError(
            f"layer {layer!r} emits {emitted.shape[axis]} channels (shape {tuple(emitted.shape)}), the map takes {len(matrix)}"
        )

    def mapped(x: Tensor) -> Tensor:
        return ((x.movedim(axis, -1) @ matrix.to(x).T) + shift.to(x)).movedim(-1, axis)

    generator = torch.Generator().manual_seed(0)
    size = emitted.square().mean().sqrt().clamp_min(1e-6)
    noise = [
        factor * size * torch.randn(emitted.shape, generator=generator, dtype=torch.float64).to(emitted)
        for factor in PROBE_SCALES
    ]
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
    model: nn.Module,
    names: Sequence[str],
    example: Tensor,
    layer: str | None = None,
    change: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, list[Any]]:
    """What the named layers and the network (under "") emit, every time they are called, with the output of one layer changed."""
    handles = []
    if layer is not None and change is not None:
        handles.append(model.get_submodule(layer).register_forward_hook(lambda module, inputs, output: change(output)))
    # Registered before the recording hooks, which therefore record the changed output.
    modules = {name: model.get_submodule(name) for name in names}
    with remove_afterwards(handles), record_outputs(modules, _copy) as outputs:
        network_output = model(example)
    return {**{name: outputs.get(name, []) for name in names}, "": [network_output]}


def _copy(output: Any) -> Any:
    return output.clone() if isinstance(output, Tensor) else output


def _relative(wanted: Any, got: Any) -> float:
    if isinstance(wanted, (tuple, list)):
        return max((_relative(a, b) for a, b in zip(wanted, got, strict=True)), default=0.0)
    if not isinstance(wanted, Tensor):
        return 0.0
    error = float((wanted - got).abs().max() / wanted.abs().max().clamp_min(1e-12))
    return error if error == error else float("inf")  # NaN: nothing is shown


def fold(
    model: nn.Module, layer: str, consumers: Sequence[str], weight: Tensor, bias: Tensor | None, example: Tensor
) -> nn.Module:
    """A copy of `model` whose consumers read `weight @ x + bias` where they read the layer's output x.

    Whether that is exact is a property of the network, so it is not tried on the example's activations alone, where a
    ReLU may happen not to act: the
    layer's output is also replaced by random numbers of both signs, from a tenth to thirty times its size, and every
    consumer's output and the
    network's are compared. In float64 throughout: the copy's own precision cannot refuse a fold, and is the only thing
    that rounds it.

    Args:
        model: the network; left as it is.
        layer: name of the layer whose output channels are mapped.
        consumers: names of every `Linear` or ungrouped `Conv2d` that reads this output.
        weight: (channels, channels), or (channels, channels, 1, 1).
        bias: (channels,) or None.
        example: a batch of inputs.

    Returns:
        The folded copy, of the same dtype and mode, and of the same architecture; only a consumer without a bias gets
        one where `bias` is given.

    Raises:
        LayerNameError: no layer of this name.
        ShapeError: a map that is k×k or does not fit a consumer's inputs.
        LayoutError: a consumer that cannot absorb the map, or a network where folded and unfolded differ: a
            non-linearity lies between the layer and
            a consumer, or a consumer is missing.
        OptionError: no consumers, or a bias across zero padding.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        >>> folded = fold(net, "0", ["1"], torch.eye(3) * 2, None, torch.randn(5, 4))
        >>> torch.allclose(folded[1].weight, net[1].weight * 2)
        True
    """
    matrix, shift = _checked_map(layer, weight, bias)
    names = dict(unwrap_model(model).named_modules())
    for name in (layer, *consumers):
        if not name or name not in names:
            raise LayerNameError(f"no layer {name!r} in the model; see `model.named_modules()`")
    if not consumers:
        raise OptionError(f"layer {layer!r}: expected the names of its consumers, got none")
    if layer in consumers:
        raise OptionError(f"layer {layer!r} cannot be its own consumer; name the layers that read its output")
    chosen = list(dict.fromkeys(consumers))
    folded = copy.deepcopy(unwrap_model(model))
    exact, truth = copy.deepcopy(folded).double().eval(), copy.deepcopy(folded).double().eval()
    for name in chosen:
        fold_input_map(exact.get_submodule(name), name, matrix, shift)
    error = max_relative_difference(truth, exact, layer, chosen, matrix, shift, example.double())
    if not error <= MAX_FOLD_ERROR:
        raise LayoutError(
            f"layer {layer!r}: folded and unfolded outputs differ by {error:.1e} ({MAX_FOLD_ERROR:.0e} allowed); "
            "a non-linearity lies between the layer and a consumer, or a consumer is missing: name all, or map the layer after the non-linearity"
        )
    for name in chosen:
        fold_input_map(folded.get_submodule(name), name, matrix, shift)
    return folded


def fold_input_map(module: nn.Module, name: str, matrix: Tensor, shift: Tensor) -> None:
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
        raise LayoutError(
            f"consumer {name!r}: expected a Linear or an ungrouped Conv2d, got {module}; the map mixes channels that it cannot mix"
        )
    old = module.weight.detach().double()
    if old.shape[1] != matrix.shape[0]:
        raise ShapeError(f"consumer {name!r}: expected {matrix.shape[0]} input channels, got {old.shape[1]}")
    if bool(shift.any()) and _pads_with_zeros(module):
        raise OptionError(
            f"consumer {name!r}: a bias cannot be folded across zero padding {module.padding}; use a map without bias"
        )
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


@dataclass(frozen=True)
class PeerProjection:
    """`matrix @ x + shift`, of a network's own channels.

    Attributes:
        matrix: (D, D), float64.
        shift: (D,), float64.
        ridges: chosen, own → peers and peers → own.
    """

    matrix: Tensor
    shift: Tensor
    ridges: tuple[float, float]

    def __call__(self, features: Tensor) -> Tensor:
        """Rows (N, D)."""
        return features.double() @ self.matrix.T + self.shift


def fit_peer_projection(
    own: Tensor, peers: Sequence[Tensor], *, ridge: float | str = "search", seed: int = 0
) -> PeerProjection:
    """The order-0 isomorphic part of a network's features: what its peers know of them, told from the features themselves. No labels.

    Two regressions, own → peers and peers → own, one after the other. With `ridge="search"` both ridges are chosen on
    held-out rows;
    a peer that is the network itself then gives the identity, and a peer that knows nothing gives little more than the
    mean.

    Args:
        own: (N, D) pooled features of the network.
        peers: (N, D_i) of each peer, on the same images.
        ridge: relative ridge of both regressions, or "search".
        seed: of the split, 75 % to fit and 25 % to select on.

    Raises:
        ShapeError: no peers, or other numbers of images.
        OptionError: a ridge without meaning.

    Example:
        >>> x = torch.randn(200, 3)
        >>> torch.allclose(fit_peer_projection(x, [x]).matrix, torch.eye(3).double(), atol=1e-4)
        True
    """
    if not peers or any(len(peer) != len(own) for peer in peers):
        raise ShapeError(f"expected peers on the same {len(own)} images, got {[tuple(peer.shape) for peer in peers]}")
    if ridge != "search" and (isinstance(ridge, str) or not ridge >= 0):
        raise OptionError(f'ridge must be "search" or a number >= 0, got {ridge!r}')
    scalings = [FeatureScaling.fit(rows, "the features") for rows in peers]
    other = torch.cat([scaling(rows) for scaling, rows in zip(scalings, peers, strict=True)], 1)
    rows = own.double()
    held = torch.from_numpy(split_by_hash(np.arange(len(own), dtype=np.int64), (0.75, 0.25), seed) == 1)
    there, back = _map(rows, other, held, ridge), _map(other, rows, held, ridge)
    matrix = (there.weight @ back.weight).T
    return PeerProjection(matrix, back.bias + back.weight.T @ there.bias, (there.ridge, back.ridge))


def _map(x: Tensor, y: Tensor, held: Tensor, ridge: float | str) -> LinearMap:
    def moments(mask: Tensor) -> Moments:
        return batch_moments(x[mask][:, :, None, None], y[mask][:, :, None, None])

    if ridge != "search":
        return solve_ridge(batch_moments(x[:, :, None, None], y[:, :, None, None]), float(ridge))
    return solve_ridge(moments(~held), "search", moments(held))
