"""Losses on logits, and schedules of loss weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from knowiso_train.distillation import (
    WeightSchedule,
    dist_loss,
    dkd_loss,
    kd_loss,
    mlkd_loss,
    standardized_kd_loss,
)
from knowiso_train.errors import InputTypeError, OptionError, OptionTypeError, ShapeError


class TestLogitLosses:
    def test_kd_loss_equals_the_divergence(self) -> None:
        s, t = torch.randn(6, 9), torch.randn(6, 9)
        p, q = (t / 3).softmax(1), (s / 3).softmax(1)
        torch.testing.assert_close(kd_loss(s, t, temperature=3.0), 9 * (p * (p / q).log()).sum(1).mean())

    def test_dkd_loss_with_the_coupled_weights_equals_kd_loss(self) -> None:
        s, t = torch.randn(1, 9), torch.randn(1, 9)
        own = (t / 4).softmax(1)[0, 2]
        torch.testing.assert_close(dkd_loss(s, t, torch.tensor([2]), alpha=1.0, beta=1 - float(own)), kd_loss(s, t))

    @pytest.mark.parametrize("masked", ["teacher", "both"])
    def test_masked_classes_have_no_part_in_the_divergence(self, masked: str) -> None:
        student, teacher = torch.randn(6, 9).requires_grad_(), torch.randn(6, 9)
        mask = torch.zeros(6, 9).masked_fill(torch.arange(9) == 7, -math.inf)
        rest, labels = torch.arange(9) != 7, torch.arange(6)
        own = student + mask if masked == "both" else student
        for loss in (kd_loss(own, teacher + mask), dkd_loss(own, teacher + mask, labels)):
            assert loss.isfinite()
            (gradient,) = torch.autograd.grad(loss, student, retain_graph=True)
            assert gradient.isfinite().all()
        if masked == "both":
            expected = kd_loss(student[:, rest], teacher[:, rest])
            torch.testing.assert_close(kd_loss(own, teacher + mask), expected)

    def test_standardized_kd_by_hand(self) -> None:
        # Unbiased standard deviations are 1 and 10: standardized logits are (-1, 0, 1) and (1, 0, -1), over T = 2
        student, teacher = torch.tensor([[1.0, 2.0, 3.0]]).double(), torch.tensor([[30.0, 20.0, 10.0]]).double()
        total = math.exp(-0.5) + 1 + math.exp(0.5)
        p, q = math.exp(0.5) / total, math.exp(-0.5) / total
        expected = 4 * (p * math.log(p / q) + q * math.log(q / p))
        assert float(standardized_kd_loss(student, teacher)) == pytest.approx(expected, rel=1e-9)

    def test_standardized_kd_of_constant_logits_is_kd(self) -> None:
        student, teacher = torch.zeros(2, 4, requires_grad=True), torch.randn(2, 4)
        standardized_kd_loss(student, teacher).backward()
        standardized = (teacher - teacher.mean(1, keepdim=True)) / teacher.std(1, keepdim=True)
        assert student.grad is not None
        torch.testing.assert_close(student.grad, (0.25 - (standardized / 2).softmax(1)) / len(student) * 2)

    def test_dist_by_hand(self) -> None:
        # With two classes the probabilities of an image correlate by the sign of their order: +1 and -1, mean 0.
        # In both networks the first probability falls from image to image: the classes correlate by +1
        student = torch.tensor([[1.0, 0.0], [0.0, 3.0]]).double()
        teacher = torch.tensor([[2.0, 0.0], [1.0, 0.0]]).double()
        assert float(dist_loss(student, teacher)) == pytest.approx(16 * ((1 - 0) + (1 - 1)), abs=1e-9)

    def test_mlkd_by_hand(self) -> None:
        # Probabilities at T = 1: (3/4, 1/4) and (1/4, 3/4) of the student, (1/2, 1/2) twice of the teacher
        student = math.log(3) * torch.eye(2).double()
        teacher = torch.zeros(2, 2).double()
        instance = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
        # P Pᵀ and Pᵀ P of the student are [[10, 6], [6, 10]] / 16, of the teacher 1/2 everywhere: ‖difference‖² = 1/16
        assert float(mlkd_loss(student, teacher, [1.0])) == pytest.approx(instance + 2 * (1 / 16) / 2, rel=1e-9)
        both = mlkd_loss(student, teacher, [2.0]) + mlkd_loss(student, teacher, [5.0])
        torch.testing.assert_close(mlkd_loss(student, teacher, [2.0, 5.0]), both)

    def test_shift_and_scale_of_logits(self) -> None:
        s, t = torch.randn(5, 7).double(), torch.randn(5, 7).double()
        shift, scale = torch.randn(5, 1), torch.rand(5, 1) + 0.1
        torch.testing.assert_close(standardized_kd_loss(scale * s + shift, 9 * t), standardized_kd_loss(s, t))
        torch.testing.assert_close(dist_loss(s + shift, t - shift), dist_loss(s, t))
        torch.testing.assert_close(mlkd_loss(s + shift, t - shift), mlkd_loss(s, t))
        # DIST's correlations do not change under an affine map of the probabilities
        blurred = (0.3 * (t / 4).softmax(1) + 0.7 / 7).log() * 4
        assert float(dist_loss(blurred, t)) == pytest.approx(0.0, abs=1e-9)
        assert float(dist_loss(3 * s, t)) != pytest.approx(float(dist_loss(s, t)), abs=1e-3)

    @pytest.mark.parametrize("loss", [kd_loss, standardized_kd_loss, dist_loss, mlkd_loss])
    def test_half_precision_and_a_single_image(self, loss: Any) -> None:
        s, t = torch.randn(1, 5, dtype=torch.bfloat16, requires_grad=True), torch.randn(1, 5, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(s, t)
        torch.testing.assert_close(value, loss(s.float(), t.float()))
        value.backward()
        assert value.dtype == torch.float32
        assert s.grad is not None
        assert bool(s.grad.isfinite().all())

    def test_gradients(self) -> None:
        s, t = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.randn(3, 5, dtype=torch.float64)
        for loss in (kd_loss, standardized_kd_loss, dist_loss, mlkd_loss):
            assert torch.autograd.gradcheck(lambda s, loss=loss: loss(s, t), s)
        assert torch.autograd.gradcheck(lambda s: dkd_loss(s, t, torch.tensor([0, 1, 4])), s)

    def test_shapes_and_temperatures_out_of_range_raise(self) -> None:
        for loss in (kd_loss, standardized_kd_loss, dist_loss, mlkd_loss):
            with pytest.raises(ShapeError, match=r"\(2, 3\) and \(2, 4\)"):
                loss(torch.zeros(2, 3), torch.zeros(2, 4))
        for loss in (kd_loss, standardized_kd_loss, dist_loss):
            with pytest.raises(OptionError, match="temperature"):
                loss(torch.zeros(2, 3), torch.zeros(2, 3), temperature=0)
        for temperatures in ([], [2.0, 0.0]):
            with pytest.raises(OptionError, match="temperature"):
                mlkd_loss(torch.zeros(2, 3), torch.zeros(2, 3), temperatures)
        with pytest.raises(ShapeError, match="one label per image"):
            dkd_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3, dtype=torch.long))

    @pytest.mark.parametrize("loss", [kd_loss, standardized_kd_loss, dist_loss, mlkd_loss])
    def test_logits_that_cannot_be_used_raise(self, loss: Any) -> None:
        s, t = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3)
        for temperature in ("4", None):
            with pytest.raises(OptionTypeError, match="temperature"):
                loss(s, t, temperature)
        with pytest.raises(InputTypeError, match=r"student_logits must be a tensor.*, got NoneType"):
            loss(None, t)
        with pytest.raises(InputTypeError, match=r'got dict. Pass the logits of .*, such as output\["logits"\]'):
            loss(s, {"logits": t})
        with pytest.raises(ShapeError, match=r"at least one image, got shape \(0, 3\)"):
            loss(s[:0], t[:0])
        with pytest.raises(OptionError, match="Swap them"):
            loss(t, s)
        with torch.no_grad():
            assert float(loss(t, s)) == float(loss(s, t))

    def test_labels_that_cannot_be_used_raise(self) -> None:
        s, t = torch.randn(2, 3), torch.randn(2, 3)
        expected = dkd_loss(s, t, torch.tensor([0, 2]))
        assert torch.equal(dkd_loss(s, t, torch.tensor([0, 2], dtype=torch.int32)), expected)
        for wrong in (-100, 3):
            with pytest.raises(OptionError, match=r"labels from 0 to 2, got labels from"):
                dkd_loss(s, t, torch.tensor([0, wrong]))
        for target, kind in (([0, 2], "list"), (torch.zeros(2), "torch.float32")):
            with pytest.raises(InputTypeError, match=f"integer labels .*, got {kind}"):
                dkd_loss(s, t, target)
        with pytest.raises(ShapeError, match="at least 2 classes"):
            dkd_loss(s[:, :1], t[:, :1], torch.zeros(2, dtype=torch.long))


class TestSchedule:
    def test_cosine_schedule_reaches_its_final_factor(self) -> None:
        schedule = WeightSchedule(warmup=2, total=12, final=0.2)
        assert [schedule(call) for call in (0, 1, 2, 7, 12, 99)] == pytest.approx([0, 0.5, 1, 0.6, 0.2, 0.2])

    @pytest.mark.parametrize("wrong", [{"warmup": -1}, {"warmup": 5, "total": 5}, {"final": 2.0}, {"shape": "step"}])
    def test_options_out_of_range_raise(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(OptionError):
            WeightSchedule(**wrong)
