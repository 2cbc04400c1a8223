"""Extreme settings of the loss: every student learns the task, or a warning or an error names the collapsed layer."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knowiso_train import IsomorphismLoss
from knowiso_train.errors import KnowisoWarning, NonFiniteError

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
        {"norm": identity, "weight": 1000.0},
        {"autocast": True},
        {"autocast": True, "weight": 1000.0, "lr": 4 * LEARNING_RATE},
    ],
    ids=lambda setting: ", ".join(f"{key}={getattr(value, '__name__', value)}" for key, value in setting.items()),
)
def test_a_student_learns_or_its_layer_is_named(setting: dict[str, Any], teacher: nn.Module) -> None:
    setting = dict(setting)
    lr, size, autocast = setting.pop("lr", LEARNING_RATE), setting.pop("batch", 64), setting.pop("autocast", False)
    torch.manual_seed(3)
    student = network(12, setting.pop("norm", nn.BatchNorm2d))
    iso = IsomorphismLoss(student, teacher, ["2", "5"], **setting)
    optimizer = torch.optim.SGD([*student.parameters(), *iso.parameters()], lr, momentum=0.9)
    named = []
    with warnings.catch_warnings(record=True) as caught, iso:
        warnings.simplefilter("always", KnowisoWarning)
        try:
            for step in range(STEPS):
                images, labels = batch(size, step)
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = F.cross_entropy(student(images), labels) + iso()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        except NonFiniteError as error:
            named.append(str(error))
    named += [str(warning.message) for warning in caught if "have collapsed" in str(warning.message)]
    assert all(name.startswith(("2: ", "5: ")) or "student's '" in name for name in named)
    assert named or accuracy(student) > 0.6, f"silent: accuracy {accuracy(student):.2f} of chance {1 / CLASSES:.2f}"
