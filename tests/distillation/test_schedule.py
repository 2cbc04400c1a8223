"""Factor of the loss that follows the learning rate of the student's optimizer."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from knowiso_train import IsomorphismLoss
from knowiso_train.distillation import _schedule
from knowiso_train.errors import KnowisoWarning, OptionError
from tests.helpers.small_networks import built

STEPS = 24
WEIGHT = 100.0


def images(step: int) -> Tensor:
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(step))


def factors(iso: IsomorphismLoss, optimizers: Iterable[Any], rates: Iterable[float]) -> list[float]:
    """Return the factor of every call, with the learning rate of each step as a multiple of the first."""
    first, values = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers], []
    for step, rate in enumerate(rates):
        loss = iso.student(images(step)).square().mean() + iso()
        loss.backward()
        values.append(iso.log()["iso/train/3/weight"] / WEIGHT)
        for optimizer, initial in zip(optimizers, first, strict=True):
            for group, lr in zip(optimizer.param_groups, initial, strict=True):
                group["lr"] = lr * rate
            optimizer.step()
            optimizer.zero_grad()
    return values


def expected(rates: list[float]) -> list[float]:
    """Return the factors of the calls after steps with these learning rates, by hand."""
    ratios = [1.0, *(rate / max(rates[: step + 1]) for step, rate in enumerate(rates[:-1]))]
    return [1.0 if ratio >= 0.5 else max(0.02, 4 * ratio * (1 - ratio)) for ratio in ratios]


@pytest.mark.parametrize("kind", ["cosine", "steps", "warmup", "constant", "restart"])
def test_weights_follow_the_learning_rate(kind: str) -> None:
    rates = {
        "cosine": [(1 + math.cos(math.pi * step / STEPS)) / 2 for step in range(STEPS)],
        "steps": [0.1 ** (step // 6) for step in range(STEPS)],
        "warmup": [(step + 1) / STEPS for step in range(STEPS)],
        "constant": [1.0] * STEPS,
        "restart": [1 - (step % 8) / 8 for step in range(STEPS)],
    }[kind]
    iso = IsomorphismLoss(built(1), built(2), ["3"], weight=WEIGHT)
    optimizer = torch.optim.SGD([*iso.student.parameters(), *iso.parameters()], lr=1e-3)
    with iso:
        values = factors(iso, [optimizer], rates)
    assert values == pytest.approx(expected(rates))
    if kind == "cosine":
        # One in the first half, then a cosine down to 0.02, as the equation of the second half states
        cosine = [(1 - math.cos(2 * math.pi * step / STEPS)) / 2 for step in range(STEPS // 2, STEPS)]
        assert values[1:] == pytest.approx([1.0] * (STEPS // 2) + [max(0.02, value) for value in cosine[:-1]])
    if kind in ("warmup", "constant"):
        assert values == [1.0] * STEPS


def test_the_optimizer_with_most_weights_of_the_student_counts() -> None:
    """Muon and AdamW have unlike learning rates; other networks have optimizers of their own."""
    iso = IsomorphismLoss(built(1), built(2), ["3"], weight=WEIGHT)
    tensors = sorted(iso.student.parameters(), key=Tensor.numel)
    other = nn.Linear(2, 2)
    optimizers = [
        torch.optim.AdamW(tensors[:-2], lr=1e-5),
        torch.optim.SGD([{"params": tensors[-2:-1], "lr": 1e-4}, {"params": tensors[-1:], "lr": 1e-3}]),
    ]
    foreign = torch.optim.SGD(other.parameters(), lr=5.0)
    with iso:
        rates = [1.0, 1.0, 0.25, 0.1]
        values = []
        for rate in rates:
            values += factors(iso, optimizers, [rate])
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] /= rate
            foreign.step()
    assert values == pytest.approx([1.0, 1.0, 1.0, 0.75])


def test_the_maximum_is_that_of_the_same_optimizer() -> None:
    """A new head is trained first, at a larger learning rate, or beside the whole network."""
    iso = IsomorphismLoss(built(1), built(2), ["3"], weight=WEIGHT)
    head, *body = reversed(list(iso.student.parameters()))
    small, all_at_once = torch.optim.SGD([head], lr=1.0), torch.optim.AdamW(iso.student.parameters(), lr=1e-4)
    rest = torch.optim.SGD(body, lr=1e-3)
    with iso:
        assert factors(iso, [small], [1.0] * 3) == [1.0] * 3
        assert factors(iso, [small, rest], [1.0] * 3) == [1.0] * 3
        assert factors(iso, [all_at_once], [1.0, 0.25, 0.25]) == pytest.approx([1.0, 1.0, 0.75])
        # Another stage of the training with as many weights
        assert factors(iso, [torch.optim.SGD(iso.student.parameters(), lr=1e-5)], [1.0] * 3)[1:] == [1.0] * 2


def test_a_later_stage_with_fewer_weights_is_followed_after_some_steps() -> None:
    iso = IsomorphismLoss(built(1), built(2), ["3"], weight=WEIGHT)
    first = torch.optim.SGD(iso.student.parameters(), lr=1e-3)
    second = torch.optim.SGD(list(iso.student.parameters())[-1:], lr=1e-5)
    waited = _schedule.MAX_STEPS_OF_OTHERS
    with iso:
        factors(iso, [first], [1.0, 1.0, 0.1])
        values = factors(iso, [second], [1.0] * (waited + 2))
        assert values == pytest.approx([0.36] * (waited + 1) + [1.0])
        assert factors(iso, [second], [0.25, 0.25]) == pytest.approx([1.0, 0.75])
        # A step of the larger one is followed at once
        first.param_groups[0]["lr"] = 1e-3
        assert factors(iso, [first], [0.1, 0.1]) == pytest.approx([0.75, 0.36])


def test_an_optimizer_without_a_learning_rate_is_not_followed() -> None:
    """Adafactor of transformers, with `relative_step=True`."""

    class Relative(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> None:
            pass

    iso = IsomorphismLoss(built(1), built(2), ["3"], weight=WEIGHT)
    with iso:
        for step in range(3):
            (iso.student(images(step)).square().mean() + iso()).backward()
            Relative(iso.student.parameters(), {"lr": None}).step()
        assert iso.log()["iso/train/3/weight"] == WEIGHT


def test_an_optimizer_that_gets_more_weights_keeps_its_maximum() -> None:
    iso = IsomorphismLoss(built(1), built(2), ["3"], weight=WEIGHT)
    first, *others = iso.student.parameters()
    optimizer = torch.optim.SGD([first], lr=1e-3)
    with iso:
        factors(iso, [optimizer], [1.0] * 2)
        optimizer.add_param_group({"params": others, "lr": 1e-3})
        assert factors(iso, [optimizer], [0.25] * 2)[1] == pytest.approx(0.75)


def test_optimizers_with_equally_many_weights_have_their_own_maximum() -> None:
    student = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1))
    iso = IsomorphismLoss(student, copy.deepcopy(student), ["2"], weight=WEIGHT)
    weights = [conv.weight for conv in (student[0], student[3])]
    optimizers = [torch.optim.SGD([weight], lr=lr) for weight, lr in zip(weights, (1e-3, 1e-5), strict=True)]
    with iso:
        for step, rate in enumerate([1.0, 1.0, 0.25, 0.25]):
            (student(images(step)).square().mean() + iso()).backward()
            for optimizer, lr in zip(optimizers, (1e-3, 1e-5), strict=True):
                optimizer.param_groups[0]["lr"] = lr * rate
                optimizer.step()
        assert iso.log()["iso/train/2/weight"] == pytest.approx(0.75 * WEIGHT)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_schedule_that_is_not_finite_raises(value: float) -> None:
    iso = IsomorphismLoss(built(1), built(2), ["3"], schedule=lambda _: value)
    with iso:
        iso.student(images(0))
        with pytest.raises(OptionError, match=r"finite factor, got (nan|inf) at call 0"):
            iso()


@pytest.mark.parametrize("form", ["tensor", "accelerate", "closure"])
def test_forms_of_optimizers(form: str) -> None:
    student = built(1)
    iso = IsomorphismLoss(student, built(2), ["3"], weight=WEIGHT)
    if form == "closure":
        optimizer: Any = torch.optim.LBFGS(student.parameters(), lr=1e-3, max_iter=1)
    else:
        optimizer = torch.optim.AdamW(student.parameters(), torch.tensor(1e-3) if form == "tensor" else 1e-3)
    if form == "accelerate":
        student, optimizer, scheduler = Accelerator(cpu=True).prepare(
            student, optimizer, LambdaLR(optimizer, lambda step: 0.25 if step else 1.0)
        )
    with iso:
        for step in range(3):
            loss = student(images(step)).square().mean() + iso()
            loss.backward()
            optimizer.step(*([lambda loss=loss: loss.detach()] if form == "closure" else []))
            if form == "accelerate":
                scheduler.step()
            else:
                optimizer.param_groups[0]["lr"] = 2.5e-4 * torch.ones(()) if form == "tensor" else 2.5e-4
        assert iso.log()["iso/train/3/weight"] == pytest.approx(0.75 * WEIGHT)


def test_constant_and_own_schedules_do_not_follow() -> None:
    for schedule, factor in ((None, 1.0), (lambda _: 0.3, 0.3)):
        iso = IsomorphismLoss(built(1), built(2), ["3"], weight=WEIGHT, schedule=schedule)
        optimizer = torch.optim.SGD(iso.student.parameters(), lr=1e-3)
        with iso:
            assert factors(iso, [optimizer], [1.0, 0.1, 0.1]) == pytest.approx([factor] * 3)


def test_resumed_training_continues_the_factor() -> None:
    """The maximum of the learning rate is in the state, and the factor of the first call after loading too."""
    rates = [1 - step / STEPS for step in range(STEPS)]
    whole = IsomorphismLoss(built(1), built(2), ["3"], weight=WEIGHT)
    with whole:
        values = factors(whole, [torch.optim.SGD(whole.student.parameters(), lr=1e-3)], rates)
    first = IsomorphismLoss(built(1), built(2), ["3"], weight=WEIGHT)
    with first:
        factors(first, [torch.optim.SGD(first.student.parameters(), lr=1e-3)], rates[:18])
    resumed = IsomorphismLoss(built(1), built(2), ["3"], weight=WEIGHT)
    resumed.load_state_dict(first.state_dict())
    with resumed:
        rest = factors(resumed, [torch.optim.SGD(resumed.student.parameters(), lr=1e-3)], rates[18:])
    assert rest == pytest.approx(values[18:])
    assert max(rest) < 1


def test_steps_after_the_block_are_not_observed() -> None:
    iso = IsomorphismLoss(built(1), built(2), ["3"], weight=WEIGHT)
    optimizer = torch.optim.SGD(iso.student.parameters(), lr=1e-3)
    with pytest.raises(ZeroDivisionError), iso:
        factors(iso, [optimizer], (1 / (2 - step) for step in range(3)))
    before = iso.get_extra_state()
    optimizer.param_groups[0]["lr"] = 1e-5
    optimizer.step()
    assert torch.equal(iso.get_extra_state(), before)
    with copy.deepcopy(iso) as copied:
        factors(copied, [torch.optim.SGD(copied.student.parameters(), lr=1e-5)], [1.0] * 2)
        assert copied.log()["iso/train/3/weight"] == pytest.approx(WEIGHT * 4 * 0.01 * 0.99)
    assert torch.equal(iso.get_extra_state(), before)


def test_a_training_without_an_observable_optimizer_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_schedule, "MAX_CALLS_WITHOUT_STEP", 5)
    iso = IsomorphismLoss(built(1), built(2), ["3"], weight=WEIGHT)
    with iso, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", KnowisoWarning)
        for step in range(12):
            iso.student(images(step))
            iso().backward()
    messages = [str(warning.message) for warning in caught if "optimizer" in str(warning.message)]
    assert len(messages) == 1
    assert "made a step in 6 calls" in messages[0]


def test_names_of_schedules_are_checked() -> None:
    with pytest.raises(OptionError, match="schedule"):
        IsomorphismLoss(built(1), built(2), ["3"], schedule="cosine")  # type: ignore[arg-type]
