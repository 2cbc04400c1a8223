"""Distillation on logits, and schedules of loss weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from knowiso_train.errors import InputTypeError, OptionError, ShapeError

SCHEDULE_SHAPES = ("cosine", "linear")


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """`T² · KL(softmax(teacher / T) ‖ softmax(student / T))`, mean over the batch.

    Source: Hinton, Vinyals & Dean, *Distilling the Knowledge in a Neural Network* (2015).

    Args:
        student_logits: (N, classes).
        teacher_logits: (N, classes); no gradient goes there.
        temperature: T > 0.

    Raises:
        ShapeError: logits of different shapes.
        OptionError: T that is not positive.

    Example:
        >>> logits = torch.randn(4, 10)
        >>> kd_loss(logits, logits).abs().item() < 1e-6
        True
    """
    _check(student_logits, teacher_logits, temperature)
    student, teacher = (
        F.log_softmax(_raised(logits) / temperature, dim=1) for logits in (student_logits, teacher_logits.detach())
    )
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """Decoupled distillation: `α · TCKD + β · NCKD`, the target class against the rest and the rest among themselves, mean over the batch.

    Source: Zhao et al., *Decoupled Knowledge Distillation* (CVPR 2022), eq. 7; their defaults for CIFAR-100. α = 1 and
        β = 1 - p_target is KD.

    Args:
        student_logits: (N, classes).
        teacher_logits: (N, classes); no gradient goes there.
        target: (N,) labels.
        alpha: weight of the target part.
        beta: weight of the rest.
        temperature: T > 0.

    Raises:
        ShapeError: logits or labels that do not fit each other.
        OptionError: T that is not positive.

    Example:
        >>> logits = torch.randn(4, 10)
        >>> dkd_loss(logits, logits, torch.arange(4)).abs().item() < 1e-5
        True
    """
    _check(student_logits, teacher_logits, temperature)
    if target.shape != student_logits.shape[:1]:
        raise ShapeError(
            f"target must hold one label per image, (N,) = ({len(student_logits)},); got {tuple(target.shape)}"
        )
    student, teacher = (
        F.log_softmax(_raised(logits) / temperature, dim=1) for logits in (student_logits, teacher_logits.detach())
    )
    of_target = F.one_hot(target, student.shape[1]).bool()

    def halves(log_p: Tensor) -> tuple[Tensor, Tensor]:
        own = log_p[of_target]
        rest = log_p.masked_fill(of_target, -torch.inf).logsumexp(1)
        return torch.stack([own, rest], 1), log_p[~of_target].view(len(log_p), -1) - rest[:, None]

    (binary_s, others_s), (binary_t, others_t) = halves(student), halves(teacher)
    tckd = F.kl_div(binary_s, binary_t, reduction="batchmean", log_target=True)
    nckd = F.kl_div(others_s, others_t, reduction="batchmean", log_target=True)
    return (alpha * tckd + beta * nckd) * temperature**2


def _check(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> None:
    for whose, logits in (("student", student_logits), ("teacher", teacher_logits)):
        if not isinstance(logits, Tensor):
            raise InputTypeError(
                f"{whose}_logits must be a tensor (N, classes), got {type(logits).__name__}. What an IsomorphismLoss keeps as teacher_output is of "
                "its last call, and None where that was given features"
            )
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise ShapeError(
            f"expected student and teacher logits of one shape (N, classes), got {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    if not temperature > 0:
        raise OptionError(f"temperature must be positive, got {temperature}")


def _raised(logits: Tensor) -> Tensor:
    """Halves in float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@dataclass(frozen=True)
class WeightSchedule:
    """Factor of the loss: up linearly from 0 to 1 over `warmup` calls, then down to `final` at call `total`.

    Args:
        warmup: calls of `iso()` with the loss on until the factor is 1; 0 starts there.
        total: call at which `final` is reached and kept; None never goes down.
        final: factor at the end, in [0, 1].
        shape: of the way down, "cosine" or "linear".

    Raises:
        OptionError: a value without meaning.

    Example:
        >>> schedule = WeightSchedule(warmup=10, total=110, final=0.5, shape="linear")
        >>> [schedule(call) for call in (0, 5, 10, 60, 110, 500)]
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.5]
    """

    warmup: int = 0
    total: int | None = None
    final: float = 0.0
    shape: str = "cosine"

    def __post_init__(self) -> None:
        if self.warmup < 0 or (self.total is not None and self.total <= self.warmup):
            raise OptionError(f"expected 0 <= warmup < total, got warmup={self.warmup} and total={self.total}")
        if not 0 <= self.final <= 1:
            raise OptionError(f"final must be in [0, 1], got {self.final}")
        if self.shape not in SCHEDULE_SHAPES:
            raise OptionError(f"shape must be one of {SCHEDULE_SHAPES}, got {self.shape!r}")

    def __call__(self, call: int) -> float:
        """Factor at a call, counted from 0."""
        if call < self.warmup:
            return call / self.warmup
        if self.total is None:
            return 1.0
        done = min(1.0, (call - self.warmup) / (self.total - self.warmup))
        left = 1 - done if self.shape == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.final + (1 - self.final) * left
