"""Removal costs and elimination against brute force: remove, refit by least squares, measure."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from knowiso_train.errors import NonFiniteError, OptionError, ShapeError
from knowiso_train.ops import conv_weight, patch_rows
from knowiso_train.ops.im2col import conv_columns, regression_weight
from knowiso_train.pruning._elimination import BackwardElimination, Consumer, removal_costs
from knowiso_train.regression import batch_moments


def images(channels: int = 6, seed: int = 0, n: int = 40) -> Tensor:
    """Correlated channels about means that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    x = torch.randn(n, channels, 5, 4, generator=generator, dtype=torch.float64)
    return torch.einsum("dc,nchw->ndhw", mixing, x) + torch.arange(channels).view(-1, 1, 1)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def consumer(x: Tensor, weight: Tensor, name: str = "conv") -> Consumer:
    k = weight.shape[-1] if weight.ndim == 4 else 1
    return Consumer.of(name, batch_moments(x, x, k), weight, conv_columns(x.shape[1], k))


def left_over(x: Tensor, weight: Tensor, gone: list[int]) -> float:
    """Unexplained share of a convolution's output by least squares on the patches of the channels that are left."""
    k = weight.shape[-1]
    left = [c for c in range(x.shape[1]) if c not in gone]
    y = patch_rows(F.conv2d(x, weight, padding=k // 2), 1)
    rows = patch_rows(x[:, left], k)
    y, rows = y - y.mean(0), rows - rows.mean(0)
    return float((y - rows @ torch.linalg.lstsq(rows, y, driver="gelsd").solution).square().sum() / y.square().sum())


def refit(x: Tensor, y: Tensor, start: Tensor, k: int, ridge: float) -> Tensor:
    """Solve the ridge regression about `start` as plain least squares with one extra row for each feature."""
    rows, targets = patch_rows(x, k), patch_rows(y, 1)
    rows, targets = rows - rows.mean(0), targets - targets.mean(0)
    extra = (ridge * rows.square().sum(0).mean()).sqrt() * torch.eye(rows.shape[1], dtype=rows.dtype)
    system = torch.cat([rows, extra]), torch.cat([targets, extra @ start])
    return torch.linalg.lstsq(*system, driver="gelsd").solution


@pytest.mark.parametrize("k", [1, 3])
def test_a_score_is_what_removing_refitting_and_measuring_finds(k: int) -> None:
    x, weight = images(), normal(4, 6, k, k)
    found = removal_costs([consumer(x, weight)], ridge=0.0)
    expected = torch.tensor([left_over(x, weight, [channel]) for channel in range(6)], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("k", [1, 3])
def test_elimination_adds_up_to_what_the_set_costs(k: int) -> None:
    x, weight = images(), normal(4, 6, k, k)
    elimination = BackwardElimination([consumer(x, weight)], ridge=0.0)
    order, costs = elimination.eliminate_until(keep=2)
    assert len(order) == len(set(order)) == 4
    for removed in range(1, 5):
        assert sum(costs[:removed]) == pytest.approx(left_over(x, weight, order[:removed]), rel=1e-6)
        others = [left_over(x, weight, [*order[: removed - 1], c]) for c in range(6) if c not in order[: removed - 1]]
        # Each time the cheapest
        assert left_over(x, weight, order[:removed]) == pytest.approx(min(others), rel=1e-6)
    refitted = conv_weight(elimination.weights()[0], k)
    assert torch.equal(refitted[:, order], torch.zeros_like(refitted[:, order]))
    apart = patch_rows(F.conv2d(x, weight - refitted, padding=k // 2), 1)
    y = patch_rows(F.conv2d(x, weight, padding=k // 2), 1)
    share = (apart - apart.mean(0)).square().sum() / (y - y.mean(0)).square().sum()
    assert float(share) == pytest.approx(sum(costs), rel=1e-6)


@pytest.mark.parametrize("k", [1, 3])
def test_a_copy_costs_nothing_and_the_output_stays(k: int) -> None:
    x, weight = images(), normal(4, 7, k, k)
    x = torch.cat([x, x[:, 2:3]], 1)
    elimination = BackwardElimination([consumer(x, weight)], ridge=1e-9)
    costs = elimination.costs()
    assert set(costs.argsort()[:2].tolist()) == {2, 6}
    assert elimination.remove(6) < 1e-6
    assert float(elimination.costs()[2]) > 0.01  # its twin is needed now
    refitted = conv_weight(elimination.weights()[0], k)
    before, after = (F.conv2d(x, w, padding=k // 2) for w in (weight, refitted))
    torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-5)


def test_a_linear_map_of_others_costs_nothing() -> None:
    x, weight = images(), normal(4, 7, 1, 1)
    x = torch.cat([x, x[:, :1] - 2 * x[:, 3:4]], 1)
    elimination = BackwardElimination([consumer(x, weight)], ridge=1e-9)
    assert elimination.remove(6) < 1e-6


def test_consumers_add_up_and_other_groups_columns_stay() -> None:
    x, first, second = images(), normal(4, 6, 3, 3), normal(5, 6, seed=2)
    both = [consumer(x, first), consumer(x, second, "fc")]
    torch.testing.assert_close(removal_costs(both), removal_costs(both[:1]) + removal_costs(both[1:]))
    some = Consumer.of("conv", batch_moments(x, x, 3), first, conv_columns(6, 3)[:2])
    torch.testing.assert_close(removal_costs([some], ridge=0.0), removal_costs(both[:1], ridge=0.0)[:2])


def test_a_flatten_repeats_a_channel() -> None:
    x, weight = images(3, n=400), normal(5, 3 * 20)
    rows = x.flatten(1)[:, :, None, None]
    flat = Consumer.of("fc", batch_moments(rows, rows), weight, torch.arange(60).view(3, 20))
    y = rows.flatten(1) @ weight.T
    left = rows.flatten(1)[:, :40]
    y, left = y - y.mean(0), left - left.mean(0)
    expected = (y - left @ torch.linalg.lstsq(left, y).solution).square().sum() / y.square().sum()
    assert float(removal_costs([flat], ridge=0.0)[2]) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_refit_and_elimination_agree(k: int, ridge: float) -> None:
    """On the same samples with the same ridge, successive removals end at the closed form of the set."""
    x, weight = images(), normal(4, 6, k, k)
    elimination = BackwardElimination([consumer(x, weight)], ridge=ridge)
    gone = [1, 4]
    for channel in gone:
        elimination.remove(channel)
    left = [0, 2, 3, 5]
    # The elimination's penalty is relative to the mean variance of all channels
    of_all, of_rest = (float(patch_rows(part, k).var(0).mean()) for part in (x, x[:, left]))
    expected = refit(
        x[:, left],
        F.conv2d(x, weight, padding=k // 2),
        regression_weight(weight[:, left]),
        k,
        ridge * of_all / of_rest,
    )
    torch.testing.assert_close(
        conv_weight(elimination.weights()[0], k)[:, left], conv_weight(expected, k), rtol=1e-5, atol=1e-6
    )


def test_fewer_rows_than_columns_dead_channels_and_constant_outputs_are_defined() -> None:
    x, weight = images(n=1)[:, :, :2, :2], normal(4, 6, 3, 3)
    x[:, 3] = 0
    few = consumer(x, weight)
    costs = removal_costs([few])
    assert costs.isfinite().all()
    assert float(costs[3]) < 1e-3
    still = consumer(torch.ones(3, 6, 2, 2, dtype=torch.float64), normal(4, 6, 1, 1))
    assert removal_costs([still]).tolist() == [0.0] * 6


def test_errors_name_the_layer_and_what_is_wrong() -> None:
    x, weight = images(), normal(4, 6, 3, 3)
    m = batch_moments(x, x, 3)
    with pytest.raises(ShapeError, match="layer1: weight of shape"):
        Consumer.of("layer1", m, weight[:, :5], conv_columns(6, 3))
    with pytest.raises(ShapeError, match="layer1: expected columns"):
        Consumer.of("layer1", m, weight, torch.zeros(2, 9, dtype=torch.long))
    with pytest.raises(NonFiniteError, match="layer1"):
        Consumer.of("layer1", batch_moments(x * math.nan, x, 3), weight, conv_columns(6, 3))
    with pytest.raises(ShapeError, match="same channels"):
        BackwardElimination([consumer(x, weight), consumer(x[:, :5], weight[:, :5])])
    with pytest.raises(ShapeError, match="same channels"):
        BackwardElimination([])
    elimination = BackwardElimination([consumer(x, weight)])
    elimination.remove(2)
    for wrong in (2, 6, -1):
        with pytest.raises(OptionError, match="5 of 6 channels are left"):
            elimination.remove(wrong)
    for keep in (0, 6):
        with pytest.raises(OptionError, match="keep must be"):
            elimination.eliminate_until(keep)
    for ridge in (-1.0, math.nan):
        with pytest.raises(OptionError, match="ridge"):
            BackwardElimination([consumer(x, weight)], ridge)


def test_pools_cost_no_more_than_a_little_over_the_exact_choice() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 40, generator=generator, dtype=torch.float64) @ torch.randn(
        40, 200, generator=generator, dtype=torch.float64
    )
    x = x + 0.5 * torch.randn(2000, 200, generator=generator, dtype=torch.float64)
    xx, weight = x.T @ x / 2000, torch.randn(200, 5, generator=generator, dtype=torch.float64)
    every = torch.arange(200)[:, None]
    consumer = Consumer("fc", xx, weight, every, float((weight * (xx @ weight)).sum()))
    pooled, exact = BackwardElimination([consumer], 1e-6), BackwardElimination([consumer], 1e-6)
    order, costs = pooled.eliminate_until(keep=50)
    for _ in range(150):
        exact.remove(int(exact.costs().argmin()))
    assert len(set(order)) == len(order) == 150
    left = [c for c in range(200) if c not in order]
    solved = torch.zeros_like(weight)
    added = 1e-6 * xx.diagonal().mean() * torch.eye(200, dtype=torch.float64)
    quadratic = xx + added
    solved[left] = torch.linalg.solve(quadratic[left][:, left], (quadratic @ weight)[left])
    # An independent solution for the same set
    torch.testing.assert_close(pooled.weights()[0], solved, atol=1e-6, rtol=1e-5)
    apart = weight - solved
    assert sum(costs) == pytest.approx(float((apart * (quadratic @ apart)).sum()) / consumer.variance, rel=1e-6)
    rival = weight - exact.weights()[0]
    assert sum(costs) <= 1.05 * float((rival * (quadratic @ rival)).sum()) / consumer.variance
