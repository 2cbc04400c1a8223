"""Balancing of the loss against the gradients of the task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knowiso_train.distillation._feature_map import warn_once
from knowiso_train.errors import OptionError
from knowiso_train.features.state import KeepPrecision
from knowiso_train.utils.distributed import ProcessGroup

# Decay of the running mean squares, per backward pass
BALANCE_MOMENTUM = 0.9
# A layer whose later layers have balanced losses too receives the ratio of their gradients as well, so weights multiply
# from pair to pair; without a bound the features collapse
MAX_BALANCED_WEIGHT = 200.0
# Key of the watched branches in the metadata of an autograd node; all losses share them
METADATA_KEY = "knowiso balance"
# Autograd nodes of a hook's capture: the captured tensor is a clone, view or alias of the layer's output
CAPTURE_NODES = ("CloneBackward0", "ViewBackward0", "AliasBackward0")


@dataclass(frozen=True)
class _Branch:
    """One pair's branch of a layer's output.

    Attributes:
        output_index: Index among the outputs of the layer's autograd node.
        gradients: Gradients that arrived through this branch in the current backward pass.
        record: Function of the gradient through everything else, and of the gradient through this branch.
    """

    output_index: int
    gradients: list[Tensor]
    record: Callable[[Tensor, Tensor], None]


class GradientBalance(KeepPrecision):
    """One weight per layer pair: `w = ratio · ‖∂L_other/∂x‖ / ‖∂L_pair/∂x‖` at the student's captured feature x.

    `L_other` is the rest of the total loss that depends on x: task, logit distillation, pairs of later layers. Other
    balanced pairs of the same feature are excluded, since their weights would grow without bound. A loss scale
    (GradScaler) cancels. Norms are roots of running mean squares over backward passes and processes. Weights change at
    refreshes only, are 1 before the first measurement, and at most `MAX_BALANCED_WEIGHT`.

    Args:
        num_pairs: Number of layer pairs.
        ratio: Target ratio of the norms, positive.
        fallback: Weight of pairs in a compiled student, and of those without another loss. None: the former raise, the
            latter issue a warning and keep their weight.
    """

    weights: Tensor
    other_square: Tensor
    pair_square: Tensor

    def __init__(self, num_pairs: int, ratio: float, fallback: float | None = None) -> None:
        super().__init__()
        self.ratio, self.fallback = ratio, fallback
        self.register_buffer("weights", torch.ones(num_pairs))
        self.register_buffer("other_square", torch.zeros(num_pairs))
        self.register_buffer("pair_square", torch.zeros(num_pairs))

    def watch(self, pair: int, branch: Tensor, factor: Tensor, layer: str) -> None:
        """Measure the gradients at a feature in the coming backward pass: through this branch, and through the rest.

        Args:
            pair: Index of the pair.
            branch: View of the captured feature that only this pair's loss uses.
            factor: Weight of the pair's loss in the total loss, times further factors of its gradient, a scalar. A
                pass with factor 0 is no measurement.
            layer: Name of the student's layer, for messages.

        Raises:
            OptionError: A compiled student, whose inner gradients are not accessible, without a fallback.
        """
        node, output_index = _layer_node(branch)
        if node is None:
            if self.fallback is None:
                raise OptionError(
                    f'weight="balanced" measures the gradient at {layer!r}, which is not accessible in a compiled '
                    "student. Give a fixed weight, or compile only parts of the student outside this layer."
                )
            self.weights[pair] = self.fallback
            return
        gradients: list[Tensor] = []
        branch.register_hook(lambda gradient: gradients.append(gradient.detach()))  # type: ignore[no-untyped-call]

        def record(other: Tensor, own: Tensor) -> None:
            # `own` is the gradient of factor · L_pair
            pair_square = own.float().square().sum() / factor.to(own.device).square()
            self._record(pair, other.float().square().sum(), pair_square)

        branches: list[_Branch] = node.metadata.setdefault(METADATA_KEY, [])
        branches.append(_Branch(output_index, gradients, record))
        if len(branches) == 1:
            node.register_prehook(lambda output_gradients: _separate_gradients(output_gradients, branches))

    def _record(self, pair: int, other_square: Tensor, pair_square: Tensor) -> None:
        # Infinite in an overflowed step of a GradScaler, undefined for a pair with factor 0. Both means include the
        # same passes, so that their ratio is right from the first on
        finite = other_square.isfinite() & pair_square.to(other_square).isfinite()
        for mean, square in ((self.other_square, other_square), (self.pair_square, pair_square)):
            average = mean[pair] * BALANCE_MOMENTUM + square.to(mean) * (1 - BALANCE_MOMENTUM)
            mean[pair] = torch.where(finite.to(mean.device), average, mean[pair])

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute the weights from the measurements of all processes. Collective."""
        group = ProcessGroup()
        device = group.device if group.size > 1 else self.weights.device
        squares = torch.stack([self.other_square, self.pair_square]).to(device)
        group.sum_(squares)
        other, own = squares.to(self.weights.device)
        # Equal parts, so that the state of one process can be loaded into all
        self.other_square.copy_(other / group.size)
        self.pair_square.copy_(own / group.size)
        alone = (own > 0) & (other == 0)
        if self.fallback is not None:
            self.weights.masked_fill_(alone, self.fallback)
        elif bool(alone.any()):
            warn_once(
                self,
                'weight="balanced" has nothing to balance against: in its backward pass some paired layers get '
                "gradients from this loss alone, so their weights do not change. Call backward() once, on the sum of "
                "all losses, or give a fixed weight",
            )
        ratio = self.ratio * (other / own.clamp(min=torch.finfo(own.dtype).tiny)).sqrt()
        measured = (own > 0) & (other > 0)
        self.weights.copy_(torch.where(measured, ratio.clamp(max=MAX_BALANCED_WEIGHT), self.weights))


def _layer_node(branch: Tensor) -> tuple[Any, int]:
    """Return the autograd node that computed a layer's output, and the index among the node's outputs.

    The node is None in a compiled student, whose nodes are not accessible.
    """
    # Three nodes lie on the way from the pair's loss back to the layer:
    #   branch.grad_fn   ViewBackward0, the branch of this pair alone
    #   capture_node     the clone or view that the hook made, shared by all pairs of the layer
    #   layer_node       the layer's last operation; its output gradient is the sum over all uses of the output
    branch_node: Any = branch.grad_fn
    capture_node, _ = branch_node.next_functions[0]
    if capture_node is None or capture_node.name() not in CAPTURE_NODES:
        return None, 0
    layer_node, output_index = capture_node.next_functions[0]
    return layer_node, output_index


def _separate_gradients(output_gradients: Sequence[Tensor | None], branches: list[_Branch]) -> None:
    """Subtract the gradients of all watched branches from a layer's output gradient, and record the difference."""
    arrived = [(branch, branch.gradients.pop()) for branch in branches if branch.gradients]
    for branch, own in arrived:
        other = output_gradients[branch.output_index]
        if other is None:
            continue
        for sibling, gradient in arrived:
            if sibling.output_index == branch.output_index:
                other = other - gradient
        branch.record(other, own)
