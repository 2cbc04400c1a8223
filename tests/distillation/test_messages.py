"""Errors and warnings of plausible mistakes with the loss."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from knowiso_train import IsomorphismCallback, IsomorphismLoss
from knowiso_train.errors import InputTypeError, KnowisoWarning, OptionError, ShapeError
from tests.helpers.small_networks import built


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(16, 3, 8, 8, dtype=dtype)


def teacher_with_dropout() -> nn.Sequential:
    return nn.Sequential(nn.Dropout(0.5), *built(2))


@pytest.mark.parametrize("example", [None, images(torch.float64)], ids=["guessed", "example"])
def test_a_student_of_another_dtype_is_named(example: Tensor | None) -> None:
    with pytest.raises(
        (InputTypeError, OptionError),
        match=r"teacher has weights of torch.float32, and the student's images are torch.float64. "
        r"Pass teacher_transform=lambda images: images.to\(torch.float32\)",
    ):
        IsomorphismLoss(built(1).double(), built(2), ["3"], example=example)
    iso = IsomorphismLoss(built(1).double(), built(2), ["3"], teacher_transform=lambda x: x.float())
    with iso:
        iso.student(images(torch.float64))
        iso()


def test_an_error_of_the_teacher_with_images_of_its_dtype_is_not_replaced() -> None:
    iso = IsomorphismLoss(built(1), built(2), ["3"])
    iso.teacher.register_forward_pre_hook(lambda *_: torch.zeros(2) @ torch.zeros(3))
    with iso:
        iso.student(images())
        with pytest.raises(RuntimeError, match="size"):
            iso()


def test_cached_features_that_do_not_fit_raise() -> None:
    iso = IsomorphismLoss(built(1), built(2), ["3"])
    with iso:
        for features, error, message in (
            (images(), InputTypeError, "mapping from layer names, got Tensor"),
            ({"3": torch.randn(16, 7, 8, 8)}, ShapeError, "7 channels, 20 before. Pass features of the same layer"),
        ):
            iso.student(images())
            with pytest.raises(error, match=message):
                iso(teacher_features=features)  # type: ignore[arg-type]


def test_a_loader_beside_named_layers_raises() -> None:
    with pytest.raises(OptionError, match=r'loader= has no effect with layers by name, only with layers="auto"'):
        IsomorphismLoss(built(1), built(2), ["3"], loader=[images()])


@pytest.mark.parametrize("mode", ["training", "eval", "mutual learning"])
def test_a_teacher_that_was_called_in_training_mode_is_named(mode: str) -> None:
    """Mutual learning trains the teacher too, with outputs that have a gradient."""
    iso = IsomorphismLoss(built(1), teacher_with_dropout(), {"3": "4"})
    iso.teacher.train(mode != "eval")
    with iso, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", KnowisoWarning)
        for _ in range(3):
            x = images()
            iso.student(x)
            with torch.set_grad_enabled(mode == "mutual learning"):
                output = iso.teacher(x)
            iso(teacher_output=output)
    assert [str(warning.message) for warning in caught] == (mode == "training") * [
        "the teacher was called in training mode, in which batch normalization and dropout depend on the batch. Call "
        "teacher.eval() before"
    ]


def test_the_fixed_weight_in_the_place_of_balanced_ones_is_named_once() -> None:
    iso = IsomorphismLoss(built(1), built(2), ["3"], refresh=2, ratio=3.0)
    with iso, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", KnowisoWarning)
        for _ in range(20):
            iso.student(images())
            iso().backward()
    messages = [str(warning.message) for warning in caught]
    assert ["gradients from this loss alone, so their weights are 200" in message for message in messages] == [True]
    assert iso.log()["iso/train/3/weight"] == 200  # 3 times 100, but at most 200


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((nn.Linear(2, 2), []), {}, InputTypeError, "takes an IsomorphismLoss, got Linear"),
        ((IsomorphismLoss(built(1), built(2), ["3"]), []), {"layers": ["3"]}, OptionError, "Leave layers= out"),
    ],
)
def test_a_monitor_of_something_else_raises(
    arguments: tuple[Any, Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        IsomorphismCallback.of(*arguments, **options)
