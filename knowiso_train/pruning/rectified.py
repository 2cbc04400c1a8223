"""Regressions that a rectifier follows: what lies beyond its limits is the same to whatever reads it, and need not be met."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor

from knowiso_train.pruning.refit import CHUNK, RowMoments
from knowiso_train.pruning.regression import Regression, downhill

ROUNDS = 9  # of targets and weights at most, the first of them without the rectifier
ENOUGH = 0.01  # of the share that is left: a round that gains less is the last one
MOMENTUM = 0.5  # of the step from one round's weights to the next, which is too short where much lies beyond the limits

Found = tuple[float, float, Tensor, Tensor]  # share behind the rectifier, ridge, weight (G, d, o) and intercept (G, o)


@dataclass(frozen=True)
class Limits:
    """Of a rectifier, in the unit of what the layer in front of it gives.

    Attributes:
        low: (R, G, o) or (1, G, o) float32; everything below is the same.
        high: the same above.
    """

    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, limits: tuple[float, float], scale: Tensor, offset: Tensor) -> Limits:
        """Of `clamp(scale · y + offset)`, as limits of y; none where the scale is 0.

        Args:
            limits: of the rectifier.
            scale: (o,).
            offset: (R, o) or (1, o).

        Example:
            >>> Limits.of((0.0, math.inf), torch.tensor([2.0, -1.0]), torch.tensor([[1.0, 1.0]])).low.tolist()
            [[-0.5, -inf]]
        """
        scale, offset = scale.float(), offset.float()
        ends = [torch.where(scale == 0, sign * math.inf, (end - offset) / scale) for end, sign in zip(limits, (-1, 1), strict=True)]
        return cls(torch.minimum(*ends), torch.maximum(*ends))

    def rows(self, start: int, stop: int | None) -> Limits:
        """Of these rows."""
        return Limits(*(end[start:stop] if len(end) > 1 else end for end in (self.low, self.high)))

    def grouped(self, groups: int) -> Limits:
        """(R, o) as (R, G, o / G)."""
        return Limits(*(end.view(len(end), groups, -1) for end in (self.low, self.high)))

    def passed(self, y: Tensor) -> Tensor:
        """What reaches the rectifier's readers, in the unit of y.

        Example:
            >>> Limits(torch.tensor([0.0]), torch.tensor([6.0])).passed(torch.tensor([-1.0, 2.0, 7.0])).tolist()
            [0.0, 2.0, 6.0]
        """
        return torch.maximum(torch.minimum(y, self.high.to(y)), self.low.to(y))

    def settled(self, y: Tensor, given: Tensor) -> Tensor:
        """The nearest to `given` that is the same as y to the rectifier's readers.

        Example:
            >>> Limits(torch.tensor([0.0]), torch.tensor([6.0])).settled(torch.tensor([-1.0, -1.0, 2.0]), torch.tensor([-3.0, 1.0, 1.0])).tolist()
            [-3.0, 0.0, 2.0]
        """
        low, high = self.low.to(y), self.high.to(y)
        return torch.where(y <= low, torch.minimum(given, low), torch.where(y >= high, torch.maximum(given, high), y))


@dataclass(frozen=True)
class Rectified:
    """A layer's regression when a rectifier reads what it gives.

    The loss is convex: `(p - y)²` where y lies between the limits, and where it lies beyond one, the square of what p lacks to that limit. It is
    minimised by turns (Zhang et al. 2015, arXiv 1505.06798, solve the same problem for low ranks): targets beyond a limit become what the layer
    gives where it is beyond too, then the weights are solved for these targets, with the same matrix.

    Attributes:
        regression: without the rectifier.
        x: (R, G, d), the rows of `regression`, those that are held out last.
        y: (R, G, o).
        limits: of the rectifier.
        columns: of x that `regression` was restricted to.
    """

    regression: Regression
    x: Tensor
    y: Tensor
    limits: Limits
    columns: Tensor | None = None

    def unexplained(self, weight: Tensor, bias: Tensor) -> float:
        """Share of the variance behind the rectifier that a layer leaves on the held rows.

        Args:
            weight: (G, d, o).
            bias: (G, o).

        Example:
            >>> x = torch.randn(400, 1, 3)
            >>> y = x.sum(2, keepdim=True)
            >>> limits = Limits(torch.zeros(1, 1, 1), torch.full((1, 1, 1), math.inf))
            >>> problem = Rectified(Regression.of(x, y, 40), x, y, limits)
            >>> problem.unexplained(torch.ones(1, 3, 1).double(), torch.zeros(1, 1).double()) < 1e-9
            True
        """
        limits, wanted, total = self._held
        given = limits.passed(_given(self.regression.held[0], weight, bias))
        return float((given - wanted).square().mean(0).sum()) / total if total > 0 else 0.0

    @cached_property
    def _held(self) -> tuple[Limits, Tensor, float]:
        """Of the held rows, once for all weights: limits, what passes them, and its variance summed over outputs."""
        _, y = self.regression.held
        limits = self.limits.rows(-len(y), None)
        wanted = limits.passed(y).double()
        return limits, wanted, float(wanted.var(0, correction=0).sum())

    def best(self, original: Tensor, keep: Tensor | None, ridges: Sequence[float], start: float | None = None) -> Found:
        """The least share behind the rectifier, the ridge that leaves it, its weight and its intercept; arguments are those of `Regression.best`.

        Example:
            >>> x = torch.rand(400, 1, 2)
            >>> y = x.sum(2, keepdim=True) - 1 - 5 * (x[:, :, :1] < 0.2).float()
            >>> problem = Rectified(Regression.of(x, y, 40), x, y, Limits(torch.zeros(1, 1, 1), torch.full((1, 1, 1), math.inf)))
            >>> least_squares = next(problem.rounds(torch.zeros(1, 2, 1).double(), None, [1e-6]))
            >>> problem.best(torch.zeros(1, 2, 1).double(), None, [1e-6])[0] < least_squares[0]
            True
        """
        best: Found | None = None
        for found in islice(self.rounds(original, keep, ridges, start), ROUNDS):
            last = best is not None and found[0] > (1 - ENOUGH) * best[0]
            best = found if best is None or found[0] < best[0] else best
            if last:
                break
        return best  # type: ignore[return-value]

    def rounds(self, original: Tensor, keep: Tensor | None, ridges: Sequence[float], start: float | None = None) -> Iterator[Found]:
        """What `best` chooses from, without end: first what least squares finds, which knows nothing of the rectifier."""
        moments: RowMoments = self.regression.fitted  # type: ignore[assignment]
        _, ridge, weight = self.regression.best(original, keep, ridges, start)
        bias = moments.bias(weight)
        share, before = self.unexplained(weight, bias), (weight, bias)
        while True:
            yield share, ridge, weight, bias
            moments = self._settled(*(now + MOMENTUM * (now - earlier) for now, earlier in zip((weight, bias), before, strict=True)))
            before = weight, bias

            def solved(ridge: float, moments: RowMoments = moments) -> Found:
                weight = moments.weight(original, keep, ridge)
                bias = moments.bias(weight)
                return self.unexplained(weight, bias), ridge, weight, bias

            share, ridge, weight, bias = downhill(solved, ridges, ridge)

    def _settled(self, weight: Tensor, bias: Tensor) -> RowMoments:
        """The moments of the fitted rows with targets that the layer's present outputs allow."""
        moments: RowMoments = self.regression.fitted  # type: ignore[assignment]
        moved, with_x = torch.zeros_like(moments.mean_y), torch.zeros_like(moments.xy)
        for start in range(0, self.regression.count, CHUNK):
            stop = min(start + CHUNK, self.regression.count)
            x, y = self.x[start:stop].float(), self.y[start:stop].float()
            x = x if self.columns is None else x[:, :, self.columns]
            change = self.limits.rows(start, stop).settled(y, _given(x, weight, bias)) - y
            moved += change.sum(0, dtype=torch.float64)
            with_x += x.permute(1, 2, 0) @ change.transpose(0, 1)
        moved /= self.regression.count
        xy = moments.xy + with_x / self.regression.count - moments.mean_x[..., None] * moved[:, None]
        return replace(moments, mean_y=moments.mean_y + moved, xy=xy)


def _given(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(R, G, o) float32."""
    return (x.float().transpose(0, 1) @ weight.float()).transpose(0, 1) + bias.float()
