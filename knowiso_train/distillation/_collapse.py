"""Detection of student features that collapse, and the weights of their losses until they recover."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from knowiso_train.errors import CollapseError, KnowisoWarning
from knowiso_train.features.modules import LayerPair
from knowiso_train.utils.distributed import ProcessGroup

# Fractions of the reference variance and of the reference rank above 1 below which a feature has collapsed; the rank of
# healthy features fell to 0.13 of the first in the early steps of ResNet-8 on CIFAR-10
MIN_VARIANCE_FRACTION, MIN_RANK_FRACTION = 1e-2, 0.03
# Multiple of these fractions above which a feature is healthy. In between the factor is constant
HEALTHY_DISTANCE = 3.0
# Step of the reference variance in a healthy refresh, as a fraction of the logarithmic difference. It follows weight
# decay, which shrinks features before a normalization without harm
REFERENCE_RATE = 0.02
# Consecutive refreshes with a collapsed feature before the weight is lowered, since single batches may be unusual, and
# before the error
COLLAPSED_REFRESHES, MAX_COLLAPSED_REFRESHES = 3, 25
# Change of the factor in a collapsed and in a healthy refresh, and its minimum. With halves instead of eighths fewer
# students recovered
COLLAPSED_CHANGE, HEALTHY_CHANGE, MIN_COLLAPSE_FACTOR = 0.125, 1.1, 1e-3
# Positions of a batch that are measured: fewer estimate no rank, more cost time
MIN_POSITIONS, MAX_POSITIONS = 16, 4096


@dataclass
class _PairState:
    """State of a pair, of which the reference is 0 before the first measurement."""

    variance: float = 0.0
    rank: float = 0.0
    num_collapsed: int = 0
    factor: float = 1.0


class CollapseGuard:
    """Factors of the pairs' weights, which are lowered while the student's features are collapsed.

    A feature has collapsed where its variance or its rank is a small fraction of the reference: of its own at the first
    refresh, or of the teacher's rank where that is lower. The factor falls to an eighth at the third refresh in a row
    and at every further one, and grows back to 1 once the features are healthy. All processes have the same factors.
    Units that are dead, with a gradient of 0 for all images, do not recover.

    Args:
        pairs: Layer pairs.

    Examples:
        >>> guard, features = CollapseGuard([LayerPair("layer2", "layer3")]), torch.randn(8, 6, 4, 4)
        >>> guard.refresh([features], [features], weights=[50.0])
        >>> guard.refresh([features[:, :1].expand(-1, 6, -1, -1)], [features], weights=[50.0])  # one direction
        >>> guard.states[0].num_collapsed, guard.factor(0)  # 1/8 after 3 calls
        (1, 1.0)
    """

    def __init__(self, pairs: Sequence[LayerPair]) -> None:
        self.pairs = pairs
        self.states = [_PairState() for _ in pairs]
        self._warned: set[LayerPair] = set()

    def factor(self, index: int) -> float:
        """Return the factor of the weight of a pair."""
        return self.states[index].factor

    def refresh(self, features: Sequence[Tensor], targets: Sequence[Tensor], weights: Sequence[float] | Tensor) -> None:
        """Compare the features of all pairs with their references, and change the factors. Collective.

        Reads the device.

        Args:
            features: Features (N, C, H, W) of the student, by pair.
            targets: Features (N, C, H, W) of the teacher, by pair.
            weights: Weights without the factors, for messages.

        Raises:
            CollapseError: A feature that is still collapsed after `MAX_COLLAPSED_REFRESHES` refreshes in a row.
        """
        new = [index for index, state in enumerate(self.states) if not state.variance]
        group = ProcessGroup()
        measured = [variance_and_rank(x) for x in (*features, *(targets[index] for index in new))]
        figures = torch.stack([row.to(group.device if group.size > 1 else measured[0].device) for row in measured])
        group.sum_(figures)
        values: list[list[float]] = (figures / group.size).tolist()
        for index, (_, teacher_rank) in zip(new, values[len(features) :], strict=True):
            variance, rank = values[index]
            if math.isfinite(variance + rank):
                self.states[index] = _PairState(variance, min(rank, teacher_rank) if teacher_rank > 0 else rank)
        for index, (variance, rank) in enumerate(values[: len(features)]):
            if math.isfinite(variance + rank) and self.states[index].variance:
                self._update(index, variance, rank, weights)

    def state(self) -> list[float]:
        """Return reference variance and rank, number of collapsed refreshes and factor of every pair."""
        return [figure for state in self.states for figure in astuple(state)]

    def set_state(self, figures: Sequence[float]) -> None:
        """Restore the figures of `state`."""
        rows = zip(*[iter(figures)] * 4, strict=True)
        self.states = [_PairState(variance, rank, int(number), factor) for variance, rank, number, factor in rows]

    def _update(self, index: int, variance: float, rank: float, weights: Sequence[float] | Tensor) -> None:
        state = self.states[index]
        # Distance from the collapse, which is below 1
        distance = variance / state.variance / MIN_VARIANCE_FRACTION
        if state.rank > 1:
            distance = min(distance, (rank - 1) / (state.rank - 1) / MIN_RANK_FRACTION)
        if distance >= 1:
            state.num_collapsed = 0
            if distance >= HEALTHY_DISTANCE:
                state.factor = min(1.0, state.factor * HEALTHY_CHANGE)
                state.variance *= (variance / state.variance) ** REFERENCE_RATE
            return
        state.num_collapsed += 1
        if state.num_collapsed < COLLAPSED_REFRESHES:
            return
        state.factor = max(MIN_COLLAPSE_FACTOR, state.factor * COLLAPSED_CHANGE)
        weight = float(weights[index]) * state.factor
        figures = (
            f"variance {variance:.3g} after {state.variance:.3g}, effective rank {rank:.3g} after {state.rank:.3g}"
        )
        pair = self.pairs[index]
        if state.num_collapsed >= MAX_COLLAPSED_REFRESHES:
            raise CollapseError(
                f"{pair.source}: the student's features stay collapsed, although the weight of their loss was lowered "
                f"to {weight:.2g}: {figures}. Restart from a checkpoint before the collapse, with a tenth of "
                "weight= if it is a number, else with ratio=0.3, or with a lower learning rate"
            )
        if pair not in self._warned:
            self._warned.add(pair)
            warnings.warn(
                f"{pair.source}: the student's features have collapsed since the loss began: {figures}. The weight of "
                f"their loss is lowered to {weight:.3g}, and further until they recover; restart with a lower "
                "weight= if it is a number, else a lower ratio=, or with a lower learning rate",
                KnowisoWarning,
                stacklevel=2,
            )


@torch.no_grad()
def variance_and_rank(feature: Tensor) -> Tensor:
    """Return the mean channel variance of a feature (N, C, H, W) and the effective rank of its correlations, (2,).

    The effective rank is `C² / ‖R‖²` with the correlation matrix R of the C channels that vary: the participation
    ratio `(Σ λ)² / Σ λ²` of its eigenvalues, which no channel of large variance dominates. NaN for too few positions.

    Examples:
        >>> one = torch.randn(64, 1, 2, 2)
        >>> round(float(variance_and_rank(one.expand(-1, 5, -1, -1))[1]), 3)
        1.0
    """
    rows = feature.detach().movedim(1, -1).flatten(0, -2)
    if len(rows) < MIN_POSITIONS:
        return torch.full((2,), math.nan, device=feature.device)
    rows = rows[:: math.ceil(len(rows) / MAX_POSITIONS)].float()
    rows = rows - rows.mean(0)
    variances = rows.square().mean(0)
    # Columns of unit norm; a channel without variance stays 0 and is not counted
    directions = rows / (len(rows) * variances.clamp(min=torch.finfo(variances.dtype).tiny)).sqrt()
    with torch.autocast(feature.device.type, enabled=False):
        correlations = directions.T @ directions
    rank = correlations.diagonal().sum().square() / correlations.square().sum()
    # Without any channel that varies the rank is 0 / 0
    return torch.stack([variances.mean(), rank.where(variances.any(), torch.ones_like(rank))])
