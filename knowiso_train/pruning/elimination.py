"""Backward elimination of channels."""

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

COMPACTION_RATIO = 0.75  # of the channels left: the rest goes on in smaller matrices
# Candidates of one round where there are many channels; a quarter of them go, the greedy way, before all others are
# brought up to date
CANDIDATE_POOL_SIZE = 64


@dataclass(frozen=True)
class Consumer:
    """One layer that reads a group of channels.

    Attributes:
        name: for messages.
        xx: (d, d), second moments of its input rows about their mean, per row.
        weight: (d, c), the layer's weights as regression weights.
        columns: (J, m), the columns of each of the group's J channels: m = k² for a convolution, more where a flatten
            repeats a channel. Columns of
            no channel belong to other groups, and stay.
        variance: of its output, summed over its channels: what the cost of a removal is held against.
    """

    name: str
    xx: Tensor
    weight: Tensor
    columns: Tensor
    variance: float

    @classmethod
    def of(cls, name: str, moments: Moments, weight: Tensor, columns: Tensor) -> Consumer:
        """From the moments of the layer's input and its weight.

        Args:
            name: for messages.
            moments: with the layer's input as the source; the target is not read.
            weight: (C_out, C, k, k) or (C_out, C).
            columns: (J, m), see `conv_columns`.

        Raises:
            ShapeError: a weight for other columns than the moments have, or channels that share columns.
            NonFiniteError: NaN or Inf in the moments.
            OptionError: moments of no rows.

        Example:
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
                f"{name}: weight of shape {tuple(weight.shape)} reads {len(matrix)} columns, the moments have {d}"
            )
        flat = columns.flatten()
        if (
            columns.ndim != 2
            or flat.numel() == 0
            or int(flat.min()) < 0
            or int(flat.max()) >= d
            or len(set(flat.tolist())) != len(flat)
        ):
            raise ShapeError(
                f"{name}: expected columns (J, m) that differ and lie within {d}, got shape {tuple(columns.shape)}"
            )
        if not float(moments.count) > 0:
            raise OptionError(f"{name}: no rows were seen; give some images")
        xx = moments.xx.double() / moments.count
        if not bool(xx.isfinite().all()):
            raise NonFiniteError(f"{name}: NaN or Inf in what this layer reads")
        return cls(name, xx, matrix, columns, float((matrix * (xx @ matrix)).sum()))


def removal_costs(consumers: Sequence[Consumer], ridge: float = 1e-4) -> Tensor:
    """Rise of the consumers' unexplained share when one channel goes and they are refitted: `tr(A_jᵀ ([S⁻¹]_jj)⁻¹ A_j) / Var(y)`, summed.

    Args:
        consumers: of the same J channels.
        ridge: relative ρ, as for `BackwardElimination`.

    Returns:
        (J,), float64.

    Example:
        >>> from knowiso_train.ops.im2col import conv_columns
        >>> independent = Consumer("fc", torch.eye(3, dtype=torch.float64), torch.tensor([[3.0], [0.0], [1.0]]).double(), conv_columns(3), 10.0)
        >>> [round(cost, 3) for cost in removal_costs([independent], ridge=0.0).tolist()]
        [0.9, 0.0, 0.1]
    """
    return BackwardElimination(consumers, ridge).costs()


class BackwardElimination:
    """Channels go one after another, each time the one that costs least given those that are gone; consumers are refitted after each.

    "Reconstructable from the rest" is a property of sets: of two equal channels either costs nothing, both together
    much. After the channels E are
    gone, the refitted weights are those that minimize `‖y - Bᵀx‖²/n + ρ·tr(S)/d·‖B - A‖²` with B_E = 0. The ridge is
    centered on the original weights
    A, so this is a quadratic form in A - B, and each removal is a block step of Gaussian elimination on S⁻¹ (DESIGN
    §1.4).

    Args:
        consumers: of the same J channels; their costs add up.
        ridge: relative ρ ≥ 0.

    Raises:
        ShapeError: consumers of different numbers of channels, or none.
        OptionError: a negative ridge.

    Example:
        >>> from knowiso_train.ops.im2col import conv_columns
        >>> twins = torch.ones(2, 2, dtype=torch.float64)
        >>> elimination = BackwardElimination([Consumer("fc", twins, torch.ones(2, 1).double(), conv_columns(2), 4.0)], ridge=1e-6)
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
                f"ridge must be a finite number >= 0 (relative to the mean variance of what a layer reads), got {ridge!r}"
            )
        self.kept = torch.ones(len(consumers[0].columns), dtype=torch.bool, device=consumers[0].xx.device)
        self._columns = [consumer.columns.to(consumer.xx.device) for consumer in consumers]
        self._variances = [consumer.variance for consumer in consumers]
        self._inverses = [dampened_inverse(consumer.xx, ridge) for consumer in consumers]
        self._weights = [consumer.weight.clone() for consumer in consumers]
        self._candidates: Tensor | None = None

    def costs(self) -> Tensor:
        """(J,): rise of the unexplained share, summed over consumers, if this channel went next; inf for those that are gone."""
        total = torch.zeros(len(self.kept), dtype=torch.float64, device=self.kept.device)
        left = self.kept.nonzero().flatten()
        for columns, variance, inverse, weight in self._readers():
            if not variance > 0:
                continue  # an output that never changes loses nothing
            at = columns[left]
            block, rows = inverse[at[:, :, None], at[:, None, :]], weight[at]  # (J, m, m), (J, m, c)
            solved = rows / block if block.shape[-1] == 1 else torch.linalg.solve(block, rows)
            total[left] += (rows * solved).sum((1, 2)) / variance
        return total.masked_fill(~self.kept, math.inf)

    def remove(self, channel: int) -> float:
        """Take a channel away and refit; returns what it cost.

        Raises:
            OptionError: a channel that is gone already, or does not exist.
        """
        if not 0 <= channel < len(self.kept) or not bool(self.kept[channel]):
            raise OptionError(
                f"channel {channel} cannot be removed: {int(self.kept.sum())} of {len(self.kept)} channels are left"
            )
        return self._take([channel])

    def run(self, keep: int = 1) -> tuple[list[int], list[float]]:
        """Remove the cheapest channel until `keep` are left.

        With more than 128 channels left the choice is among the 64 that were cheapest when the last sixteen had gone.

        Returns:
            Channels in the order in which they went, and what each cost.

        Raises:
            OptionError: `keep` < 1, or more than are left.
        """
        if not 1 <= keep <= int(self.kept.sum()):
            raise OptionError(
                f"keep must be between 1 and the {int(self.kept.sum())} channels that are left, got {keep}"
            )
        order: list[int] = []
        costs: list[float] = []
        while (left := int(self.kept.sum())) > keep:
            if self._candidates is not None:
                order.append(int(self.costs().argmin()))
                costs.append(self.remove(order[-1]))
                continue
            if left <= COMPACTION_RATIO * len(self.kept):
                rest = self.kept.nonzero().flatten()
                part = self._pool(rest)
                part._candidates = None
                gone, more = part.run(keep)
                self._put_back(rest, part)
                return order + rest[gone].tolist(), costs + more
            last = left <= 2 * CANDIDATE_POOL_SIZE
            pool = (
                self.kept.nonzero().flatten() if last else self.costs().topk(CANDIDATE_POOL_SIZE, largest=False).indices
            )
            gone, more = self._pool(pool).run(
                keep if last else CANDIDATE_POOL_SIZE - min(CANDIDATE_POOL_SIZE // 4, left - keep)
            )
            order += pool[gone].tolist()
            costs += more
            self._take(pool[gone].tolist())
        return order, costs

    def weights(self) -> list[Tensor]:
        """(d, c) of every consumer, refitted for what is left; rows of what is gone are 0."""
        return [weight.clone() for weight in self._weights]

    def _readers(self) -> Iterator[tuple[Tensor, float, Tensor, Tensor]]:
        return zip(self._columns, self._variances, self._inverses, self._weights, strict=True)

    def _take(self, channels: Sequence[int]) -> float:
        """Take several channels away at once and refit; returns what they cost together."""
        cost = 0.0
        for columns, variance, inverse, weight in self._readers():
            at = columns[channels].flatten()
            rows = weight[at]
            solved = torch.linalg.solve(inverse[at][:, at], torch.cat([rows, inverse[at]], 1))
            of_rows, of_inverse = solved[:, : rows.shape[1]], solved[:, rows.shape[1] :]
            if variance > 0:
                cost += float((rows * of_rows).sum()) / variance
            across = inverse[:, at].clone()
            weight.addmm_(across, of_rows, alpha=-1)
            inverse.addmm_(across, of_inverse, alpha=-1)
            weight[at], inverse[at], inverse[:, at] = 0, 0, 0
        self.kept[channels] = False
        return cost

    def _put_back(self, channels: Tensor, part: BackwardElimination) -> None:
        """What became of the channels that were left."""
        self.kept[channels] = part.kept
        for (columns, _, inverse, weight), (_, _, of_part, rows) in zip(self._readers(), part._readers(), strict=True):
            at = columns[channels].flatten()
            weight[at] = rows
            inverse[at[:, None], at] = of_part

    def _pool(self, pool: Tensor) -> BackwardElimination:
        """The same elimination among a few channels: what becomes of them depends on no others' entries."""
        part = BackwardElimination.__new__(BackwardElimination)
        part._candidates = pool
        part.kept = torch.ones(len(pool), dtype=torch.bool, device=pool.device)
        part._columns, part._variances, part._inverses, part._weights = [], list(self._variances), [], []
        for columns, _, inverse, weight in self._readers():
            at = columns[pool].flatten()
            part._columns.append(torch.arange(len(at), device=pool.device).view(len(pool), -1))
            part._inverses.append(inverse[at][:, at])
            part._weights.append(weight[at])
        return part
