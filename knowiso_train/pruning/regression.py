"""One layer's regression: the images that it is fitted on, and others that choose its ridge and say how good it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from knowiso_train.pruning.originals import WIDE
from knowiso_train.pruning.refit import DualMoments, RowMoments

HELD = 0.1  # of the images: the unexplained shares are measured on them
FEWEST = 16  # rows held out, below which every row is both fitted and reported on

AnyMoments = RowMoments | DualMoments
Rows = tuple[Tensor, Tensor]  # (R, G, d) and (R, G, o)
Solved = TypeVar("Solved", bound=tuple[Any, ...])


@dataclass(frozen=True)
class Regression:
    """What a layer reads and should give.

    Attributes:
        fitted: moments of the rows to fit on.
        held: the rows to report on; those that are fitted where there are too few. No layer before this one was fitted on their images.
        of_held: their moments; None where regressors are too many.
        count: rows to fit on.
        total: variance of what the layer should give on the held rows, summed over outputs.
    """

    fitted: AnyMoments
    held: Rows
    of_held: RowMoments | None
    count: int
    total: float

    @classmethod
    def of(cls, x: Tensor, y: Tensor, images: int) -> Regression:
        """From rows (R, G, d) and (R, G, o), image after image.

        Raises:
            NonFiniteError: NaN or Inf in the rows.

        Example:
            >>> x, a = torch.randn(400, 1, 3).double(), torch.randn(1, 3, 2).double()
            >>> found = Regression.of(x, torch.einsum("rgd,gdo->rgo", x, a), images=40)
            >>> found.unexplained(a) < 1e-12, found.best(torch.zeros_like(a), None, [1e-9, 1.0])[1]
            (True, 1e-09)
        """
        y = y.to(x.device)
        count = int(HELD * images) * (len(x) // images)
        apart = count >= FEWEST
        fitted, held = ((x[:-count], y[:-count]), (x[-count:], y[-count:])) if apart else ((x, y), (x, y))
        total = float(held[1].double().var(0, correction=0).sum())
        if x.shape[2] > WIDE and len(fitted[0]) <= x.shape[2]:
            return cls(DualMoments.of(*fitted), held, None, len(fitted[0]), total)
        moments = RowMoments.of(*fitted)
        return cls(moments, held, RowMoments.of(*held) if apart else moments, len(fitted[0]), total)

    def restricted(self, at: Tensor) -> Regression:
        """On these columns alone.

        Example:
            >>> x, y, at = torch.randn(400, 1, 3), torch.randn(400, 1, 2), torch.tensor([2, 0])
            >>> a, b = Regression.of(x, y, 40).restricted(at), Regression.of(x[:, :, at], y, 40)
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

    def best(self, original: Tensor, keep: Tensor | None, ridges: Sequence[float], start: float | None = None) -> tuple[float, float, Tensor]:
        """The least unexplained share on the held rows, the ridge that leaves it, and its weight.

        From the ridge of the layer before, downhill to both sides: what is left rises to both sides of the best ridge.

        Args:
            original: (G, d, o) float64, what the ridge draws towards.
            keep: (G, d), the columns that are left; None is all.
            ridges: to choose from.
            start: where to begin; in the middle if it is not among them.

        Example:
            >>> x, a = torch.randn(400, 1, 3).double(), torch.randn(1, 3, 2).double()
            >>> found = Regression.of(x, torch.einsum("rgd,gdo->rgo", x, a), images=40)
            >>> [found.best(0 * a, None, (1e-6, 1e-3, 1.0, 10.0), start)[1] for start in (None, 10.0, 1e-6)]
            [1e-06, 1e-06, 1e-06]
        """

        def solved(ridge: float) -> tuple[float, float, Tensor]:
            weight = self.fitted.weight(original, keep, ridge)
            return self.unexplained(weight) if self.of_held is None else self.of_held.left(weight, self.total), ridge, weight

        return downhill(solved, ridges, start)


def downhill(solved: Callable[[float], Solved], ridges: Sequence[float], start: float | None = None) -> Solved:
    """The best of what `solved(ridge)` gives, its share first and its ridge second: from one ridge on, as long as the next one is better.

    Args:
        solved: of one ridge.
        ridges: to choose from.
        start: where to begin; in the middle if it is not among them.

    Example:
        >>> downhill(lambda ridge: ((ridge - 2) ** 2, ridge), (0.0, 1.0, 2.0, 3.0), 0.0)
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
    if math.inf in tried:  # costs nothing, and is no neighbour of the others
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
