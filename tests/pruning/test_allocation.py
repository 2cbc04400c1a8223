"""Allocation of widths against brute force, and costs against pruned networks."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import knowiso_train as ki
from knowiso_train.errors import OptionError
from knowiso_train.pruning._channel_groups import channel_groups
from knowiso_train.pruning._tracing import trace_model
from knowiso_train.pruning.allocation import (
    LayerCost,
    allocate,
    allowed_widths,
    count_macs,
    count_positions,
    layer_costs,
    total_cost,
    unlayered_costs,
)
from tests.helpers.prune_models import family, little


def test_allocation_is_the_best_of_all_where_removal_costs_are_convex() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        removal_costs, costs = {}, {}
        for name in "abc":
            steps = torch.rand(6, generator=generator, dtype=torch.float64).sort().values
            removal_costs[name] = torch.cat([steps.cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
            costs[name] = LayerCost(1.0, 1.0, 6.0, {}, {name: 1.0})
        found = allocate(removal_costs, costs, 9.0, min_width=0.1)
        assert total_cost(costs, {n: 6 - w for n, w in found.items()}) <= 9
        best = min(
            sum(float(removal_costs[n][w]) for n, w in zip("abc", widths, strict=True))
            for widths in itertools.product(range(1, 7), repeat=3)
            if sum(widths) <= 9
        )
        assert sum(float(removal_costs[n][w]) for n, w in found.items()) == pytest.approx(best)


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
    costs |= unlayered_costs(model, groups, costs, images[:2])
    gone = {width.name: width.before - width.after for width in pruned.report.widths}
    assert total_cost(costs, {}) == pruned.report.macs[0]
    assert total_cost(costs, gone) == pytest.approx(pruned.report.macs[1])


def test_a_reduced_group_lowers_the_saving_of_its_neighbor() -> None:
    """Layers 1 -> a -> b -> 1 of widths (8, 8): a unit of `b` saves 9 multiply-adds first, and 5 after `a` lost four.

    `a` loses its four free units first. One more of `a` then costs 1/9 for each saved multiply-add, and one of `b`
    costs 0.9/5. With the outdated saving of `b`, 0.9/9, `b` would be reduced instead.
    """
    costs = {
        "first": LayerCost(1.0, 1.0, 8.0, {}, {"a": 1.0}),
        "second": LayerCost(1.0, 8.0, 8.0, {"a": 1.0}, {"b": 1.0}),
        "third": LayerCost(1.0, 8.0, 1.0, {"b": 1.0}, {}),
    }
    removal_costs = {
        "a": torch.tensor([9.0, 9.0, 3.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64),
        "b": torch.tensor([9.0, 7.2, 6.0, 4.8, 3.6, 2.7, 1.8, 0.9, 0.0], dtype=torch.float64),
    }
    assert total_cost(costs, {}) == 80
    assert total_cost(costs, {"a": 4}) == 44
    assert allocate(removal_costs, costs, 44.0) == {"a": 4, "b": 8}
    assert allocate(removal_costs, costs, 36.0) == {"a": 3, "b": 8}


def test_widths_of_coupled_groups_equal_those_of_a_full_search_in_each_step() -> None:
    """In a chain of layers, the cost that a group saves depends on the widths of its neighbors."""
    generator = torch.Generator().manual_seed(0)
    for round_to, share in itertools.product((1, 3), (0.7, 0.4, 0.2)):
        sizes = {name: 7 + 3 * i for i, name in enumerate("abcd")}
        removal_costs = {
            name: torch.cat(
                [
                    torch.rand(size, generator=generator, dtype=torch.float64).cumsum(0).flip(0),
                    torch.zeros(1, dtype=torch.float64),
                ]
            )
            for name, size in sizes.items()
        }
        ends = [3, *sizes.values(), 2]
        names = [None, *sizes, None]
        costs = {
            f"layer{i}": LayerCost(1.0 + i, float(m), float(n), {a: 1.0} if a else {}, {b: 1.0} if b else {})
            for i, (m, n, a, b) in enumerate(zip(ends, ends[1:], names, names[1:], strict=False))
        }
        target = share * total_cost(costs, {})
        assert allocate(removal_costs, costs, target, min_width=0.1, round_to=round_to) == full_search(
            removal_costs, costs, target, 0.1, round_to
        )


def full_search(
    removal_costs: dict[str, Tensor], costs: dict[str, LayerCost], target: float, min_width: float, round_to: int
) -> dict[str, int]:
    sizes = {name: len(harm) - 1 for name, harm in removal_costs.items()}
    widths = dict(sizes)

    def cost(changed: dict[str, int]) -> float:
        return total_cost(costs, {name: sizes[name] - width for name, width in {**widths, **changed}.items()})

    while cost({}) > target:
        steps = []
        for name, size in sizes.items():
            narrower = [width for width in allowed_widths(size, min_width, round_to) if width < widths[name]]
            enough = [width for width in narrower if cost({name: width}) <= target]
            for width in narrower if not enough else narrower[: narrower.index(enough[0]) + 1]:
                steps.append(
                    (
                        float(removal_costs[name][width] - removal_costs[name][widths[name]])
                        / (cost({}) - cost({name: width})),
                        name,
                        width,
                    )
                )
        _, name, width = min(steps)
        widths[name] = width
    return widths


class Attention(nn.Module):
    """One attention layer by its own products, with or without the fused function."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.qkv, self.proj, self.fused = nn.Linear(8, 24), nn.Linear(8, 8), fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.fused:
            return self.proj(nn.functional.scaled_dot_product_attention(q, k, v))
        return self.proj((q @ k.transpose(1, 2)).softmax(-1) @ v)


class Functional(nn.Module):
    """A linear layer that a function computes with its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.layer.weight)


class Twice(nn.Module):
    """Self-attention of torch, whose fast path is one operation."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


POSITIONS, WIDTH = 5, 8
PROJECTIONS, PRODUCTS = 4 * POSITIONS * WIDTH * WIDTH, 2 * POSITIONS**2 * WIDTH


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Linear(8, 6), POSITIONS * 8 * 6),
        (Functional(), POSITIONS * 8 * 6),
        (Attention(fused=False), PROJECTIONS + PRODUCTS),
        (Attention(fused=True), PROJECTIONS + PRODUCTS),
        (Twice(), PROJECTIONS + PRODUCTS),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), PROJECTIONS + PRODUCTS + 2 * POSITIONS * 8 * 16),
        (nn.LSTM(8, 3, batch_first=True), POSITIONS * 4 * 3 * (8 + 3)),
        (nn.GRU(8, 3, batch_first=True), POSITIONS * 3 * 3 * (8 + 3)),
        (nn.RNN(8, 3, batch_first=True), POSITIONS * 3 * (8 + 3)),
        (nn.Conv1d(5, 4, 3, padding=1), WIDTH * 5 * 4 * 3),
        (nn.Conv1d(5, 5, 3, padding=1, groups=5), WIDTH * 5 * 3),
        (nn.ConvTranspose1d(5, 4, 3), WIDTH * 5 * 4 * 3),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.parametrize("images", [1, 3])
def test_the_multiply_adds_are_those_of_the_whole_network(model: nn.Module, expected: float, images: int) -> None:
    x = torch.randn(images, POSITIONS, WIDTH)
    flags = torch.backends.mkldnn.enabled, torch.backends.mha.get_fastpath_enabled()
    assert count_macs(model.eval(), x) == expected
    assert flags == (torch.backends.mkldnn.enabled, torch.backends.mha.get_fastpath_enabled())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_the_budget_is_a_fraction_of_the_whole_network(name: str) -> None:
    model, images = family("vit_tiny_patch16_224" if name == "test_vit" else name)
    pruned = ki.prune(model, [images], macs=0.6, refit=False, progress=False)
    macs = [count_macs(network, images[:1]) for network in (model, pruned.model)]
    assert list(pruned.report.macs) == macs
    assert 0.45 < macs[1] / macs[0] <= 0.6
