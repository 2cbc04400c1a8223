"""Ridge solvers against least squares on augmented samples, and against each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from knowiso_train.errors import NonFiniteError, OptionError
from knowiso_train.regression import batch_moments
from knowiso_train.regression import ridge as ridge_module
from knowiso_train.regression.ridge import (
    KernelMoments,
    PrimalMoments,
    RidgeSolver,
    dampened_inverse,
    ridge_map,
    solve_ridge,
    solve_ridge_cholesky,
)


def correlated(count: int = 200, features: int = 6, targets: int = 3) -> tuple[Tensor, Tensor]:
    """Draw correlated features with nonzero means, and noisy targets."""
    x = torch.randn(count, features, dtype=torch.float64) @ torch.randn(features, features, dtype=torch.float64) + 3
    y = x @ torch.randn(features, targets, dtype=torch.float64) + torch.randn(count, targets, dtype=torch.float64) - 5
    return x, y


def augmented_least_squares(x: Tensor, y: Tensor, ridge: float, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the ridge regression about `start`, as least squares with one extra row per feature."""
    start = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64) if start is None else start
    centered_x, centered_y = x - x.mean(0), y - y.mean(0)
    extra = (ridge * centered_x.square().sum(0).mean()).sqrt() * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.lstsq(
        torch.cat([centered_x, extra]), torch.cat([centered_y, extra @ start]), driver="gelsd"
    ).solution
    return weight, y.mean(0) - x.mean(0) @ weight


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 1.0])
def test_every_solver_equals_augmented_least_squares(ridge: float) -> None:
    x, y = correlated()
    weight, bias = augmented_least_squares(x, y, ridge)
    fit = batch_moments(x[:, :, None, None], y[:, :, None, None])
    zeros = torch.zeros(1, 6, 3, dtype=torch.float64)
    primal, dual = PrimalMoments.of(x[:, None], y[:, None]), KernelMoments.of(x[:, None], y[:, None])
    spectral, factored = solve_ridge(fit, ridge), solve_ridge_cholesky(fit, ridge)
    solutions = [(spectral.weight, spectral.bias), (factored.weight, factored.bias), RidgeSolver(x).solve(y, ridge)]
    solutions += [(m.weight(zeros, None, ridge)[0], m.bias(m.weight(zeros, None, ridge))[0]) for m in (primal, dual)][
        : 2 if ridge else 1
    ]
    for found_weight, found_bias in solutions:
        torch.testing.assert_close(found_weight, weight, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(found_bias, bias, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(ridge_map(x - x.mean(0), y - y.mean(0), ridge), weight, rtol=1e-7, atol=1e-8)
    inverse = dampened_inverse(fit.xx, ridge)
    torch.testing.assert_close(inverse @ fit.xy, weight, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("count", [200, 20])
def test_the_ridge_draws_towards_the_original_weights(count: int) -> None:
    x, y = correlated(count, features=40)
    original = torch.randn(40, 3, dtype=torch.float64)
    expected, _ = augmented_least_squares(x, y, 0.1, original)
    for moments in (PrimalMoments.of(x[:, None], y[:, None]), KernelMoments.of(x[:, None], y[:, None])):
        torch.testing.assert_close(moments.weight(original[None], None, 0.1)[0], expected, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(moments.weight(original[None], None, 1e9)[0], original, rtol=1e-6, atol=1e-6)
        assert torch.equal(moments.weight(original[None], None, math.inf)[0], original)


@pytest.mark.parametrize("ridge", [0.0, 1e-4, 1.0])
def test_the_true_weights_are_a_fixed_point_at_every_ridge(ridge: float) -> None:
    x, _ = correlated()
    original = torch.randn(1, 6, 3, dtype=torch.float64)
    moments = PrimalMoments.of(x[:, None], x[:, None] @ original[0] + 2)
    weight = moments.weight(original, None, ridge)
    torch.testing.assert_close(weight, original, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moments.bias(weight), torch.full((1, 3), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("kind", [PrimalMoments, KernelMoments])
def test_removed_features_get_no_weight_and_the_others_the_fit_without_them(
    kind: type[PrimalMoments | KernelMoments],
) -> None:
    x, y = correlated()
    original, keep = torch.randn(6, 3, dtype=torch.float64), torch.tensor([1, 0, 1, 1, 0, 1])
    moments = kind.of(x[:, None], y[:, None])
    weight = moments.weight(original[None], keep[None], 0.1)[0]
    columns = keep.nonzero().flatten()
    expected, _ = augmented_least_squares(x[:, columns], y, 0.1, original[columns])
    torch.testing.assert_close(weight[columns], expected, rtol=1e-7, atol=1e-8)
    assert torch.equal(weight[keep == 0], torch.zeros(2, 3, dtype=torch.float64))
    alone = moments.restricted(columns).weight(original[None, columns], None, 0.1)[0]
    torch.testing.assert_close(alone, expected, rtol=1e-7, atol=1e-8)


def test_the_dual_form_of_the_ridge_solver_equals_the_primal_one() -> None:
    x, y = correlated(count=20, features=40)
    solver = RidgeSolver(x)
    assert not solver.primal
    centered_x, centered_y = x - x.mean(0), y - y.mean(0)
    # Its ridge is relative to the mean over min(N, D) eigenvalues
    penalty = 0.1 * centered_x.square().sum() / 20 * torch.eye(40, dtype=torch.float64)
    expected = torch.linalg.solve(centered_x.T @ centered_x + penalty, centered_x.T @ centered_y)
    weight, bias = solver.solve(y, 0.1)
    torch.testing.assert_close(weight, expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(solver.predict(y, 0.1), x @ weight + bias)


def test_fewer_samples_than_features_and_dead_features_give_finite_weights() -> None:
    x, y = correlated(count=4, features=54)
    x[:, 3] = 0
    for ridge in (0.0, 1e-4):
        assert (
            PrimalMoments.of(x[:, None], y[:, None])
            .weight(torch.zeros(1, 54, 3).double(), None, ridge)
            .isfinite()
            .all()
        )


def test_invalid_ridges_and_values_raise() -> None:
    x, y = correlated()
    moments, zeros = PrimalMoments.of(x[:, None], y[:, None]), torch.zeros(1, 6, 3).double()
    for ridge in (-1.0, math.nan):
        with pytest.raises(OptionError, match="ridge"):
            moments.weight(zeros, None, ridge)
    x[3, 2] = math.nan
    for kind in (PrimalMoments, KernelMoments):
        with pytest.raises(NonFiniteError, match="NaN or Inf"):
            kind.of(x[:, None], y[:, None])


def test_second_moments_are_in_full_precision_within_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ridge_module, "FLOAT32_MIN_PRODUCTS", 0)
    x, y = torch.randn(300, 2, 8) + 3, torch.randn(300, 2, 4)
    plain = PrimalMoments.of(x, y)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            within = PrimalMoments.of(x, y)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(plain.xx, within.xx)
    assert torch.equal(plain.xy, within.xy)
