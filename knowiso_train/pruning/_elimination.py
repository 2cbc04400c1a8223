"""Backward elimination of channels by the cost of removing them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from knowiso_train.errors import NonFiniteError, OptionError, ShapeError
from knowiso_train.ops.im2col import regression_weight
from knowiso_train.regression.moments import Moments
from knowiso_train.regression.ridge import dampened_inverse

COMPACTION_RATIO = 0.75  # fraction of channels: below it the elimination continues in smaller matrices
# Candidates of one round where there are many channels. A quarter of them is removed one by one before all others are
# updated
CANDIDATE_POOL_SIZE = 64

ABSENT_FEATURE = -1  # entry of the columns of a channel that a consumer does not take


@dataclass(frozen=True)
class Consumer:
    """Layer that consumes a group of channels, as a regression.

    Attributes:
        name: Name for messages.
        xx: Covariance (d, d) of its input samples.
        weight: Weights (d, c) of the layer as regression weights.
        columns: Features (J, m) of each of the J channels of the group: m = k² for a convolution, more where a flatten
            repeats a channel. Features of no channel belong to other groups, and stay. A row of -1 is a channel that
            the layer does not take, whose removal costs it nothing.
        variance: Variance of its output, summed over output channels: the unit of removal costs.
    """

    name: str
    xx: Tensor
    weight: Tensor
    columns: Tensor
    variance: float

    @classmethod
    def of(cls, name: str, moments: Moments, weight: Tensor, columns: Tensor) -> Consumer:
        """Build a consumer from the moments of a layer's input and its weight.

        Args:
            name: Name for messages.
            moments: Moments with the layer's input as the source; the target is not used.
            weight: Weight (C_out, C, k, k) or (C_out, C).
            columns: Features (J, m) of each channel, see `conv_columns`.

        Raises:
            ShapeError: A weight of other features than the moments, or channels that share features.
            NonFiniteError: NaN or Inf in the moments.
            OptionError: Moments of no samples.

        Examples:
            >>> from knowiso_train.regression import batch_moments
            >>> from knowiso_train.ops.im2col import conv_columns
            >>> x = torch.randn(64, 4, 5, 5)
            >>> consumer = Consumer.of("conv", batch_moments(x, x, 3), torch.randn(8, 4, 3, 3), conv_columns(4, 3))
            >>> consumer.columns.shape
            torch.Size([4, 9])
        """
        matrix, d = regression_weight(weight.detach()).double(), len(moments.mean_x)
        if len(matrix) != d:
            raise ShapeError(
                f"{name}: weight of shape {tuple(weight.shape)} has {len(matrix)} features, the moments have {d}"
            )
        flat = columns[_present(columns)].flatten() if columns.ndim == 2 else columns.flatten()
        within = columns.ndim == 2 and flat.numel() > 0 and int(flat.min()) >= 0 and int(flat.max()) < d
        if not within or len(set(flat.tolist())) != len(flat):
            raise ShapeError(
                f"{name}: expected columns (J, m) that differ and lie within {d}, got shape {tuple(columns.shape)}"
            )
        if not float(moments.count) > 0:
            raise OptionError(f"{name}: the moments have no samples; give some images")
        xx = moments.xx.double() / moments.count
        if not bool(xx.isfinite().all()):
            raise NonFiniteError(f"{name}: NaN or Inf in the input of this layer")
        return cls(name, xx, matrix, columns, output_variance(xx, matrix))


def _present(columns: Tensor) -> Tensor:
    """Return the mask (J,) of the channels that a consumer takes."""
    return (columns != ABSENT_FEATURE).any(1)


def _features(columns: Tensor, channels: Tensor | Sequence[int]) -> Tensor:
    """Return the features of some channels, without those of channels that the consumer does not take."""
    selected = columns[channels]
    return selected[_present(selected)].flatten()


def output_variance(xx: Tensor, weight: Tensor) -> float:
    """Return the variance tr(Wᵀ S W) of a layer's output, summed over output channels.

    Examples:
        >>> output_variance(torch.eye(2), torch.tensor([[3.0], [1.0]]))
        10.0
    """
    return float((weight * (xx @ weight)).sum())


def removal_costs(consumers: Sequence[Consumer], ridge: float = 1e-4) -> Tensor:
    """Return the rise of the consumers' unexplained variance when one channel is removed and they are refitted.

    The cost of channel j is `tr(A_jᵀ ([S⁻¹]_jj)⁻¹ A_j) / Var(y)`, summed over consumers, with the covariance S of
    a consumer's input and the weights A_j of the channel (Optimal Brain Surgeon, for blocks of weights).

    Args:
        consumers: Consumers of the same J channels.
        ridge: Relative ρ, as for `BackwardElimination`.

    Returns:
        Costs (J,), float64.

    Examples:
        >>> from knowiso_train.ops.im2col import conv_columns
        >>> xx, weight = torch.eye(3, dtype=torch.float64), torch.tensor([[3.0], [0.0], [1.0]]).double()
        >>> costs = removal_costs([Consumer("fc", xx, weight, conv_columns(3), variance=10.0)], ridge=0.0)
        >>> [round(cost, 3) for cost in costs.tolist()]
        [0.9, 0.0, 0.1]
    """
    return BackwardElimination(consumers, ridge).costs()


class BackwardElimination:
    """Remove channels one by one, each time the one of least cost given those removed before, and refit the consumers.

    Redundancy is a property of sets: of two equal channels either one costs nothing, both together much. After removal
    of the channels E the weights minimize `‖y - Bᵀx‖²/n + ρ·tr(S)/d·‖B - A‖²` subject to B_E = 0, with the original
    weights A. This is a quadratic form in A - B, so that each removal is a block step of Gaussian elimination on S⁻¹.

    Args:
        consumers: Consumers of the same J channels; their costs add up.
        ridge: Relative ρ ≥ 0: dampening as a fraction of the mean diagonal.

    Attributes:
        remaining: Mask (J,) of the channels that are not removed.

    Raises:
        ShapeError: Consumers of different numbers of channels, or none.
        OptionError: A negative ridge.

    Examples:
        >>> from knowiso_train.ops.im2col import conv_columns
        >>> equal, weight = torch.ones(2, 2, dtype=torch.float64), torch.ones(2, 1).double()
        >>> elimination = BackwardElimination([Consumer("fc", equal, weight, conv_columns(2), 4.0)], ridge=1e-6)
        >>> elimination.remove(0) < 1e-5, elimination.costs()[1].item() > 0.9
        (True, True)
    """

    def __init__(self, consumers: Sequence[Consumer], ridge: float = 1e-4) -> None:
        if not consumers or len({len(consumer.columns) for consumer in consumers}) != 1:
            raise ShapeError(
                f"expected consumers of the same channels, got {[(c.name, len(c.columns)) for c in consumers]}"
            )
        if not 0 <= ridge < math.inf:
            raise OptionError(
                f"ridge must be a finite number >= 0 (relative to the mean variance of a layer's input), got {ridge!r}"
            )
        self.remaining = torch.ones(len(consumers[0].columns), dtype=torch.bool, device=consumers[0].xx.device)
        self._columns = [consumer.columns.to(consumer.xx.device) for consumer in consumers]
        self._variances = [consumer.variance for consumer in consumers]
        self._inverses = [dampened_inverse(consumer.xx, ridge) for consumer in consumers]
        self._weights = [consumer.weight.clone() for consumer in consumers]
        self._exhaustive = False  # all candidates are updated after every removal

    def costs(self) -> Tensor:
        """Return the removal cost (J,) of each channel, summed over consumers; inf for removed channels."""
        total = torch.zeros(len(self.remaining), dtype=torch.float64, device=self.remaining.device)
        remaining = self.remaining.nonzero().flatten()
        for columns, variance, inverse, weight in self._consumers():
            if not variance > 0:
                continue  # a constant output loses nothing
            channels = remaining[_present(columns[remaining])]
            features = columns[channels]
            # [S⁻¹]_jj (J, m, m) and B_j (J, m, c); cost tr(B_jᵀ ([S⁻¹]_jj)⁻¹ B_j)
            block, rows = inverse[features[:, :, None], features[:, None, :]], weight[features]
            solution = rows / block if block.shape[-1] == 1 else torch.linalg.solve(block, rows)
            total[channels] += (rows * solution).sum((1, 2)) / variance
        return total.masked_fill(~self.remaining, math.inf)

    def remove(self, channel: int) -> float:
        """Remove a channel, refit the consumers and return the cost.

        Raises:
            OptionError: A channel that is removed already or does not exist.
        """
        if not 0 <= channel < len(self.remaining) or not bool(self.remaining[channel]):
            count = int(self.remaining.sum())
            raise OptionError(
                f"channel {channel} cannot be removed: {count} of {len(self.remaining)} channels are left"
            )
        return self._remove_many([channel])

    def eliminate_until(self, keep: int = 1) -> tuple[list[int], list[float]]:
        """Remove the cheapest channel until `keep` are left.

        With more than 128 channels left, the choice is among the 64 cheapest ones, which are updated every 16 removals.

        Returns:
            Channels in the order of removal, and the cost of each removal.

        Raises:
            OptionError: A `keep` below 1, or above the number of channels that are left.
        """
        if not 1 <= keep <= int(self.remaining.sum()):
            raise OptionError(
                f"keep must be between 1 and the {int(self.remaining.sum())} channels that are left, got {keep}"
            )
        order: list[int] = []
        costs: list[float] = []
        while (count := int(self.remaining.sum())) > keep:
            if self._exhaustive:
                order.append(int(self.costs().argmin()))
                costs.append(self.remove(order[-1]))
                continue
            if count <= COMPACTION_RATIO * len(self.remaining):
                remaining = self.remaining.nonzero().flatten()
                part = self._restricted(remaining, exhaustive=False)
                part_order, part_costs = part.eliminate_until(keep)
                self._merge(remaining, part)
                return order + remaining[part_order].tolist(), costs + part_costs
            if count <= 2 * CANDIDATE_POOL_SIZE:
                pool, pool_keep = self.remaining.nonzero().flatten(), keep
            else:
                pool = self.costs().topk(CANDIDATE_POOL_SIZE, largest=False).indices
                pool_keep = CANDIDATE_POOL_SIZE - min(CANDIDATE_POOL_SIZE // 4, count - keep)
            pool_order, pool_costs = self._restricted(pool, exhaustive=True).eliminate_until(pool_keep)
            order += pool[pool_order].tolist()
            costs += pool_costs
            self._remove_many(pool[pool_order].tolist())
        return order, costs

    def weights(self) -> list[Tensor]:
        """Return the refitted weights (d, c) of every consumer; rows of removed channels are 0."""
        return [weight.clone() for weight in self._weights]

    def _consumers(self) -> Iterator[tuple[Tensor, float, Tensor, Tensor]]:
        return zip(self._columns, self._variances, self._inverses, self._weights, strict=True)

    def _remove_many(self, channels: Sequence[int]) -> float:
        """Remove several channels at once, refit the consumers and return the cost."""
        cost = 0.0
        for columns, variance, inverse, weight in self._consumers():
            features = _features(columns, channels)
            if not len(features):
                continue
            rows = weight[features]
            # With E the removed features and P = S⁻¹: B ← B - P_·E P_EE⁻¹ B_E and P ← P - P_·E P_EE⁻¹ P_E·
            solution = torch.linalg.solve(inverse[features][:, features], torch.cat([rows, inverse[features]], 1))
            of_rows, of_inverse = solution[:, : rows.shape[1]], solution[:, rows.shape[1] :]
            if variance > 0:
                cost += float((rows * of_rows).sum()) / variance
            across = inverse[:, features].clone()
            weight.addmm_(across, of_rows, alpha=-1)
            inverse.addmm_(across, of_inverse, alpha=-1)
            # Exactly, not to rounding
            weight[features], inverse[features], inverse[:, features] = 0, 0, 0
        self.remaining[channels] = False
        return cost

    def _restricted(self, pool: Tensor, *, exhaustive: bool) -> BackwardElimination:
        """Return the elimination among some channels: the update of their entries depends on no other entries."""
        part = BackwardElimination.__new__(BackwardElimination)
        part._exhaustive = exhaustive
        part.remaining = torch.ones(len(pool), dtype=torch.bool, device=pool.device)
        part._columns, part._variances, part._inverses, part._weights = [], list(self._variances), [], []
        for columns, _, inverse, weight in self._consumers():
            features = _features(columns, pool)
            part_columns = torch.full_like(columns[pool], ABSENT_FEATURE)
            part_columns[_present(columns[pool])] = torch.arange(len(features), device=pool.device).view(
                -1, columns.shape[1]
            )
            part._columns.append(part_columns)
            part._inverses.append(inverse[features][:, features])
            part._weights.append(weight[features])
        return part

    def _merge(self, channels: Tensor, part: BackwardElimination) -> None:
        """Write back the elimination among some channels, when all others are removed."""
        self.remaining[channels] = part.remaining
        for (columns, _, inverse, weight), (_, _, of_part, rows) in zip(
            self._consumers(), part._consumers(), strict=True
        ):
            features = _features(columns, channels)
            weight[features] = rows
            inverse[features[:, None], features] = of_part
