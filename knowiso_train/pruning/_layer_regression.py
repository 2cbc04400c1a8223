"""Regression of a layer on the outputs of the original layer, plain and in front of a ReLU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from knowiso_train.ops.linalg import full_precision
from knowiso_train.pruning._tracing import batch_norm_affine
from knowiso_train.pruning.layer_samples import WIDE_LAYER_FEATURES
from knowiso_train.regression.ridge import ROW_CHUNK_SIZE, KernelMoments, PrimalMoments

SELECTION_FRACTION = 0.1  # fraction of the images that select the ridge and measure the unexplained variance
MIN_SELECTION_SAMPLES = 16  # selection samples, below which all samples serve for both fit and selection
AnyMoments = PrimalMoments | KernelMoments
Samples = tuple[Tensor, Tensor]  # inputs (R, G, d) and targets (R, G, o)

MAX_RELU_ITERATIONS = 9  # iterations of targets and weights, the first of them without the rectifier
MIN_RELATIVE_GAIN = 0.01  # relative decrease of the unexplained variance, below which the iteration stops
# Extrapolation of the iterates: plain steps are too short where most outputs lie beyond the limits
ITERATE_MOMENTUM = 0.5

# Fraction of the variance that a norm expects; below it a channel is constant, and keeps the norm's statistics
MIN_RELATIVE_VARIANCE = 1e-6


class Solution(NamedTuple):
    """Solution of a layer's regression.

    Attributes:
        unexplained: Unexplained variance on the selection samples, as a fraction (FVU = 1 - R²).
        ridge: Relative ρ.
        weight: Weights (G, d, o).
        bias: Intercept (G, o).
    """

    unexplained: float
    ridge: float
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class LayerRegression:
    """Ridge regression of a layer's targets on its inputs.

    Attributes:
        fit_moments: Moments of the samples to fit.
        select_samples: Samples of the last images, to select the ridge on. All samples where those are too few.
        select_moments: Moments of `select_samples`; None in the kernel form.
        num_samples: Number of samples to fit.
        variance: Variance of the targets on `select_samples`, summed over outputs.
    """

    fit_moments: AnyMoments
    select_samples: Samples
    select_moments: PrimalMoments | None
    num_samples: int
    variance: float

    @classmethod
    def of(cls, x: Tensor, y: Tensor, images: int) -> LayerRegression:
        """Build a regression from samples (R, G, d) and (R, G, o), in the order of the images.

        Raises:
            NonFiniteError: NaN or Inf in the samples.

        Examples:
            >>> x, a = torch.randn(400, 1, 3).double(), torch.randn(1, 3, 2).double()
            >>> regression = LayerRegression.of(x, torch.einsum("rgd,gdo->rgo", x, a), images=40)
            >>> regression.unexplained(a) < 1e-12
            True
            >>> regression.search_ridge(torch.zeros_like(a), None, [1e-9, 1.0]).ridge
            1e-09
        """
        y = y.to(x.device)
        count = int(SELECTION_FRACTION * images) * (len(x) // images)
        separate = count >= MIN_SELECTION_SAMPLES
        fit, select = ((x[:-count], y[:-count]), (x[-count:], y[-count:])) if separate else ((x, y), (x, y))
        variance = float(select[1].double().var(0, correction=0).sum())
        if x.shape[2] > WIDE_LAYER_FEATURES and len(fit[0]) <= x.shape[2]:
            return cls(KernelMoments.of(*fit), select, None, len(fit[0]), variance)
        moments = PrimalMoments.of(*fit)
        return cls(moments, select, PrimalMoments.of(*select) if separate else moments, len(fit[0]), variance)

    def restrict(self, columns: Tensor) -> LayerRegression:
        """Return the regression on some features.

        Examples:
            >>> x, y, columns = torch.randn(400, 1, 3), torch.randn(400, 1, 2), torch.tensor([2, 0])
            >>> a = LayerRegression.of(x, y, 40).restrict(columns)
            >>> b, zero = LayerRegression.of(x[:, :, columns], y, 40), torch.zeros(1, 2, 2)
            >>> torch.allclose(a.fit_moments.weight(zero), b.fit_moments.weight(zero))
            True
        """
        x, y = self.select_samples
        return replace(
            self,
            fit_moments=self.fit_moments.restricted(columns),
            select_samples=(x[:, :, columns], y),
            select_moments=None if self.select_moments is None else self.select_moments.restricted(columns),
        )

    def unexplained(self, weight: Tensor) -> float:
        """Return the unexplained variance of a weight (G, d, o) on the selection samples, with the best intercept."""
        x, y = self.select_samples
        residual = y.double() - torch.einsum("rgd,gdo->rgo", x.double(), weight)
        return float(residual.var(0, correction=0).sum()) / self.variance if self.variance > 0 else 0.0

    def search_ridge(
        self, original: Tensor, keep: Tensor | None, ridges: Sequence[float], start: float | None = None
    ) -> Solution:
        """Return the solution of least unexplained variance on the selection samples.

        Args:
            original: Weights (G, d, o) in float64 that the ridge shrinks towards.
            keep: Mask (G, d) of the features to use. Default: all.
            ridges: Relative ridges to choose from.
            start: Ridge to start from, see `local_ridge_search`.

        Examples:
            >>> x, a = torch.randn(400, 1, 3).double(), torch.randn(1, 3, 2).double()
            >>> regression = LayerRegression.of(x, torch.einsum("rgd,gdo->rgo", x, a), images=40)
            >>> ridges = (1e-6, 1e-3, 1.0, 10.0)
            >>> [regression.search_ridge(0 * a, None, ridges, start).ridge for start in (None, 10.0, 1e-6)]
            [1e-06, 1e-06, 1e-06]
        """

        def solve(ridge: float) -> Solution:
            weight = self.fit_moments.weight(original, keep, ridge)
            unexplained = (
                self.unexplained(weight)
                if self.select_moments is None
                else self.select_moments.unexplained(weight, self.variance)
            )
            return Solution(unexplained, ridge, weight, self.fit_moments.bias(weight))

        return local_ridge_search(solve, ridges, start)


def local_ridge_search(
    solve: Callable[[float], Solution], ridges: Sequence[float], start: float | None = None
) -> Solution:
    """Return the best solution by descent over the sorted ridges.

    The unexplained variance is assumed to rise on both sides of the best ridge.

    Args:
        solve: Function from a ridge to its solution.
        ridges: Ridges to choose from. Infinity is always tried.
        start: Ridge to start from, such as that of the layer before. Default, and if not among `ridges`: the middle.

    Examples:
        >>> none = torch.zeros(0)
        >>> solve = lambda ridge: Solution((ridge - 2) ** 2, ridge, none, none)
        >>> local_ridge_search(solve, (0.0, 1.0, 2.0, 3.0), 0.0).ridge
        2.0
    """
    best: list[Solution] = []  # one at most: weights of wide layers are large

    def unexplained(ridge: float) -> float:
        solution = solve(ridge)
        best[:] = [min([*best, solution], key=lambda candidate: candidate[:2])]
        return solution.unexplained

    grid = sorted(set(ridges))
    if math.inf in grid:  # free of cost, and far from all others
        unexplained(grid.pop())
    if grid:
        middle = grid.index(start) if start in grid else len(grid) // 2
        first = unexplained(grid[middle])
        for step in (-1, 1):
            position, last = middle, first
            while 0 <= position + step < len(grid):
                value = unexplained(grid[position + step])
                if value > last or (value == last and step > 0):
                    break
                position, last = position + step, value
            if position != middle:  # descended on this side: the other one rises
                break
    return best[0]


@dataclass(frozen=True)
class ActivationRange:
    """Limits of a rectifier, in the unit of the output of the layer in front of it.

    Attributes:
        low: Lower limit (R, G, o) or (1, G, o), float32; smaller outputs are equivalent to it.
        high: Upper limit, likewise.
    """

    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, limits: tuple[float, float], scale: Tensor, offset: Tensor) -> ActivationRange:
        """Convert limits of `scale · y + offset` to limits of y; infinite where the scale is 0.

        Args:
            limits: Limits of the rectifier.
            scale: Scale (o,).
            offset: Offset (R, o) or (1, o).

        Examples:
            >>> ActivationRange.of((0.0, math.inf), torch.tensor([2.0, -1.0]), torch.tensor([[1.0, 1.0]])).low.tolist()
            [[-0.5, -inf]]
        """
        scale, offset = scale.float(), offset.float()
        ends = [
            torch.where(scale == 0, sign * math.inf, (end - offset) / scale)
            for end, sign in zip(limits, (-1, 1), strict=True)
        ]
        # A negative scale exchanges the limits
        return cls(torch.minimum(*ends), torch.maximum(*ends))

    def rows(self, start: int, stop: int | None) -> ActivationRange:
        """Return the limits of some samples."""
        return ActivationRange(*(end[start:stop] if len(end) > 1 else end for end in (self.low, self.high)))

    def grouped(self, groups: int) -> ActivationRange:
        """Return limits (R, o) as (R, G, o / G)."""
        return ActivationRange(*(end.view(len(end), groups, -1) for end in (self.low, self.high)))

    def clamp(self, y: Tensor) -> Tensor:
        """Return the activation of outputs, in the unit of y.

        Examples:
            >>> limits = ActivationRange(torch.tensor([0.0]), torch.tensor([6.0]))
            >>> limits.clamp(torch.tensor([-1.0, 2.0, 7.0])).tolist()
            [0.0, 2.0, 6.0]
        """
        return torch.maximum(torch.minimum(y, self.high.to(y)), self.low.to(y))

    def project(self, y: Tensor, prediction: Tensor) -> Tensor:
        """Return the values nearest to a prediction that have the same activation as y.

        Examples:
            >>> limits = ActivationRange(torch.tensor([0.0]), torch.tensor([6.0]))
            >>> limits.project(torch.tensor([-1.0, -1.0, 2.0]), torch.tensor([-3.0, 1.0, 1.0])).tolist()
            [-3.0, 0.0, 2.0]
        """
        low, high = self.low.to(y), self.high.to(y)
        above = torch.where(y >= high, torch.maximum(prediction, high), y)
        return torch.where(y <= low, torch.minimum(prediction, low), above)


@dataclass(frozen=True)
class ReLURegression:
    """Regression of a layer in front of a rectifier.

    The loss of an output p for a target y is `(p - y)²` within the limits. Beyond a limit it is the squared distance
    of p to the values beyond that limit. It is convex, and minimized by alternation (Zhang et al. 2015,
    arXiv 1505.06798, for low-rank layers):

    1. targets beyond a limit move to the layer's output, as far as that is beyond the limit too;
    2. the weights are solved for these targets, with the same matrix.

    Attributes:
        regression: Regression without the rectifier.
        x: Inputs (R, G, d) of `regression`, the selection samples last.
        y: Targets (R, G, o).
        limits: Limits of the rectifier.
        columns: Features of x that `regression` is restricted to. None is all.
    """

    regression: LayerRegression
    x: Tensor
    y: Tensor
    limits: ActivationRange
    columns: Tensor | None = None

    def unexplained(self, weight: Tensor, bias: Tensor) -> float:
        """Return the unexplained variance of the activation on the selection samples.

        Args:
            weight: Weights (G, d, o).
            bias: Intercept (G, o).

        Examples:
            >>> x = torch.randn(400, 1, 3)
            >>> y = x.sum(2, keepdim=True)
            >>> limits = ActivationRange(torch.zeros(1, 1, 1), torch.full((1, 1, 1), math.inf))
            >>> problem = ReLURegression(LayerRegression.of(x, y, 40), x, y, limits)
            >>> problem.unexplained(torch.ones(1, 3, 1).double(), torch.zeros(1, 1).double()) < 1e-9
            True
        """
        limits, activation, variance = self._selection
        prediction = limits.clamp(_predict(self.regression.select_samples[0], weight, bias))
        return float((prediction - activation).square().mean(0).sum()) / variance if variance > 0 else 0.0

    @cached_property
    def _selection(self) -> tuple[ActivationRange, Tensor, float]:
        """Limits, target activation and its variance on the selection samples."""
        _, y = self.regression.select_samples
        limits = self.limits.rows(-len(y), None)
        activation = limits.clamp(y).double()
        return limits, activation, float(activation.var(0, correction=0).sum())

    def solve(
        self, original: Tensor, keep: Tensor | None, ridges: Sequence[float], start: float | None = None
    ) -> Solution:
        """Return the iterate of least unexplained variance; arguments are those of `LayerRegression.search_ridge`.

        Examples:
            >>> x = torch.rand(400, 1, 2)
            >>> y = x.sum(2, keepdim=True) - 1 - 5 * (x[:, :, :1] < 0.2).float()
            >>> limits = ActivationRange(torch.zeros(1, 1, 1), torch.full((1, 1, 1), math.inf))
            >>> problem = ReLURegression(LayerRegression.of(x, y, 40), x, y, limits)
            >>> start = torch.zeros(1, 2, 1).double()
            >>> least_squares = next(problem.iterates(start, None, [1e-6]))
            >>> problem.solve(start, None, [1e-6]).unexplained < least_squares.unexplained
            True
        """
        iterates = self.iterates(original, keep, ridges, start)
        best = next(iterates)
        for solution in islice(iterates, MAX_RELU_ITERATIONS - 1):
            converged = solution.unexplained > (1 - MIN_RELATIVE_GAIN) * best.unexplained
            best = solution if solution.unexplained < best.unexplained else best
            if converged:
                break
        return best

    def iterates(
        self, original: Tensor, keep: Tensor | None, ridges: Sequence[float], start: float | None = None
    ) -> Iterator[Solution]:
        """Yield the iterates without end, the first of them by least squares without the rectifier."""
        solution = self.regression.search_ridge(original, keep, ridges, start)
        solution = solution._replace(unexplained=self.unexplained(solution.weight, solution.bias))
        previous = solution
        while True:
            yield solution
            # Targets at W_t + μ (W_t - W_{t-1})
            weight, bias = (
                now + ITERATE_MOMENTUM * (now - before)
                for now, before in ((solution.weight, previous.weight), (solution.bias, previous.bias))
            )
            moments, previous = self._update_targets(weight, bias), solution

            def solve(ridge: float, moments: PrimalMoments = moments) -> Solution:
                weight = moments.weight(original, keep, ridge)
                bias = moments.bias(weight)
                return Solution(self.unexplained(weight, bias), ridge, weight, bias)

            solution = local_ridge_search(solve, ridges, solution.ridge)

    def _update_targets(self, weight: Tensor, bias: Tensor) -> PrimalMoments:
        """Return the moments of the fitted samples with targets projected to the outputs of a layer."""
        moments: PrimalMoments = self.regression.fit_moments  # type: ignore[assignment]
        count = self.regression.num_samples
        # Only the targets move, by δ = y' - y: E[y'] = E[y] + E[δ], S_xy' = S_xy + E[x δᵀ] - E[x] E[δ]ᵀ
        mean_shift, cross_shift = torch.zeros_like(moments.mean_y), torch.zeros_like(moments.xy)
        for start in range(0, count, ROW_CHUNK_SIZE):
            stop = min(start + ROW_CHUNK_SIZE, count)
            x, y = self.x[start:stop].float(), self.y[start:stop].float()
            x = x if self.columns is None else x[:, :, self.columns]
            shift = self.limits.rows(start, stop).project(y, _predict(x, weight, bias)) - y
            mean_shift += shift.sum(0, dtype=torch.float64)
            with full_precision(x.device):
                cross_shift += x.permute(1, 2, 0) @ shift.transpose(0, 1)
        mean_shift /= count
        xy = moments.xy + cross_shift / count - moments.mean_x[..., None] * mean_shift[:, None]
        return replace(moments, mean_y=moments.mean_y + mean_shift, xy=xy)


def _predict(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the outputs (R, G, o), float32."""
    with full_precision(x.device):
        return (x.float().transpose(0, 1) @ weight.float()).transpose(0, 1) + bias.float()


@torch.no_grad()
def fold_bias(layer: nn.Module, norm: nn.Module | None, bias: Tensor, moments: AnyMoments, weight: Tensor) -> None:
    """Write the intercept of a refitted layer into its batch norm, or else into its bias.

    The batch norm's statistics become those of the layer's new output, and its scale and shift compensate. The
    function in eval mode is that of the regression, and training starts from the same function. Without a batch norm,
    a missing bias is added.

    Args:
        layer: Convolution or linear layer, with its new weight.
        norm: Batch norm that is the only consumer of its output, or None.
        bias: Intercept (C,), float64.
        moments: Moments of the layer's input.
        weight: New weight (G, d, o).
    """
    module: Any = layer
    if norm is None:
        if module.bias is None:
            module.bias = nn.Parameter(bias.to(module.weight), requires_grad=module.weight.requires_grad)
        else:
            module.bias.copy_(bias)
        return
    layer_bias = torch.zeros_like(bias) if module.bias is None else module.bias.double()
    n: Any = norm
    scale, shift = batch_norm_affine(norm, len(bias))
    mean = (weight.mT @ moments.mean_x[..., None])[..., 0].flatten() + layer_bias
    variance = moments.variance(weight).flatten()
    varies = variance > MIN_RELATIVE_VARIANCE * n.running_var.double()
    # The required function of the layer's output z is scale · z + offset. With γ' = scale · sqrt(var' + eps) and
    # β' = offset + scale · mean', the norm with the new statistics mean' and var' is that function
    offset = shift + scale * (bias - layer_bias)
    n.weight.copy_(torch.where(varies, scale * (variance + n.eps).sqrt(), n.weight.double()))
    n.bias.copy_(torch.where(varies, offset + scale * mean, n.bias.double()))
    # A constant channel keeps γ and β, and its running mean takes the intercept
    n.running_mean.copy_(torch.where(varies, mean, n.running_mean.double() - (bias - layer_bias)))
    n.running_var.copy_(torch.where(varies, variance, n.running_var.double()))
