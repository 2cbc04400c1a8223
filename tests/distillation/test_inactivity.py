"""Warnings of layer pairs whose loss has no effect."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from knowiso_train.distillation import IsomorphismLoss
from knowiso_train.distillation._diagnostics import MAX_USELESS_CALLS
from knowiso_train.errors import KnowisoWarning
from tests.helpers.small_networks import built

FORMS: list[dict[str, Any]] = [{}, {"solver": "learned"}, {"target": "consensus"}, {"weight": "balanced"}]


def loss_of(student: nn.Module, options: dict[str, Any]) -> IsomorphismLoss:
    peers = [built(3)] if options.get("target") == "consensus" else []
    return IsomorphismLoss(student, built(2), ["1", "3"], peers=peers, **options)


def images(seed: int) -> Tensor:
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def messages_of(iso: IsomorphismLoss, calls: int) -> list[str]:
    """Return the warnings of this library in a few training steps."""
    with iso, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in range(calls):
            iso.student(images(call)).sum()
            iso()
    return [str(warning.message) for warning in caught if issubclass(warning.category, KnowisoWarning)]


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_eval_mode_is_named_once_for_every_unsolved_pair(options: dict[str, Any]) -> None:
    iso = loss_of(built(1), options)
    nn.ModuleList([iso]).eval()  # as a framework does with a registered loss
    messages = messages_of(iso, 4)
    assert [message.split(":")[0] for message in messages] == ["1 → 1", "3 → 3"]
    assert all("eval mode" in message and "iso.train()" in message for message in messages)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_pairs_behind_frozen_layers_are_named_once(options: dict[str, Any]) -> None:
    student = built(1)
    student[0].requires_grad_(False)
    messages = messages_of(loss_of(student, options), 4)
    assert len(messages) == 1
    assert "1 → 1: the loss is a constant" in messages[0]


@pytest.mark.parametrize("order", [1, 2])
def test_a_learned_map_that_diverges_is_bounded_and_named(order: int) -> None:
    options = {"solver": "learned", "order": order, "kernel_size": 3, "weight": 100.0}
    iso = IsomorphismLoss(built(1), built(2), ["3"], refresh=2, **options)
    optimizer = torch.optim.SGD(iso.parameters(), lr=1.0, momentum=0.9)

    def train(steps: int) -> list[float]:
        shares = []
        for call in range(steps):
            iso.student(images(call))
            loss = iso()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            shares.append(iso.log()["iso/train/3/share"])
        return shares

    with iso, pytest.warns(KnowisoWarning, match="3 → 3: the learned map explains nothing") as caught:
        assert min(train(MAX_USELESS_CALLS + 50)) > -1e5
    assert len(caught) == 1
    optimizer.param_groups[0]["lr"] = 0.1
    with iso:
        assert train(400)[-1] > 0.2


def test_a_map_without_enough_samples_is_named_once() -> None:
    student, teacher = (nn.Sequential(nn.Conv2d(3, width, 8), nn.Flatten()) for width in (300, 4))
    iso = IsomorphismLoss(student, teacher, "0", example=images(0), window=10**6)
    with iso, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in range(230):
            student(images(0)[:2] + call)
            iso()
    named = [str(warning.message) for warning in caught if "still 0" in str(warning.message)]
    assert len(named) == 1
    assert "0 → 0: the loss is still 0 after 200 calls" in named[0]


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_evaluations_and_working_pairs_are_not_named(options: dict[str, Any]) -> None:
    iso = loss_of(built(1), options)
    with torch.no_grad():
        assert not messages_of(iso.eval(), 2)
    assert not messages_of(iso.train(), 25)
    assert not messages_of(iso.eval(), 2)  # with the maps of the training
