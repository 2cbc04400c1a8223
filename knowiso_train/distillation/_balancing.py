"""Balancing of the loss against the gradients of the task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knowiso_train.distillation._feature_map import warn_once
from knowiso_train.distillation._scale import gradient_norm
from knowiso_train.distillation.config import FALLBACK_WEIGHT, IsomorphismLossConfig
from knowiso_train.errors import OptionError
from knowiso_train.features.state import KeepPrecision
from knowiso_train.utils.distributed import ProcessGroup

# Decay of the running mean squares, per backward pass
BALANCE_MOMENTUM = 0.9
# An early layer is balanced against the losses of later layers too, so that weights multiply from pair to pair. Without
# a bound the features collapse
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
    refreshes, and in a compiled student in the first call with a solved map. They are 1 before, and at most
    `MAX_BALANCED_WEIGHT`.

    Args:
        num_pairs: Number of layer pairs.
        ratio: Target ratio of the norms, positive.
        fallback: Weight of pairs that cannot be balanced: in a compiled student, and without another loss, with a
            warning. None: a compiled student raises an error; without another loss the weight stays, with a warning.
    """

    weights: Tensor
    other_square: Tensor
    pair_square: Tensor
    alone: Tensor

    def __init__(self, num_pairs: int, ratio: float, fallback: float | None = None) -> None:
        super().__init__()
        self.ratio, self.fallback = ratio, fallback
        self.issued_warnings: set[str] = set()
        self.register_buffer("weights", torch.ones(num_pairs))
        self.register_buffer("other_square", torch.zeros(num_pairs))
        self.register_buffer("pair_square", torch.zeros(num_pairs))
        # 1 where no other loss had a gradient in the last backward pass with one of the pair
        self.register_buffer("alone", torch.zeros(num_pairs), persistent=False)

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
                    'student. Use weight="auto", which is fixed there, or a number, or compile only parts of the '
                    "student without this layer."
                )
            warn_once(
                self,
                f'weight="auto" is {self.fallback:g} at {layer!r}: the gradients inside a compiled student are not '
                f"accessible. Pass weight={self.fallback:g}, or another number",
            )
            self.weights[pair] = self.fallback
            self.other_square[pair] = self.pair_square[pair] = self.alone[pair] = 0
            return
        gradients: list[Tensor] = []
        branch.register_hook(lambda gradient: gradients.append(gradient.detach()))  # type: ignore[no-untyped-call]

        def record(other: Tensor, own: Tensor) -> None:
            # `own` is the gradient of factor · L_pair
            pair_norm = gradient_norm(own) / factor.to(own.device)
            self._record(pair, gradient_norm(other).square(), pair_norm.square())

        branches: list[_Branch] = node.metadata.setdefault(METADATA_KEY, [])
        branches.append(_Branch(output_index, gradients, record))
        if len(branches) == 1:
            node.register_prehook(lambda output_gradients: _separate_gradients(output_gradients, branches))

    def _record(self, pair: int, other_square: Tensor, pair_square: Tensor) -> None:
        other, own = other_square.to(self.other_square), pair_square.to(self.pair_square)
        # Infinite in an overflowed step of a GradScaler, undefined for a pair with factor 0
        usable = other.isfinite() & own.isfinite() & (own > 0)
        self.alone[pair] = torch.where(usable, (other == 0).to(self.alone), self.alone[pair])
        # Both means include the same passes, so that their ratio is right from the first on
        for mean, square in ((self.other_square, other), (self.pair_square, own)):
            average = mean[pair] * BALANCE_MOMENTUM + square * (1 - BALANCE_MOMENTUM)
            mean[pair] = torch.where(usable & (other > 0), average, mean[pair])

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute the weights from the measurements of all processes. Collective."""
        group = ProcessGroup()
        device = group.device if group.size > 1 else self.weights.device
        sums = torch.stack([self.other_square, self.pair_square, self.alone]).to(device)
        group.sum_(sums)
        # Equal parts, so that the state of one process can be loaded into all
        other, own, alone = sums.to(self.weights.device) / group.size
        self.other_square.copy_(other)
        self.pair_square.copy_(own)
        ratio = self.ratio * (other / own.clamp(min=torch.finfo(own.dtype).tiny)).sqrt()
        measured = (own > 0) & (other > 0) & (alone < 1)
        self.weights.copy_(torch.where(measured, ratio.clamp(max=MAX_BALANCED_WEIGHT), self.weights))
        if self.fallback is not None:
            self.weights.masked_fill_(alone == 1, self.fallback)
        if not self.issued_warnings and bool((alone == 1).any()):
            kind, result, options = (
                ("balanced", "do not change", 'use weight="auto" or a number')
                if self.fallback is None
                else ("auto", f"are {self.fallback:g}", f"pass weight={self.fallback:g} or another number")
            )
            warn_once(
                self,
                f'weight="{kind}" has nothing to balance against: in its backward pass some paired layers get '
                f"gradients from this loss alone, so their weights {result}. Call backward() once on the sum of all "
                f"losses, or {options}",
            )


def make_balance(config: IsomorphismLossConfig, num_pairs: int) -> GradientBalance | None:
    """Return the balance of the options' weights; None: fixed weights."""
    if not isinstance(config.weight, str):
        return None
    fallback = min(MAX_BALANCED_WEIGHT, FALLBACK_WEIGHT * config.ratio) if config.weight == "auto" else None
    return GradientBalance(num_pairs, config.ratio, fallback)


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
        siblings = [gradient for sibling, gradient in arrived if sibling.output_index == branch.output_index]
        for gradient in siblings:
            other = other - gradient
        if len(siblings) > 1:
            # The sum of several gradients is rounded: a difference of that size is no gradient of another loss
            rounding = torch.finfo(own.dtype).eps * sum(gradient_norm(gradient) for gradient in siblings)
            other = torch.where(gradient_norm(other) > rounding, other, torch.zeros_like(other))
        branch.record(other, own)
