"""Regression of a layer on the outputs of the original layer, plain and before a ReLU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from knowiso_train.pruning.reference_outputs import WIDE_LAYER_FEATURES
from knowiso_train.regression.ridge import ROW_CHUNK_SIZE, KernelMoments, PrimalMoments

SELECTION_FRACTION = 0.1  # of the images: the unexplained shares are measured on them
MIN_SELECTION_SAMPLES = 16  # rows held out, below which every row is both fitted and reported on
AnyMoments = PrimalMoments | KernelMoments
Rows = tuple[Tensor, Tensor]  # (R, G, d) and (R, G, o)
Solved = TypeVar("Solved", bound=tuple[Any, ...])

MAX_RELU_ITERATIONS = 9  # of targets and weights at most, the first of them without the rectifier
MIN_RELATIVE_GAIN = 0.01  # of the share that is left: a round that gains less is the last one
# Of the step from one round's weights to the next, which is too short where much lies beyond the limits
ITERATE_MOMENTUM = 0.5
# Share behind the rectifier, ridge, weight (G, d, o) and intercept (G, o)
Found = tuple[float, float, Tensor, Tensor]


@dataclass(frozen=True)
class LayerRegression:
    """What a layer reads and should give.

    Attributes:
        fitted: moments of the rows to fit on.
        held: the rows to report on; those that are fitted where there are too few. No layer before this one was fitted
            on their images.
        of_held: their moments; None where regressors are too many.
        count: rows to fit on.
        total: variance of what the layer should give on the held rows, summed over outputs.
    """

    fitted: AnyMoments
    held: Rows
    of_held: PrimalMoments | None
    count: int
    total: float

    @classmethod
    def of(cls, x: Tensor, y: Tensor, images: int) -> LayerRegression:
        """From rows (R, G, d) and (R, G, o), image after image.

        Raises:
            NonFiniteError: NaN or Inf in the rows.

        Example:
            >>> x, a = torch.randn(400, 1, 3).double(), torch.randn(1, 3, 2).double()
            >>> found = LayerRegression.of(x, torch.einsum("rgd,gdo->rgo", x, a), images=40)
            >>> found.unexplained(a) < 1e-12, found.best(torch.zeros_like(a), None, [1e-9, 1.0])[1]
            (True, 1e-09)
        """
        y = y.to(x.device)
        count = int(SELECTION_FRACTION * images) * (len(x) // images)
        apart = count >= MIN_SELECTION_SAMPLES
        fitted, held = ((x[:-count], y[:-count]), (x[-count:], y[-count:])) if apart else ((x, y), (x, y))
        total = float(held[1].double().var(0, correction=0).sum())
        if x.shape[2] > WIDE_LAYER_FEATURES and len(fitted[0]) <= x.shape[2]:
            return cls(KernelMoments.of(*fitted), held, None, len(fitted[0]), total)
        moments = PrimalMoments.of(*fitted)
        return cls(moments, held, PrimalMoments.of(*held) if apart else moments, len(fitted[0]), total)

    def restricted(self, at: Tensor) -> LayerRegression:
        """On these columns alone.

        Example:
            >>> x, y, at = torch.randn(400, 1, 3), torch.randn(400, 1, 2), torch.tensor([2, 0])
            >>> a, b = LayerRegression.of(x, y, 40).restricted(at), LayerRegression.of(x[:, :, at], y, 40)
            >>> torch.allclose(a.fitted.weight(torch.zeros(1, 2, 2)), b.fitted.weight(torch.zeros(1, 2, 2)))
            True
        """
        x, y = self.held
        of_held = None if self.of_held is None else self.of_held.restricted(at)
        return replace(self, fitted=self.fitted.restricted(at), held=(x[:, :, at], y), of_held=of_held)

    def unexplained(self, weight: Tensor) -> float:
        """Share of the variance of what the layer should give that a weight (G, d, o) leaves on the held rows, with the best intercept."""
        x, y = self.held
        left = y.double() - torch.einsum("rgd,gdo->rgo", x.double(), weight)
        return float(left.var(0, correction=0).sum()) / self.total if self.total > 0 else 0.0

    def best(
        self, original: Tensor, keep: Tensor | None, ridges: Sequence[float], start: float | None = None
    ) -> tuple[float, float, Tensor]:
        """The least unexplained share on the held rows, the ridge that leaves it, and its weight.

        From the ridge of the layer before, downhill to both sides: what is left rises to both sides of the best ridge.

        Args:
            original: (G, d, o) float64, what the ridge draws towards.
            keep: (G, d), the columns that are left; None is all.
            ridges: to choose from.
            start: where to begin; in the middle if it is not among them.

        Example:
            >>> x, a = torch.randn(400, 1, 3).double(), torch.randn(1, 3, 2).double()
            >>> found = LayerRegression.of(x, torch.einsum("rgd,gdo->rgo", x, a), images=40)
            >>> [found.best(0 * a, None, (1e-6, 1e-3, 1.0, 10.0), start)[1] for start in (None, 10.0, 1e-6)]
            [1e-06, 1e-06, 1e-06]
        """

        def solved(ridge: float) -> tuple[float, float, Tensor]:
            weight = self.fitted.weight(original, keep, ridge)
            return (
                self.unexplained(weight) if self.of_held is None else self.of_held.unexplained(weight, self.total),
                ridge,
                weight,
            )

        return local_ridge_search(solved, ridges, start)


def local_ridge_search(
    solved: Callable[[float], Solved], ridges: Sequence[float], start: float | None = None
) -> Solved:
    """The best of what `solved(ridge)` gives, its share first and its ridge second: from one ridge on, as long as the next one is better.

    Args:
        solved: of one ridge.
        ridges: to choose from.
        start: where to begin; in the middle if it is not among them.

    Example:
        >>> local_ridge_search(lambda ridge: ((ridge - 2) ** 2, ridge), (0.0, 1.0, 2.0, 3.0), 0.0)
        (0.0, 2.0)
    """
    best: Solved | None = None

    def share(ridge: float) -> float:
        nonlocal best
        found = solved(ridge)
        if best is None or found[:2] < best[:2]:
            best = found
        return float(found[0])

    tried = sorted(set(ridges))
    if math.inf in tried:  # costs nothing, and is no neighbor of the others
        share(tried.pop())
    if tried:
        middle = tried.index(start) if start in tried else len(tried) // 2
        first = share(tried[middle])
        for step in (-1, 1):
            at, last = middle, first
            while 0 <= at + step < len(tried):
                here = share(tried[at + step])
                if here > last or (here == last and step > 0):
                    break
                at, last = at + step, here
            if at != middle:  # it was downhill: not to the other side
                break
    return best  # type: ignore[return-value]


@dataclass(frozen=True)
class ActivationRange:
    """Of a rectifier, in the unit of what the layer in front of it gives.

    Attributes:
        low: (R, G, o) or (1, G, o) float32; everything below is the same.
        high: the same above.
    """

    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, limits: tuple[float, float], scale: Tensor, offset: Tensor) -> ActivationRange:
        """Of `clamp(scale · y + offset)`, as limits of y; none where the scale is 0.

        Args:
            limits: of the rectifier.
            scale: (o,).
            offset: (R, o) or (1, o).

        Example:
            >>> ActivationRange.of((0.0, math.inf), torch.tensor([2.0, -1.0]), torch.tensor([[1.0, 1.0]])).low.tolist()
            [[-0.5, -inf]]
        """
        scale, offset = scale.float(), offset.float()
        ends = [
            torch.where(scale == 0, sign * math.inf, (end - offset) / scale)
            for end, sign in zip(limits, (-1, 1), strict=True)
        ]
        return cls(torch.minimum(*ends), torch.maximum(*ends))

    def rows(self, start: int, stop: int | None) -> ActivationRange:
        """Of these rows."""
        return ActivationRange(*(end[start:stop] if len(end) > 1 else end for end in (self.low, self.high)))

    def grouped(self, groups: int) -> ActivationRange:
        """(R, o) as (R, G, o / G)."""
        return ActivationRange(*(end.view(len(end), groups, -1) for end in (self.low, self.high)))

    def passed(self, y: Tensor) -> Tensor:
        """What reaches the rectifier's readers, in the unit of y.

        Example:
            >>> ActivationRange(torch.tensor([0.0]), torch.tensor([6.0])).passed(torch.tensor([-1.0, 2.0, 7.0])).tolist()
            [0.0, 2.0, 6.0]
        """
        return torch.maximum(torch.minimum(y, self.high.to(y)), self.low.to(y))

    def settled(self, y: Tensor, given: Tensor) -> Tensor:
        """The nearest to `given` that is the same as y to the rectifier's readers.

        Example:
            >>> ActivationRange(torch.tensor([0.0]), torch.tensor([6.0])).settled(torch.tensor([-1.0, -1.0, 2.0]), torch.tensor([-3.0, 1.0, 1.0])).tolist()
            [-3.0, 0.0, 2.0]
        """
        low, high = self.low.to(y), self.high.to(y)
        return torch.where(y <= low, torch.minimum(given, low), torch.where(y >= high, torch.maximum(given, high), y))


@dataclass(frozen=True)
class ReLURegression:
    """A layer's regression when a rectifier reads what it gives.

    The loss is convex: `(p - y)²` where y lies between the limits, and where it lies beyond one, the square of what p
        lacks to that limit. It is
    minimized by turns (Zhang et al. 2015, arXiv 1505.06798, solve the same problem for low ranks): targets beyond a
    limit become what the layer
    gives where it is beyond too, then the weights are solved for these targets, with the same matrix.

    Attributes:
        regression: without the rectifier.
        x: (R, G, d), the rows of `regression`, those that are held out last.
        y: (R, G, o).
        limits: of the rectifier.
        columns: of x that `regression` was restricted to.
    """

    regression: LayerRegression
    x: Tensor
    y: Tensor
    limits: ActivationRange
    columns: Tensor | None = None

    def unexplained(self, weight: Tensor, bias: Tensor) -> float:
        """Share of the variance behind the rectifier that a layer leaves on the held rows.

        Args:
            weight: (G, d, o).
            bias: (G, o).

        Example:
            >>> x = torch.randn(400, 1, 3)
            >>> y = x.sum(2, keepdim=True)
            >>> limits = ActivationRange(torch.zeros(1, 1, 1), torch.full((1, 1, 1), math.inf))
            >>> problem = ReLURegression(LayerRegression.of(x, y, 40), x, y, limits)
            >>> problem.unexplained(torch.ones(1, 3, 1).double(), torch.zeros(1, 1).double()) < 1e-9
            True
        """
        limits, wanted, total = self._held
        given = limits.passed(_given(self.regression.held[0], weight, bias))
        return float((given - wanted).square().mean(0).sum()) / total if total > 0 else 0.0

    @cached_property
    def _held(self) -> tuple[ActivationRange, Tensor, float]:
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
            >>> problem = ReLURegression(LayerRegression.of(x, y, 40), x, y, ActivationRange(torch.zeros(1, 1, 1), torch.full((1, 1, 1), math.inf)))
            >>> least_squares = next(problem.rounds(torch.zeros(1, 2, 1).double(), None, [1e-6]))
            >>> problem.best(torch.zeros(1, 2, 1).double(), None, [1e-6])[0] < least_squares[0]
            True
        """
        best: Found | None = None
        for found in islice(self.rounds(original, keep, ridges, start), MAX_RELU_ITERATIONS):
            last = best is not None and found[0] > (1 - MIN_RELATIVE_GAIN) * best[0]
            best = found if best is None or found[0] < best[0] else best
            if last:
                break
        return best  # type: ignore[return-value]

    def rounds(
        self, original: Tensor, keep: Tensor | None, ridges: Sequence[float], start: float | None = None
    ) -> Iterator[Found]:
        """What `best` chooses from, without end: first what least squares finds, which knows nothing of the rectifier."""
        moments: PrimalMoments = self.regression.fitted  # type: ignore[assignment]
        _, ridge, weight = self.regression.best(original, keep, ridges, start)
        bias = moments.bias(weight)
        share, before = self.unexplained(weight, bias), (weight, bias)
        while True:
            yield share, ridge, weight, bias
            moments = self._settled(
                *(now + ITERATE_MOMENTUM * (now - earlier) for now, earlier in zip((weight, bias), before, strict=True))
            )
            before = weight, bias

            def solved(ridge: float, moments: PrimalMoments = moments) -> Found:
                weight = moments.weight(original, keep, ridge)
                bias = moments.bias(weight)
                return self.unexplained(weight, bias), ridge, weight, bias

            share, ridge, weight, bias = local_ridge_search(solved, ridges, ridge)

    def _settled(self, weight: Tensor, bias: Tensor) -> PrimalMoments:
        """The moments of the fitted rows with targets that the layer's present outputs allow."""
        moments: PrimalMoments = self.regression.fitted  # type: ignore[assignment]
        moved, with_x = torch.zeros_like(moments.mean_y), torch.zeros_like(moments.xy)
        for start in range(0, self.regression.count, ROW_CHUNK_SIZE):
            stop = min(start + ROW_CHUNK_SIZE, self.regression.count)
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
