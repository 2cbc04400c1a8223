"""Weights that keep the loss's gradient in a fixed ratio to that of the rest, measured in the backward pass that runs anyway."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from knowiso_train.errors import OptionError
from knowiso_train.statistics import Group

KEEP = 0.9  # of the running mean squares, per backward
LARGEST = 1e4
TAPS = ("CloneBackward0", "ViewBackward0", "AliasBackward0")  # the graph node of a capture


class GradientBalance(nn.Module):
    """One weight per layer pair: `ratio · ‖∂ rest / ∂ x‖ / ‖∂ own / ∂ x‖` at the student's tapped feature x.

    "Rest" is everything else that the total loss asks of that feature: the task, logit distillation, pairs further up. A loss scale (GradScaler)
    cancels. Norms are running means of squares over backwards and processes; weights change at refreshes only and are 1 until there is a measurement.

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
        if tap is None or tap.name() not in TAPS:
            raise OptionError(
                f'weight="balanced" measures the gradient that arrives at {layer!r}, which a compiled student hides. '
                "Give a fixed weight, or compile only parts of the student that lie around this layer."
            )
        node, index = tap.next_functions[0]  # the layer's own, behind the tap's clone or view
        if node is None:
            return
        through: list[Tensor] = []
        branch.register_hook(lambda gradient: through.append(gradient.detach()))  # type: ignore[no-untyped-call]

        def measure(gradients: Sequence[Tensor | None]) -> None:
            total = gradients[index]
            if total is None or not through:
                return
            own = through.pop()
            scale = factor if isinstance(factor, Tensor) else torch.tensor(factor, device=own.device)
            self._record(pair, (total - own).float().square().sum(), own.float().square().sum() / scale.to(own.device).square())

        node.register_prehook(measure)

    def _record(self, pair: int, rest: Tensor, own: Tensor) -> None:
        for kept, new in ((self.rest, rest), (self.own, own)):
            usable = new.isfinite()  # a GradScaler's overflowed step
            kept[pair] = torch.where(usable, kept[pair] * KEEP + new.to(kept) * (1 - KEEP), kept[pair])

    @torch.no_grad()
    def refresh(self, group: Group) -> None:
        """Weights from what was measured, over all processes. Collective."""
        sums = torch.stack([self.rest, self.own]).to(group.device if group.size > 1 else self.rest.device)
        group.sum_(sums)
        rest, own = sums.to(self.weights.device)
        self.rest.copy_(rest / group.size)  # equal parts, so that one process's state serves all
        self.own.copy_(own / group.size)
        known = (own > 0) & (rest > 0)
        ratio = self.ratio * (rest / own.clamp(min=torch.finfo(own.dtype).tiny)).sqrt()
        self.weights.copy_(torch.where(known, ratio.clamp(max=LARGEST), self.weights))
