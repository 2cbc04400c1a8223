"""Extreme settings of the loss: a student learns, or a warning or an error names its collapsed layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knowiso_train import IsomorphismLoss
from knowiso_train.distillation._collapse import (
    COLLAPSED_CHANGE,
    COLLAPSED_REFRESHES,
    HEALTHY_CHANGE,
    MAX_COLLAPSED_REFRESHES,
    MIN_COLLAPSE_FACTOR,
    CollapseGuard,
)
from knowiso_train.errors import CollapseError, KnowisoWarning
from knowiso_train.features.modules import LayerPair

CLASSES, STEPS, LEARNING_RATE = 8, 80, 0.05


def network(width: int, norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inner, outer in ((3, width), (width, width)):
        layers += [nn.Conv2d(inner, outer, 3, stride=2, padding=1), norm(outer), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


def identity(channels: int) -> nn.Module:
    return nn.Identity()


def batch(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return noisy copies of one random pattern for each class."""
    patterns = torch.randn(CLASSES, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1000 + seed)
    labels = torch.randint(CLASSES, (size,), generator=generator)
    return patterns[labels] + torch.randn(size, 3, 12, 12, generator=generator), labels


def accuracy(model: nn.Module) -> float:
    images, labels = batch(400, seed=-1)
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).float().mean())


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    torch.manual_seed(0)
    model = network(24)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9)
    for step in range(STEPS):
        images, labels = batch(64, step)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert accuracy(model) > 0.95
    return model


@pytest.mark.parametrize(
    "setting",
    [
        *({"weight": "balanced", "ratio": float(ratio)} for ratio in (2, 4, 8)),
        *({"weight": float(weight)} for weight in (100, 300, 1000)),
        {"lr": 4 * LEARNING_RATE},
        *({"batch": size} for size in (8, 512)),
        {"norm": identity},
        {"norm": identity, "weight": 1000.0, "kernel_size": 1},
        {"norm": identity, "weight": 1000.0, "kernel_size": 3},
        {"autocast": True},
        {"autocast": True, "weight": 1000.0, "lr": 4 * LEARNING_RATE},
        {"solver": "learned"},
    ],
    ids=lambda setting: ", ".join(f"{key}={getattr(value, '__name__', value)}" for key, value in setting.items()),
)
def test_a_student_learns_or_its_layer_is_named(setting: dict[str, Any], teacher: nn.Module) -> None:
    """Only a student without normalization and with a fixed weight of 1,000 ends in the error."""
    unnormalized = "norm" in setting
    setting, extreme = dict(setting), unnormalized and "weight" in setting
    lr, size, autocast = setting.pop("lr", LEARNING_RATE), setting.pop("batch", 64), setting.pop("autocast", False)
    torch.manual_seed(3)
    student = network(12, setting.pop("norm", nn.BatchNorm2d))
    iso = IsomorphismLoss(student, teacher, ["2", "5"], refresh=2, **setting)
    optimizer = torch.optim.SGD([*student.parameters(), *iso.parameters()], lr, momentum=0.9)

    def train(num_steps: int = STEPS) -> None:
        for step in range(num_steps):
            images, labels = batch(size, step)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = F.cross_entropy(student(images), labels) + iso()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    with iso:
        if extreme:
            with (
                pytest.warns(KnowisoWarning, match=r"[25]: the student's features have collapsed"),
                pytest.raises(CollapseError, match=r"[25]: "),
            ):
                train(2 * STEPS)  # the weight of the layer is lowered first
        else:
            train()
            assert accuracy(student) > 0.6, f"chance is {1 / CLASSES:.2f}"


@pytest.mark.filterwarnings("ignore:5. the student's features have collapsed")
def test_a_student_with_dead_units_is_stopped(teacher: nn.Module) -> None:
    torch.manual_seed(3)
    student = network(12)
    iso = IsomorphismLoss(student, teacher, ["2", "5"], refresh=1, weight=100.0)
    optimizer = torch.optim.SGD(student.parameters(), LEARNING_RATE, momentum=0.9)

    def train() -> None:
        for step in range(STEPS):
            images, labels = batch(64, step)
            optimizer.zero_grad()
            (F.cross_entropy(student(images), labels) + iso()).backward()
            optimizer.step()
            if step == 2:
                # Behind the ReLU no unit has a value or a gradient from now on
                student[4].bias.data -= 1e3

    with iso, pytest.raises(CollapseError, match=r"5: .* stay collapsed, .* lowered to 0.1: variance"):
        train()


def guard() -> tuple[CollapseGuard, Tensor, Tensor]:
    """Return a guard, healthy features that it has as reference, and collapsed ones."""
    torch.manual_seed(0)
    healthy = torch.randn(16, 8, 4, 4)
    new = CollapseGuard([LayerPair("a", "b")])
    new.refresh([healthy], [healthy], [50.0])
    return new, healthy, healthy[:, :1].expand(-1, 8, -1, -1)


@pytest.mark.filterwarnings("ignore:a. the student's features have collapsed")
def test_weights_fall_and_grow_back() -> None:
    new, healthy, collapsed = guard()
    factors = []
    # The last but one has a rank of 1.3, neither collapsed nor healthy, and leaves the factor as it is
    for feature in [collapsed] * 5 + [healthy] * 2 + [healthy + 5 * collapsed] + [healthy] * 70:
        new.refresh([feature], [healthy], [50.0])
        factors.append(new.factor(0))
    lowest = COLLAPSED_CHANGE ** (5 - COLLAPSED_REFRESHES + 1)
    assert factors[:5] == [1, 1, COLLAPSED_CHANGE, COLLAPSED_CHANGE**2, lowest]
    assert factors[5:8] == pytest.approx([lowest * HEALTHY_CHANGE**power for power in (1, 2, 2)])
    assert factors[-1] == 1
    for _ in range(MAX_COLLAPSED_REFRESHES - 1):
        new.refresh([collapsed], [healthy], [50.0])
    with pytest.raises(CollapseError, match="a: the student's features stay collapsed"):
        new.refresh([collapsed], [healthy], [50.0])
    assert new.factor(0) == MIN_COLLAPSE_FACTOR


def test_features_that_change_without_collapse_keep_their_weight() -> None:
    new, healthy, collapsed = guard()
    too_few = (healthy[:, :, :1, :1][:8], collapsed[:1, :, :1])
    for feature in (0.2 * healthy, 100 * healthy, healthy + 5, collapsed, healthy, collapsed, *too_few):
        new.refresh([feature], [healthy], [50.0])
    # A single channel of large variance leaves the rank of the correlations
    healthy[:, 0] *= 1000
    for _ in range(5):
        new.refresh([healthy], [healthy], [50.0])
    # Weight decay shrinks features before a normalization slowly
    for call in range(1000):
        new.refresh([healthy * 0.99**call], [healthy], [50.0])
    assert new.states[0].num_collapsed == 0
    assert new.factor(0) == 1


def test_a_student_of_a_teacher_of_low_rank_keeps_its_weight() -> None:
    _, healthy, collapsed = guard()
    new = CollapseGuard([LayerPair("a", "b")])
    for feature in (healthy, *[collapsed + 0.03 * healthy] * 10):
        new.refresh([feature], [collapsed + 0.03 * healthy], [50.0])
    assert new.factor(0) == 1
