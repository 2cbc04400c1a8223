"""Regressions in front of a rectifier, against gradient descent on the same convex loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knowiso_train.pruning import _layer_regression as layer_regression
from knowiso_train.pruning._layer_regression import ActivationRange, LayerRegression, ReLURegression
from knowiso_train.pruning._tracing import trace_epilogues

RELU, RELU6 = (0.0, math.inf), (0.0, 6.0)


def loss(given: Tensor, y: Tensor, low: float, high: float) -> Tensor:
    """Squared distance, of what y has beyond a limit to that limit alone."""
    apart = torch.where(
        y <= low, (given - low).clamp_min(0), torch.where(y >= high, (high - given).clamp_min(0), given - y)
    )
    return apart.square().sum(1).mean()


def least(x: Tensor, y: Tensor, limits: tuple[float, float]) -> float:
    ones = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    weight = torch.zeros(ones.shape[1], y.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight], max_iter=3000, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(ones @ weight, y, *limits)
        value.backward()
        return value

    optimizer.step(closure)
    return float(loss(ones @ weight.detach(), y, *limits))


def problem(seed: int, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    """Rectified mixtures that are read, and outputs that two more of them would be needed for."""
    generator = torch.Generator().manual_seed(seed)
    x = (
        torch.randn(3000, 6, generator=generator) @ torch.randn(6, 10, generator=generator)
        + torch.randn(3000, 10, generator=generator)
    ).relu()
    y = x @ torch.randn(10, 4, generator=generator)
    return x[:, :8].double(), (y - y.mean(0) + noise * torch.randn(3000, 4, generator=generator)).double()


def of_ones(x: Tensor, y: Tensor, limits: tuple[float, float]) -> ReLURegression:
    """A tenth of the rows is held out."""
    ends = ActivationRange.of(limits, torch.ones(y.shape[1]).double(), torch.zeros(1, y.shape[1]).double()).grouped(1)
    return ReLURegression(LayerRegression.of(x[:, None], y[:, None], images=len(x) // 10), x[:, None], y[:, None], ends)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("limits", [RELU, RELU6, (-1.0, 1.0)])
def test_iterates_converge_to_the_minimum_of_the_loss(limits: tuple[float, float], seed: int) -> None:
    x, y = problem(seed)
    found = of_ones(x, y, limits)
    count, start = found.regression.num_samples, torch.zeros(1, 8, 4).double()
    losses = [
        float(loss(x[:count] @ weight[0] + bias[0], y[:count], *limits))
        for _, _, weight, bias in islice(found.iterates(start, None, [1e-9]), 150)
    ]
    bound = least(x[:count], y[:count], limits)
    assert losses[-1] == pytest.approx(bound, rel=1e-3)
    assert min(losses) >= bound * (1 - 1e-6)
    assert losses[0] > 1.05 * bound  # that of least squares


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("limits", [RELU, RELU6, (-1.0, 1.0)])
def test_the_best_iterate_explains_more_of_the_activation_than_least_squares(
    limits: tuple[float, float], seed: int
) -> None:
    """Recomputed on new rows, with what least squares gives beside it."""
    x, y = problem(seed)
    count, start = 2000, torch.zeros(1, 8, 4).double()
    found = of_ones(x[:count], y[:count], limits)
    plain = found.regression.search_ridge(start, None, [1e-9])[2]
    share, _, weight, bias = found.solve(start, None, [1e-9])
    left = [
        float(((x[count:] @ w[0] + b[0]).clamp(*limits) - y[count:].clamp(*limits)).square().sum())
        for w, b in ((weight, bias), (plain, found.regression.fit_moments.bias(plain)))
    ]
    assert left[0] < left[1]
    total = float(y[count:].clamp(*limits).var(0).sum()) * (len(x) - count)
    assert share == pytest.approx(left[0] / total, rel=0.15)  # on other rows


def test_channels_that_only_act_beyond_the_limit_cost_nothing() -> None:
    """The removed channel is 0 wherever the output is positive, but least squares fits it elsewhere."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4000, 3, generator=generator).double()
    y = x.sum(1, keepdim=True) - 1.5
    found = of_ones(x, y - 3 * torch.rand(4000, 1, generator=generator).double() * (y < 0), RELU)
    shares = [share for share, *_ in islice(found.iterates(torch.zeros(1, 3, 1).double(), None, [1e-9]), 150)]
    assert shares[0] > 0.1
    assert shares[-1] < 1e-3


def test_momentum_reaches_a_smaller_loss_in_the_same_number_of_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = problem(0)
    count, start = 2700, torch.zeros(1, 8, 4).double()

    def last_loss() -> float:
        *_, solution = islice(of_ones(x, y, RELU).iterates(start, None, [1e-9]), layer_regression.MAX_RELU_ITERATIONS)
        return float(loss(x[:count] @ solution.weight[0] + solution.bias[0], y[:count], *RELU))

    with_momentum, bound = last_loss(), least(x[:count], y[:count], RELU)
    monkeypatch.setattr(layer_regression, "ITERATE_MOMENTUM", 0.0)
    # Distances to the minimum, about which the iterates converge linearly
    assert with_momentum - bound < 0.7 * (last_loss() - bound)


def test_limits_in_the_unit_of_the_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    y, scale, offset = (torch.randn(50, 4, generator=generator) for _ in range(3))
    ends = ActivationRange.of(RELU6, scale[0], offset)
    torch.testing.assert_close(
        ends.clamp(y) * scale[0] + offset, (y * scale[0] + offset).clamp(0, 6), atol=1e-5, rtol=1e-5
    )
    silent = ActivationRange.of(RELU6, torch.zeros(4), offset)
    assert torch.equal(silent.clamp(y), y)
    assert torch.equal(silent.project(y, 2 * y), y)


def test_projected_targets_are_the_nearest_of_equal_activation() -> None:
    generator = torch.Generator().manual_seed(1)
    y, given = 4 * torch.randn(200, 1, generator=generator), 4 * torch.randn(200, 1, generator=generator)
    ends = ActivationRange(torch.full((1, 1), -1.0), torch.full((1, 1), 2.0))
    settled = ends.project(y, given)
    assert torch.equal(ends.clamp(settled), ends.clamp(y))
    grid = torch.linspace(-20, 20, 4001)[None]
    allowed = (ends.clamp(grid) - ends.clamp(y)).abs() < 5e-3
    nearest = torch.where(allowed, (grid - given).abs(), math.inf).min(1).values
    torch.testing.assert_close((settled - given).abs()[:, 0], nearest, atol=2e-2, rtol=0)


def test_depthwise_layers_have_a_regression_for_each_group() -> None:
    """All groups at once give what each gives alone."""
    x, y = problem(3)
    rows, aims, start = x.view(-1, 4, 2), y[..., None], torch.zeros(4, 2, 1).double()
    ends = ActivationRange.of(RELU, torch.tensor([1.0, -1.0, 2.0, 0.5]).double(), torch.zeros(1, 4).double())
    together = list(
        islice(
            ReLURegression(LayerRegression.of(rows, aims, 300), rows, aims, ends.grouped(4)).iterates(
                start, None, [1e-6]
            ),
            4,
        )
    )[-1]
    for g in range(4):
        part, aim, end = (
            rows[:, g : g + 1],
            aims[:, g : g + 1],
            ActivationRange(ends.low[:, g : g + 1], ends.high[:, g : g + 1]).grouped(1),
        )
        alone = list(
            islice(
                ReLURegression(LayerRegression.of(part, aim, 300), part, aim, end).iterates(start[:1], None, [1e-6]), 4
            )
        )[-1]
        torch.testing.assert_close(together[2][g], alone[2][0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together[3][g], alone[3][0], atol=1e-4, rtol=1e-4)


class Ends(nn.Module):
    """A convolution, a norm, and what becomes of them."""

    def __init__(self, end: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.norm, self.end = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), end

    def forward(self, x: Tensor) -> Any:
        return self.end(self.norm(self.conv(x))), x


@pytest.mark.parametrize(
    ("end", "limits"),
    [
        (nn.ReLU(inplace=True), RELU),
        (lambda y: torch.relu(y).mean((2, 3)), RELU),
        (lambda y: y.relu_(), RELU),
        (nn.ReLU6(), RELU6),
        (nn.ReLU6(inplace=True), RELU6),
        (nn.Hardtanh(-2.0, 3.0), (-2.0, 3.0)),
        (F.gelu, None),
        (nn.Identity(), None),
        (lambda y: F.relu(y) + y.mean(), None),  # two readers
        (lambda y: (F.relu(y), y), None),  # the caller reads it too
    ],
)
def test_the_rectifier_is_found(end: Callable[[Tensor], Any], limits: tuple[float, float] | None) -> None:
    model = Ends(end).eval()
    with torch.no_grad():
        found = trace_epilogues(model, {"conv": model.conv}, torch.randn(2, 3, 4, 4))
    assert (found["conv"].norm, found["conv"].activation_range) == ("norm", limits)


def test_a_rectifier_behind_a_sum_with_what_comes_later_is_left_alone() -> None:
    """The other term of the sum is computed after the first branch, whose target is thus its own output."""

    class Later(Ends):
        def __init__(self) -> None:
            super().__init__(F.relu)
            self.shortcut = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Any:
            y = self.norm(self.conv(x))
            return self.end(y + self.shortcut(x)).mean((2, 3))

    model = Later().eval()
    with torch.no_grad():
        found = trace_epilogues(model, {"conv": model.conv, "shortcut": model.shortcut}, torch.randn(2, 3, 4, 4))
    assert found["conv"].residual_add == found["shortcut"].residual_add
    assert (found["conv"].residual_source, found["conv"].activation_range) == (None, None)
    assert (found["shortcut"].residual_source is not None, found["shortcut"].activation_range) == (True, RELU)


@pytest.mark.parametrize(("end", "limits"), [(F.relu, RELU), (F.softplus, None)])
def test_the_rectifier_behind_a_residual_sum_is_found(
    end: Callable[[Tensor], Tensor], limits: tuple[float, float] | None
) -> None:
    class Sum(Ends):
        def forward(self, x: Tensor) -> Any:
            return self.end(self.norm(self.conv(x)) + x)

    model = Sum(end).eval()
    with torch.no_grad():
        found = trace_epilogues(model, {"conv": model.conv}, torch.randn(2, 3, 4, 4), lambda model, x: model(F.relu(x)))
    assert found["conv"].residual_add is not None
    assert found["conv"].activation_range == limits
