"""Losses on logits, and schedules of loss weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from knowiso_train.distillation import WeightSchedule, dkd_loss, kd_loss
from knowiso_train.errors import OptionError, ShapeError


class TestLogitLosses:
    def test_kd_loss_equals_the_divergence(self) -> None:
        s, t = torch.randn(6, 9), torch.randn(6, 9)
        p, q = (t / 3).softmax(1), (s / 3).softmax(1)
        torch.testing.assert_close(kd_loss(s, t, temperature=3.0), 9 * (p * (p / q).log()).sum(1).mean())

    def test_dkd_loss_with_the_coupled_weights_equals_kd_loss(self) -> None:
        s, t = torch.randn(1, 9), torch.randn(1, 9)
        own = (t / 4).softmax(1)[0, 2]
        torch.testing.assert_close(dkd_loss(s, t, torch.tensor([2]), alpha=1.0, beta=1 - float(own)), kd_loss(s, t))

    def test_gradients(self) -> None:
        s, t = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.randn(3, 5, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda s: kd_loss(s, t), s)
        assert torch.autograd.gradcheck(lambda s: dkd_loss(s, t, torch.tensor([0, 1, 4])), s)

    def test_shapes_and_temperatures_out_of_range_raise(self) -> None:
        with pytest.raises(ShapeError, match=r"\(2, 3\) and \(2, 4\)"):
            kd_loss(torch.zeros(2, 3), torch.zeros(2, 4))
        with pytest.raises(OptionError, match="temperature"):
            kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), temperature=0)
        with pytest.raises(ShapeError, match="one label per image"):
            dkd_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3))


class TestSchedule:
    def test_cosine_schedule_reaches_its_final_factor(self) -> None:
        schedule = WeightSchedule(warmup=2, total=12, final=0.2)
        assert [schedule(call) for call in (0, 1, 2, 7, 12, 99)] == pytest.approx([0, 0.5, 1, 0.6, 0.2, 0.2])

    @pytest.mark.parametrize("wrong", [{"warmup": -1}, {"warmup": 5, "total": 5}, {"final": 2.0}, {"shape": "step"}])
    def test_options_out_of_range_raise(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(OptionError):
            WeightSchedule(**wrong)
