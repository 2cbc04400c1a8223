"""Logarithmic and linear scale of the loss, bound of balanced weights, and warnings of collapsed features."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knowiso_train.distillation import IsomorphismLoss, _scale
from knowiso_train.distillation._balancing import MAX_BALANCED_WEIGHT
from knowiso_train.distillation._collapse import COLLAPSED_CHANGE, COLLAPSED_REFRESHES
from knowiso_train.distillation.config import FALLBACK_WEIGHT
from knowiso_train.errors import KnowisoWarning
from tests.helpers.small_networks import built

FORMS: list[dict[str, Any]] = [
    {},
    {"kernel_size": 3},
    {"target": "consensus"},
    {"solver": "learned", "order": 1, "penalty": 0.3},
]


def solved(student: nn.Module, options: dict[str, Any]) -> IsomorphismLoss:
    """Return a loss whose map is solved; of equal state for equal options apart from scale and weight."""
    torch.manual_seed(0)
    peers = [built(3)] if options.get("target") == "consensus" else []
    iso = IsomorphismLoss(student, built(2), ["3"], peers=peers, **options)
    with iso:
        for call in range(25):
            student(images(call))
            iso()
    return iso


def images(seed: int) -> Tensor:
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def loss_and_gradients(iso: IsomorphismLoss) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """Return the loss of a batch, and the gradients of the student and of the map, by parameter."""
    student = iso.student
    student.zero_grad()
    iso.zero_grad()
    with iso:
        student(images(99))
        loss = iso()
    loss.backward()
    gradients = [
        {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        for module in (student, iso)
    ]
    return float(loss.detach()), gradients[0], gradients[1]


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_the_log_gradient_is_that_of_the_share_divided_by_the_share(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The learned map is untrained here and explains nothing
    monkeypatch.setattr(_scale, "map_reliability", torch.ones_like)
    student = built(1)
    linear, log = (
        solved(student, {**options, "scale": scale, "weight": weight})
        for scale, weight in (("linear", 1.0), ("log", 7.0))
    )
    _, expected, map_gradients = loss_and_gradients(linear)
    share = 1 - linear.log()["iso/train/3/share"]
    loss, gradients, log_map_gradients = loss_and_gradients(log)
    figures = log.log()
    assert share > 0
    assert loss == pytest.approx(7.0 * torch.tensor(share + 1e-3).log().item(), rel=1e-4)
    assert figures["iso/train/3/loss"] == pytest.approx(loss / 7.0, rel=1e-4)
    assert figures["iso/train/3/share"] == pytest.approx(1 - share, rel=1e-4)
    assert figures["iso/train/3/weight"] == 7.0
    assert expected
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], 7.0 * gradient / (share + 1e-3), rtol=1e-3, atol=1e-6)
    # The map of its own trains on the share and its penalty, whatever the weight
    assert bool(map_gradients) == (options.get("solver") == "learned")
    for name, gradient in map_gradients.items():
        torch.testing.assert_close(log_map_gradients[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"solver": "learned"}], ids=str)
def test_a_map_that_explains_nothing_has_no_gradient_at_the_student(options: dict[str, Any]) -> None:
    iso = solved(built(1), {**options, "refresh": 1000})
    for map_ in iso.maps.values():
        for name, tensor in {**dict(map_.named_parameters()), **dict(map_.named_buffers())}.items():
            if "weight" in name and tensor.is_floating_point():
                tensor.data *= -3
    _, gradients, map_gradients = loss_and_gradients(iso)
    assert iso.log()["iso/train/3/share"] < 0
    assert gradients
    assert not any(gradient.any() for gradient in gradients.values())
    # A learned map continues to train
    assert any(bool(gradient.any()) for gradient in map_gradients.values()) == ("solver" in options)


@pytest.mark.filterwarnings("ignore:weight=.auto. has nothing to balance against")
def test_the_default_is_the_logarithm_with_weight_100_without_another_loss() -> None:
    iso = IsomorphismLoss(built(1), built(2), ["3"], refresh=2)
    with iso:
        for call in range(8):
            iso.student(images(call))
            iso().backward()
    assert iso.config.scale == "log"
    assert iso.log()["iso/train/3/weight"] == 100.0


@pytest.mark.parametrize("scale", ["log", "linear"])
def test_the_loss_has_no_value_and_no_gradient_before_the_map_is_solved(scale: Any) -> None:
    student = built(1)
    iso = IsomorphismLoss(student, built(2), ["3"], scale=scale)
    loss, gradients, _ = loss_and_gradients(iso)
    assert loss == 0
    assert gradients
    assert not any(gradient.any() for gradient in gradients.values())
    log = iso.log()
    assert log["iso/train/3/ready"] == 0
    assert math.isnan(log["iso/train/3/share"])
    assert math.isnan(log["iso/train/3/loss"])


@pytest.mark.filterwarnings("ignore:.*the teacher's feature is constant")
@pytest.mark.parametrize("options", [FORMS[0], FORMS[3]], ids=str)
def test_a_constant_target_has_loss_zero(options: dict[str, Any]) -> None:
    student, teacher = built(1), built(2)
    teacher[2].weight.data.zero_()
    iso = IsomorphismLoss(student, teacher, ["3"], **options)
    with iso:
        for call in range(25):
            student(images(call))
            assert iso() == 0


def test_nan_raises_in_the_scale_of_the_logarithm() -> None:
    iso = solved(built(1), {})
    iso.student[2].weight.data[0, 0] = float("nan")
    with pytest.raises(ArithmeticError, match="NaN or Inf"):
        loss_and_gradients(iso)


@pytest.mark.parametrize("scale", ["log", "linear"])
def test_balanced_weights_are_bounded(scale: Any) -> None:
    student = built(1)
    iso = IsomorphismLoss(student, built(2), ["3"], scale=scale, weight="balanced", ratio=1e6)
    with iso:
        for call in range(40):
            loss = F.cross_entropy(student(images(call)), torch.arange(16) % 5) + iso()
            loss.backward()
    assert iso.log()["iso/train/3/weight"] == MAX_BALANCED_WEIGHT == 200


@pytest.mark.parametrize("damage", ["variance", "rank"])
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_collapsed_features_are_named_within_a_few_refreshes(options: dict[str, Any], damage: str) -> None:
    options = {"weight": FALLBACK_WEIGHT, **options}
    iso = solved(built(1), {**options, "refresh": 2})
    layer = iso.student[2]
    with torch.no_grad():
        if damage == "variance":
            layer.weight *= 1e-3
        else:
            layer.weight.copy_(layer.weight[:1].expand_as(layer.weight).clone())
            layer.bias.copy_(layer.bias[:1].expand_as(layer.bias).clone())
    with iso, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in range(4 * COLLAPSED_REFRESHES):
            iso.student(images(call))
            iso()
            if call < 2 * (COLLAPSED_REFRESHES - 1):
                assert not any("have collapsed" in str(warning.message) for warning in caught)
    named = [warning for warning in caught if "have collapsed" in str(warning.message)]
    assert len(named) == 1
    assert issubclass(named[0].category, KnowisoWarning)
    assert str(named[0].message).startswith("3: the student's features have collapsed")
    assert f"is lowered to {FALLBACK_WEIGHT * COLLAPSED_CHANGE:.3g}, " in str(named[0].message)
    weight = iso.log()["iso/train/3/weight"]
    assert weight < FALLBACK_WEIGHT * COLLAPSED_CHANGE
    # A training that resumes has the same weight, one from a state without the figures of the collapse has the whole
    state = iso.state_dict()
    old = state | {"_extra_state": state["_extra_state"][:2]}
    for saved, expected in ((state, weight), (old, FALLBACK_WEIGHT)):
        resumed = solved(iso.student, {**options, "refresh": 100})
        resumed.load_state_dict(saved)
        with resumed:
            iso.student(images(0))
            resumed()
        assert resumed.log()["iso/train/3/weight"] == pytest.approx(expected)
