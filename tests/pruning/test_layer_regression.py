"""Gram matrices, moments and ridge search of layer regressions against plain computations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from knowiso_train.errors import NonFiniteError
from knowiso_train.ops.linalg import MIN_TRIANGLE_COLUMNS, gram
from knowiso_train.pruning._layer_regression import LayerRegression
from knowiso_train.regression import batch_moments
from knowiso_train.regression.moments import ROW_BUFFER_SIZE, RowSums

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, float("inf"))


def drawn(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize(
    "shape",
    [
        (1, 7),
        (MIN_TRIANGLE_COLUMNS - 1, 3),
        (MIN_TRIANGLE_COLUMNS, 9),
        (MIN_TRIANGLE_COLUMNS + 1, 5),
        (2, MIN_TRIANGLE_COLUMNS + 93, 4),
    ],
)
def test_products_of_rows(shape: tuple[int, ...]) -> None:
    [x] = drawn(shape)
    total = torch.ones(*shape[:-1], shape[-2], dtype=torch.float64)
    torch.testing.assert_close(gram(x.split(4, -1), total), x @ x.mT + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sums_of_parts_are_the_moments_of_all_rows(dtype: torch.dtype) -> None:
    [rows] = drawn((ROW_BUFFER_SIZE + 700, 6))
    rows = (rows @ torch.randn(6, 6, generator=torch.Generator().manual_seed(1)).double() + 30).to(dtype)
    sums = RowSums()
    for part in rows.split(ROW_BUFFER_SIZE // 3):
        own = part.clone()
        sums.add(own)
        own.zero_()  # layers work in place
    found, expected = sums.moments(), batch_moments(rows.double()[:, :, None, None], rows.double()[:, :1, None, None])
    for name in ("count", "mean_x", "mean_y", "xx", "xy", "yy"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5 * float(expected.xx.abs().max())
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_what_cannot_be_squared_is_refused(bad: float) -> None:
    sums = RowSums()
    sums.add(torch.ones(3, 2))
    with pytest.raises(NonFiniteError, match="too large"):
        sums.add(torch.tensor([[1.0, bad]]))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("start", [None, 1e-4, 1.0])
def test_the_ridge_is_the_best_of_all(seed: int, start: float | None) -> None:
    x, weight, noise, off = drawn((600, 1, 40), (1, 40, 5), (600, 1, 5), (1, 40, 5), seed=seed)
    y = torch.einsum("rgd,gdo->rgo", x, weight) + 10 ** (seed / 2) * noise
    found = LayerRegression.of(x, y, images=60)
    original = weight + 0.1 * off
    every = {ridge: found.unexplained(found.fit_moments.weight(original, None, ridge)) for ridge in RIDGES}
    share, ridge, _, _ = found.search_ridge(original, None, RIDGES, start)
    assert ridge == min(every, key=every.__getitem__)
    assert share == pytest.approx(every[ridge])


def test_columns_that_are_left_out_are_columns_that_are_not_there() -> None:
    x, y, original = drawn((400, 1, 12), (400, 1, 3), (1, 12, 3))
    at = torch.tensor([0, 3, 4, 9, 11])
    keep = torch.zeros(1, 12, dtype=torch.bool).index_fill(1, at, True)
    whole, part = LayerRegression.of(x, y, 40), LayerRegression.of(x[:, :, at], y, 40)
    for less in (whole.restrict(at), part):
        torch.testing.assert_close(
            less.fit_moments.weight(original[:, at], None, 0.1), whole.fit_moments.weight(original, keep, 0.1)[:, at]
        )
        assert less.search_ridge(original[:, at], None, RIDGES)[0] == pytest.approx(
            whole.search_ridge(original, keep, RIDGES)[0]
        )
