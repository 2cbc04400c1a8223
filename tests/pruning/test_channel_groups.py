"""Parts of `ki.prune` against brute force: allocation, costs, elimination by pools, units of a group."""

from __future__ import annotations

import itertools

import pytest
import torch

from knowiso_train.errors import OptionError
from knowiso_train.pruning.allocation import (
    LayerCost,
    allocate,
    allowed_widths,
    count_positions,
    layer_costs,
    total_cost,
)
from knowiso_train.pruning.channel_groups import ChannelGroup, channel_groups
from knowiso_train.pruning.elimination import BackwardElimination, Consumer
from knowiso_train.pruning.tracing import trace_model
from tests.helpers.prune_models import family, little


def test_allocation_is_the_best_of_all_where_harms_are_convex() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        harms, costs = {}, {}
        for name in "abc":
            steps = torch.rand(6, generator=generator, dtype=torch.float64).sort().values
            harms[name] = torch.cat([steps.cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
            costs[name] = LayerCost(1.0, 1.0, 6.0, {}, {name: 1.0})
        found = allocate(harms, costs, 9.0, min_width=0.1)
        assert total_cost(costs, {n: 6 - w for n, w in found.items()}) <= 9
        best = min(
            sum(float(harms[n][w]) for n, w in zip("abc", widths, strict=True))
            for widths in itertools.product(range(1, 7), repeat=3)
            if sum(widths) <= 9
        )
        assert sum(float(harms[n][w]) for n, w in found.items()) == pytest.approx(best)


def test_widths_that_are_allowed() -> None:
    assert allowed_widths(12, 0.3, 1) == [12, 11, 10, 9, 8, 7, 6, 5, 4]
    assert allowed_widths(12, 0.3, 5) == [12, 10, 5]
    with pytest.raises(OptionError, match=r"0\.667 is left"):
        allocate({"a": torch.zeros(4)}, {"a": LayerCost(1.0, 1.0, 3.0, {}, {"a": 1.0})}, 1.0, min_width=0.6)


@pytest.mark.parametrize("name", ["test_resnet", "regnety_002", "densenet121", "vit_tiny_patch16_224"])
def test_costs_are_what_the_pruned_network_computes(name: str) -> None:
    model, images = family(name)
    pruned = little(model, images, refit=False)
    groups = channel_groups(model, images[:2], trace_model(model, images[:2]))
    costs = layer_costs(model, groups, count_positions(model, images[:2]))
    gone = {width.name: width.before - width.after for width in pruned.report.widths}
    assert total_cost(costs, {}) == pruned.report.macs[0]
    assert total_cost(costs, gone) == pytest.approx(pruned.report.macs[1])


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


def test_units_of_a_group() -> None:
    group = ChannelGroup("x", 2, {"fc": torch.tensor([[0, 1], [2, 3]])})
    assert group.input_masks({"fc": 5}, [0])["fc"].tolist() == [False, False, True, True, True]
