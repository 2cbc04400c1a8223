"""Comparison of the measured images with those that the student is trained on."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from knowiso_train import IsomorphismCallback, IsomorphismLoss, measure
from knowiso_train.errors import KnowisoWarning, OptionError


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU())


def images(seed: int) -> Tensor:
    return torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


HELD_OUT = [images(100), images(101), images(102)]
LOOPS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean and deviation": lambda x: (x - 0.485) / 0.229,
    "mean": lambda x: x - 0.5,
    "deviation": lambda x: 0.5 + (x - 0.5) / 0.5,
    "bytes": lambda x: 255 * x,
}


def means(x: Tensor) -> Tensor:
    return x.mean((0, 2, 3))


def deviations(x: Tensor) -> Tensor:
    return x.std((0, 2, 3))


def messages_of(loop: Callable[[Tensor], Tensor], **options: Any) -> tuple[list[str], IsomorphismCallback]:
    """Train with the normalization of a loop, measure twice, and return the warnings and the monitor."""
    iso = IsomorphismLoss(network(1), network(2), "1", refresh=2, scale="linear", weight=1.0)
    monitor = IsomorphismCallback.of(iso, HELD_OUT, every=4, **options)
    with iso, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in range(8):
            iso.student(loop(images(call)))
            iso()
            monitor.step()
    return [str(warning.message) for warning in caught if issubclass(warning.category, KnowisoWarning)], monitor


@pytest.mark.parametrize("loop", list(LOOPS))
def test_another_normalization_warns_once_with_both_figures(loop: str) -> None:
    messages, _ = messages_of(LOOPS[loop])
    assert len(messages) == 1
    figures = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", messages[0])]
    trained = LOOPS[loop](torch.cat([images(0), images(2)]))
    expected = [statistic(part) for part in (torch.cat(HELD_OUT), trained) for statistic in (means, deviations)]
    scale = float(trained.std())
    assert figures == pytest.approx(torch.cat(expected).tolist(), rel=0.05, abs=0.05 * scale)
    assert "Pass transform=" in messages[0]


@pytest.mark.parametrize("loop", list(LOOPS))
def test_transform_gives_both_networks_the_inputs_of_the_loop(loop: str) -> None:
    messages, monitor = messages_of(LOOPS[loop], transform=LOOPS[loop], teacher_transform=lambda x: 2 * x)
    assert not messages
    direct = measure(
        monitor.student,
        monitor.teacher,
        [LOOPS[loop](batch) for batch in HELD_OUT],
        "1",
        order=0,
        kernel_size=3,
        target_transform=lambda x: 2 * x,
        progress=False,
    )
    assert monitor.history[-1].report["1"].shares == pytest.approx(direct["1"].shares, rel=1e-5)
    assert not monitor.student._forward_pre_hooks


def test_augmented_images_do_not_warn() -> None:
    def augment(x: Tensor) -> Tensor:
        mixed = 0.8 * x + 0.2 * x.flip(0)
        mixed[:, :, :2, :2] = 0
        return mixed

    messages, _ = messages_of(augment)
    assert not messages


def test_two_transforms_of_the_student_raise() -> None:
    with pytest.raises(OptionError, match="not both"):
        IsomorphismCallback(network(1), network(2), HELD_OUT, "1", transform=torch.relu, source_transform=torch.relu)
