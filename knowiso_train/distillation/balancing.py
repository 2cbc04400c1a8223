"""Balancing of the loss against the gradients of the task."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from knowiso_train.distillation.estimators import warn_once
from knowiso_train.errors import OptionError
from knowiso_train.features.state import KeepPrecision
from knowiso_train.utils.distributed import ProcessGroup

BALANCE_MOMENTUM = 0.9  # of the running mean squares, per backward
MAX_BALANCED_WEIGHT = 1e4
METADATA_KEY = "knowiso balance"
# Output of the node, gradients of a branch, and what takes rest and own
Watched = tuple[int, list[Tensor], Callable[[Tensor, Tensor], None]]
CAPTURE_NODES = ("CloneBackward0", "ViewBackward0", "AliasBackward0")  # the graph node of a capture


class GradientBalance(KeepPrecision):
    """One weight per layer pair: `ratio · ‖∂ rest / ∂ x‖ / ‖∂ own / ∂ x‖` at the student's tapped feature x.

    "Rest" is everything else that the total loss asks of that feature: the task, logit distillation, pairs further up;
    not other balanced pairs of
    the same feature, of this loss or another, which would drive each other up. A loss scale (GradScaler) cancels. Norms
    are running means of squares
    over backwards and processes; weights change at refreshes only and are 1 until there is a measurement.

    Args:
        pairs: number of layer pairs.
        ratio: wanted ratio of the norms, positive.
    """

    weights: Tensor
    rest: Tensor
    own: Tensor

    def __init__(self, pairs: int, ratio: float) -> None:
        super().__init__()
        self.ratio = ratio
        self.register_buffer("weights", torch.ones(pairs))
        self.register_buffer("rest", torch.zeros(pairs))
        self.register_buffer("own", torch.zeros(pairs))

    def watch(self, pair: int, branch: Tensor, factor: Tensor | float, layer: str) -> None:
        """Measure, in the coming backward, the gradient that arrives at a feature through this branch and through everything else.

        Args:
            pair: its index.
            branch: a view of the tap's capture that only the pair's loss reads.
            factor: what the pair's loss is multiplied by in the total.
            layer: name of the student's layer, for messages.

        Raises:
            OptionError: a compiled student, whose inner gradients cannot be seen.
        """
        tap = branch.grad_fn.next_functions[0][0]  # type: ignore[union-attr]
        if tap is None or tap.name() not in CAPTURE_NODES:
            raise OptionError(
                f'weight="balanced" measures the gradient that arrives at {layer!r}, which a compiled student hides. '
                "Give a fixed weight, or compile only parts of the student that lie around this layer."
            )
        node, index = tap.next_functions[0]  # the layer's own, behind the tap's clone or view
        if node is None:
            return
        through: list[Tensor] = []
        branch.register_hook(lambda gradient: through.append(gradient.detach()))  # type: ignore[no-untyped-call]

        def take(rest: Tensor, own: Tensor) -> None:
            scale = factor if isinstance(factor, Tensor) else torch.tensor(factor, device=own.device)
            self._record(pair, rest.float().square().sum(), own.float().square().sum() / scale.to(own.device).square())

        watched: list[Watched] = node.metadata.setdefault(METADATA_KEY, [])  # type: ignore[union-attr]  # of all losses, since they share the layer's node
        watched.append((index, through, take))
        if len(watched) == 1:
            node.register_prehook(lambda gradients: _measure(gradients, watched))

    def _record(self, pair: int, rest: Tensor, own: Tensor) -> None:
        for kept, new in ((self.rest, rest), (self.own, own)):
            usable = new.isfinite()  # a GradScaler's overflowed step
            kept[pair] = torch.where(
                usable, kept[pair] * BALANCE_MOMENTUM + new.to(kept) * (1 - BALANCE_MOMENTUM), kept[pair]
            )

    @torch.no_grad()
    def refresh(self, group: ProcessGroup) -> None:
        """Weights from what was measured, over all processes. Collective."""
        sums = torch.stack([self.rest, self.own]).to(group.device if group.size > 1 else self.rest.device)
        group.sum_(sums)
        rest, own = sums.to(self.weights.device)
        self.rest.copy_(rest / group.size)  # equal parts, so that one process's state serves all
        self.own.copy_(own / group.size)
        if bool(((own > 0) & (rest == 0)).any()):
            warn_once(
                self,
                'weight="balanced" has nothing to balance against: only this loss reaches some of the paired layers in its backward pass, so their '
                "weights stay as they are. Call backward() once, on the sum of all losses, or give a fixed weight",
            )
        known = (own > 0) & (rest > 0)
        ratio = self.ratio * (rest / own.clamp(min=torch.finfo(own.dtype).tiny)).sqrt()
        self.weights.copy_(torch.where(known, ratio.clamp(max=MAX_BALANCED_WEIGHT), self.weights))


def _measure(gradients: Sequence[Tensor | None], watched: list[Watched]) -> None:
    """What arrives at a layer's outputs, less what all watched branches brought."""
    found = [(index, through.pop(), take) for index, through, take in watched if through]
    for index, own, take in found:
        total = gradients[index]
        if total is not None:
            for other, branch, _ in found:
                total = total - branch if other == index else total
            take(total, own)
