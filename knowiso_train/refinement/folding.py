"""Folding of linear maps into the layers that consume a feature, and the map from a network to its peers and back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from knowiso_train.errors import LayerNameError, LayoutError, OptionError, ShapeError
from knowiso_train.features.layout import infer_layout
from knowiso_train.features.recording import record_outputs, remove_afterwards
from knowiso_train.features.wrappers import unwrap_model
from knowiso_train.refinement.heads import FeatureScaling
from knowiso_train.refinement.peers import row_moments
from knowiso_train.regression.ridge import LinearMap, solve_ridge
from knowiso_train.utils.hashing import split_by_hash
from knowiso_train.utils.validation import NonNegativeFloat, checked_value

# Root mean squares of random layer outputs, relative to the layer's own. A clamp beyond the largest is not detected
PROBE_SCALES = (0.1, 1.0, 30.0)

MAX_FOLD_ERROR = 1e-6  # relative, in float64
SELECT_FRACTION = 0.25  # of the images, to select the ridges of a peer projection

OutputMap = Callable[[Tensor], Tensor]


def fold(
    model: nn.Module, layer: str, consumers: Sequence[str], weight: Tensor, bias: Tensor | None, example: Tensor
) -> nn.Module:
    """Return a copy of a network whose consumers take `weight @ x + bias` where they took the layer's output x.

    Exactness is a property of the network: on the example's activations alone, a ReLU may happen to be inactive.
    The layer's output is therefore also replaced by random numbers of both signs, from a tenth to thirty times its
    size. The outputs of the consumers and of the network are compared in float64.

    Args:
        model: Network. It is not modified.
        layer: Name of the layer whose output channels are mapped.
        consumers: Names of every `Linear` or ungrouped `Conv2d` that takes this output.
        weight: (C, C) or (C, C, 1, 1).
        bias: (C,). None: no bias.
        example: Batch of inputs.

    Returns:
        Folded copy of the same dtype, mode and architecture. A consumer without a bias gets one where `bias` is given.

    Raises:
        LayerNameError: No layer of this name.
        ShapeError: A k×k map, or one that does not fit a consumer's inputs.
        LayoutError: A consumer that cannot hold the map. Or folded and unfolded outputs differ: a non-linearity lies
            between the layer and a consumer, or a consumer is missing.
        OptionError: No consumers, or a bias across zero padding.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        >>> folded = fold(net, "0", ["1"], torch.eye(3) * 2, None, torch.randn(5, 4))
        >>> torch.allclose(folded[1].weight, net[1].weight * 2)
        True
    """
    matrix, shift = _checked_map(layer, weight, bias)
    layers = dict(unwrap_model(model).named_modules())
    for name in (layer, *consumers):
        if not name or name not in layers:
            raise LayerNameError(f"no layer {name!r} in the model; see `model.named_modules()`")
    if not consumers:
        raise OptionError(f"layer {layer!r}: expected the names of its consumers, got none")
    if layer in consumers:
        raise OptionError(f"layer {layer!r} cannot be its own consumer; name the layers that take its output")
    consumers = list(dict.fromkeys(consumers))
    folded = copy.deepcopy(unwrap_model(model))
    # The check runs in float64: rounding of the copy's own dtype is no reason to refuse
    reference, folded_reference = (copy.deepcopy(folded).double().eval() for _ in range(2))
    for name in consumers:
        fold_input_map(folded_reference.get_submodule(name), name, matrix, shift)
    error = max_relative_difference(reference, folded_reference, layer, consumers, matrix, shift, example.double())
    if not error <= MAX_FOLD_ERROR:  # also where the error is NaN
        raise LayoutError(
            f"layer {layer!r}: folded and unfolded outputs differ by {error:.1e} ({MAX_FOLD_ERROR:.0e} allowed); "
            "a non-linearity lies between the layer and a consumer, or a consumer is missing. Name all consumers, or "
            "map the layer after the non-linearity"
        )
    for name in consumers:
        fold_input_map(folded.get_submodule(name), name, matrix, shift)
    return folded


def fold_input_map(module: nn.Module, name: str, matrix: Tensor, shift: Tensor) -> None:
    """Change a layer in place so that it takes `matrix @ x + shift` where it took x.

    The computation is in float64, the result in the layer's own dtype.

    Args:
        module: `Linear` or ungrouped `Conv2d`.
        name: Name of the layer in messages.
        matrix: (C, C).
        shift: (C,).

    Raises:
        LayoutError: Another kind of layer.
        ShapeError: Another number of input channels.
        OptionError: A shift across zero padding.
    """
    if not isinstance(module, (nn.Linear, nn.Conv2d)) or getattr(module, "groups", 1) != 1:
        raise LayoutError(
            f"consumer {name!r}: expected a Linear or an ungrouped Conv2d, got {module}; the map mixes channels that "
            "it cannot mix"
        )
    weight = module.weight.detach().double()
    if weight.shape[1] != matrix.shape[0]:
        raise ShapeError(f"consumer {name!r}: expected {matrix.shape[0]} input channels, got {weight.shape[1]}")
    if bool(shift.any()) and _pads_with_zeros(module):
        # Padded positions would have to hold `shift`, but they are zero
        raise OptionError(
            f"consumer {name!r}: a bias cannot be folded across zero padding {module.padding}; use a map without bias"
        )
    matrix, shift = matrix.to(weight), shift.to(weight)
    # W(Mx + s) + b = (WM)x + (Ws + b); for a convolution, s is summed over the kernel
    added = torch.einsum("oc...,c->o...", weight, shift).flatten(1).sum(1) if weight.ndim == 4 else weight @ shift
    with torch.no_grad():
        module.weight.copy_(torch.einsum("oc...,ci->oi...", weight, matrix))
        if module.bias is not None:
            module.bias.copy_(module.bias.double() + added)
        elif bool(shift.any()):
            module.bias = nn.Parameter(added.to(module.weight))


@torch.no_grad()
def max_relative_difference(
    reference: nn.Module,
    folded: nn.Module,
    layer: str,
    consumers: Sequence[str],
    matrix: Tensor,
    shift: Tensor,
    example: Tensor,
) -> float:
    """Compute the largest relative difference between a network with a mapped layer and one with folded consumers.

    Args:
        reference: Network whose layer is mapped; float64, eval mode.
        folded: Network whose consumers hold the map; float64, eval mode.
        layer: Name of the mapped layer.
        consumers: Names of the layers that take its output.
        matrix: (C, C), float64.
        shift: (C,), float64.
        example: Batch of inputs, float64.

    Returns:
        Maximum over the consumers, the network, the example's own activations and random ones. Infinite: NaN, or a
        consumer is called a different number of times.

    Raises:
        LayoutError: The layer's output is not one tensor with C channels.
    """
    output = _record_outputs(reference, [layer], example)[layer][0]
    if not isinstance(output, Tensor):
        raise LayoutError(
            f"layer {layer!r} has an output of type {type(output).__name__}; expected one tensor. Map a layer inside it"
        )
    layout = infer_layout(layer, reference.get_submodule(layer), output, reference)
    axis = 1 if layout in ("nc", "nchw", "ncl") else output.ndim - 1
    if output.shape[axis] != len(matrix):
        raise LayoutError(
            f"layer {layer!r} has {output.shape[axis]} output channels (shape {tuple(output.shape)}), the map takes "
            f"{len(matrix)}"
        )

    def apply_map(x: Tensor) -> Tensor:
        return ((x.movedim(axis, -1) @ matrix.to(x).T) + shift.to(x)).movedim(-1, axis)

    worst = 0.0
    for replacement in (None, *_random_outputs(output)):
        mapped = _record_outputs(reference, consumers, example, layer, _replace_and_map(replacement, apply_map))
        unmapped = _record_outputs(folded, consumers, example, layer, _replace_and_map(replacement, None))
        for name, outputs in mapped.items():
            if len(outputs) != len(unmapped[name]):
                return float("inf")
            worst = max([worst, *(_relative_error(a, b) for a, b in zip(outputs, unmapped[name], strict=True))])
    return worst


@dataclass(frozen=True)
class PeerProjection:
    """Affine map of a network's features to their part that peers predict.

    Attributes:
        matrix: (D, D), float64.
        shift: (D,), float64.
        ridges: Ridges of the regressions to the peers and back.
    """

    matrix: Tensor
    shift: Tensor
    ridges: tuple[float, float]

    def __call__(self, features: Tensor) -> Tensor:
        """Map features (N, D), in float64."""
        return features.double() @ self.matrix.T + self.shift


def fit_peer_projection(
    features: Tensor, peers: Sequence[Tensor], *, ridge: float | Literal["search"] = "search", seed: int = 0
) -> PeerProjection:
    """Fit the order-0 isomorphic part of a network's features as a map of these features. No labels.

    Two ridge regressions are composed: features → peers, ŷ = W₁x + b₁, and peers → features, x̂ = W₂ŷ + b₂. With
    `ridge="search"` both ridges are selected on held-out images. A peer equal to the network then gives the identity,
    and a peer of independent features little more than the mean.

    Args:
        features: (N, D) pooled features of the network.
        peers: (N, D_i) pooled features of each peer, on the same images.
        ridge: Relative ridge of both regressions, or "search".
        seed: Seed of the split: 75 % to fit and 25 % to select the ridges.

    Raises:
        ShapeError: No peers, or different numbers of images.
        OptionError: A negative ridge, or another string.

    Examples:
        >>> x = torch.randn(200, 3)
        >>> torch.allclose(fit_peer_projection(x, [x]).matrix, torch.eye(3).double(), atol=1e-4)
        True
    """
    if not peers or any(len(peer) != len(features) for peer in peers):
        raise ShapeError(
            f"expected peers on the same {len(features)} images, got {[tuple(peer.shape) for peer in peers]}"
        )
    checked_value("ridge", ridge, NonNegativeFloat | Literal["search"])
    scalings = [FeatureScaling.fit(rows, "the features") for rows in peers]
    of_peers = torch.cat([scaling(rows) for scaling, rows in zip(scalings, peers, strict=True)], 1)
    of_model = features.double()
    part = split_by_hash(np.arange(len(features), dtype=np.int64), (1 - SELECT_FRACTION, SELECT_FRACTION), seed)
    select = torch.from_numpy(part == 1)
    to_peers = _fit_map(of_model, of_peers, select, ridge)
    to_model = _fit_map(of_peers, of_model, select, ridge)
    # LinearMap stores weights (inputs, outputs): x̂ = W₂ᵀ(W₁ᵀx + b₁) + b₂
    matrix = (to_peers.weight @ to_model.weight).T
    shift = to_model.bias + to_model.weight.T @ to_peers.bias
    return PeerProjection(matrix, shift, (to_peers.ridge, to_model.ridge))


def _fit_map(x: Tensor, y: Tensor, select: Tensor, ridge: float | Literal["search"]) -> LinearMap:
    if ridge != "search":
        return solve_ridge(row_moments(x, y), float(ridge))
    return solve_ridge(row_moments(x[~select], y[~select]), "search", row_moments(x[select], y[select]))


def _random_outputs(output: Tensor) -> list[Tensor]:
    """Draw random replacements of a layer's output, at every scale of `PROBE_SCALES`."""
    generator = torch.Generator().manual_seed(0)
    size = output.square().mean().sqrt().clamp_min(1e-6)
    return [
        scale * size * torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
        for scale in PROBE_SCALES
    ]


def _replace_and_map(replacement: Tensor | None, output_map: OutputMap | None) -> OutputMap:
    def change(output: Tensor) -> Tensor:
        x = output if replacement is None else replacement
        return x if output_map is None else output_map(x)

    return change


def _record_outputs(
    model: nn.Module, names: Sequence[str], example: Tensor, layer: str | None = None, change: OutputMap | None = None
) -> dict[str, list[Any]]:
    """Record the outputs of layers and of the network (under "") per call, with the output of one layer changed."""
    handles = []
    if layer is not None and change is not None:
        handles.append(model.get_submodule(layer).register_forward_hook(lambda module, inputs, output: change(output)))
    # Registered before the recording hooks, which therefore record the changed output
    modules = {name: model.get_submodule(name) for name in names}
    with remove_afterwards(handles), record_outputs(modules, _copy) as outputs:
        network_output = model(example)
    return {**{name: outputs.get(name, []) for name in names}, "": [network_output]}


def _copy(output: Any) -> Any:
    # A later in-place activation would overwrite the tensor
    return output.clone() if isinstance(output, Tensor) else output


def _relative_error(expected: Any, actual: Any) -> float:
    if isinstance(expected, (tuple, list)):
        return max((_relative_error(a, b) for a, b in zip(expected, actual, strict=True)), default=0.0)
    if not isinstance(expected, Tensor):
        return 0.0
    error = float((expected - actual).abs().max() / expected.abs().max().clamp_min(1e-12))
    return error if error == error else float("inf")  # NaN proves nothing


def _checked_map(layer: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Check a map's shapes, and return its matrix (C, C) and shift (C,) in float64."""
    if weight.ndim == 4 and weight.shape[2:] == (1, 1):
        weight = weight[:, :, 0, 0]
    if weight.ndim != 2 or weight.shape[0] != weight.shape[1]:
        raise ShapeError(
            f"layer {layer!r}: expected a 1×1 map (channels, channels), got {tuple(weight.shape)}; "
            "a k×k map cannot be folded, fit kernel 1"
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
