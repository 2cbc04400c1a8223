"""The default ridge of the closed-form maps, which falls during the training."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from knowiso_train import IsomorphismLoss
from knowiso_train.distillation._closed_form_map import MIN_RIDGE, START_RIDGE, ClosedFormMap, decaying_ridge
from knowiso_train.errors import OptionError
from tests.distillation.test_loss import built


def test_the_ridge_falls_from_its_start_to_its_bound() -> None:
    ridges = [decaying_ridge(call) for call in range(0, 20_000, 100)]
    assert ridges[0] == START_RIDGE
    assert ridges[-1] == MIN_RIDGE
    assert all(later < earlier or later == MIN_RIDGE for earlier, later in itertools.pairwise(ridges))


@pytest.mark.parametrize("calls", [0, 1000, 14_500])
def test_a_solve_has_the_ridge_of_its_call(calls: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(64, width, 4, 4, generator=generator) for width in (3, 5))
    maps = [ClosedFormMap(3, 5, ridge=ridge) for ridge in ("auto", {0: 0.3, 1000: 0.1, 14_500: 0.01}[calls])]
    for map_ in maps:
        map_.calls = calls
        map_.update(x, y)
        map_.solve()
        assert map_.ready
    torch.testing.assert_close(maps[0].weight, maps[1].weight)
    # The moments are equal; only the ridge of the calls differs
    other = ClosedFormMap(3, 5, ridge="auto")
    other.calls = calls + 1000
    other.moments.load_state_dict(maps[0].moments.state_dict())
    other.solve()
    if decaying_ridge(calls) == MIN_RIDGE:
        assert torch.equal(other.weight, maps[0].weight)
    else:
        assert float(other.weight.norm()) > float(maps[0].weight.norm())


def test_a_resumed_loss_continues_with_its_ridge() -> None:
    student, teacher = built(1), built(2)
    options: dict[str, Any] = {"weight": 1.0}
    iso = IsomorphismLoss(student, teacher, "3", **options)
    with iso:
        for _ in range(12):
            student(torch.randn(16, 3, 8, 8))
            iso()
    resumed = IsomorphismLoss(student, teacher, "3", **options)
    resumed.load_state_dict(iso.state_dict())
    (first,), (second,) = iso.maps.values(), resumed.maps.values()
    assert first.calls == second.calls == 12
    for map_ in (first, second):
        map_.solve()
    assert torch.equal(first.weight, second.weight)


@pytest.mark.parametrize("ridge", ["small", -0.1, float("nan")])
def test_other_ridges_raise(ridge: Any) -> None:
    with pytest.raises(OptionError, match="ridge must be"):
        IsomorphismLoss(built(1), built(2), "3", ridge=ridge, weight=1.0)
