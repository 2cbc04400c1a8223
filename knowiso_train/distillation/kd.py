"""Distillation on logits, and schedules of loss weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from knowiso_train.errors import InputTypeError, OptionError, ShapeError
from knowiso_train.utils.validation import (
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    UnitFloat,
    checked_value,
    validate_fields,
)

# Standard deviation of an image's logits below which they are constant
MIN_LOGIT_DEVIATION = 1e-7


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """Compute `T² · KL(softmax(teacher / T) ‖ softmax(student / T))`, averaged over the batch.

    Reference: Hinton, Vinyals & Dean, *Distilling the Knowledge in a Neural Network* (2015).

    Args:
        student_logits: Logits (N, classes).
        teacher_logits: Logits (N, classes), which get no gradient.
        temperature: Temperature T > 0. Default: 4.

    Raises:
        InputTypeError: Logits that are not tensors.
        ShapeError: Logits of different shapes, or of no image.
        OptionError: A temperature that is not positive, or logits that seem to be in the wrong order.

    Examples:
        >>> logits = torch.randn(4, 10)
        >>> kd_loss(logits, logits).abs().item() < 1e-6
        True
    """
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    return _divergence(student, teacher) * temperature**2


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """Compute the decoupled distillation loss `T² · (α · TCKD + β · NCKD)`, averaged over the batch.

    TCKD is the divergence of (p_target, 1 - p_target), NCKD that of the other classes among themselves. α = 1 and
    β = 1 - p_target of the teacher give `kd_loss`. Reference: Zhao et al., *Decoupled Knowledge Distillation* (CVPR
    2022), eq. 7, with the published defaults for CIFAR-100.

    Args:
        student_logits: Logits (N, classes).
        teacher_logits: Logits (N, classes), which get no gradient.
        target: Labels (N,).
        alpha: Weight α of the target class. Default: 1.
        beta: Weight β of the other classes. Default: 8.
        temperature: Temperature T > 0. Default: 4.

    Raises:
        InputTypeError: Logits that are not tensors.
        ShapeError: Logits or labels of shapes that do not match, no image, or a single class.
        OptionError: A temperature that is not positive, labels out of range, or logits that seem to be in the wrong
            order.

    Examples:
        >>> logits = torch.randn(4, 10)
        >>> dkd_loss(logits, logits, torch.arange(4)).abs().item() < 1e-5
        True
    """
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    is_target = F.one_hot(_labels(target, *student.shape), student.shape[1]).bool()

    def decouple(log_p: Tensor) -> tuple[Tensor, Tensor]:
        """Return log (p_target, 1 - p_target), and the log-probabilities of the others given not the target."""
        log_other = log_p.masked_fill(is_target, -torch.inf).logsumexp(1)
        binary = torch.stack([log_p[is_target], log_other], 1)
        return binary, log_p[~is_target].view(len(log_p), -1) - log_other[:, None]

    (student_binary, student_others), (teacher_binary, teacher_others) = decouple(student), decouple(teacher)
    tckd, nckd = _divergence(student_binary, teacher_binary), _divergence(student_others, teacher_others)
    return (alpha * tckd + beta * nckd) * temperature**2


def standardized_kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0) -> Tensor:
    """Compute `kd_loss` of logits that are standardized per image, to mean 0 and variance 1.

    Shift and scale of the logits have no effect, so that a small student need not reach the teacher's range. Reference:
    Sun et al., *Logit Standardization in Knowledge Distillation* (CVPR 2024, arXiv 2403.01427), eq. 8, with the
    unbiased variance. Published weight: 9, with 0.1 for the cross-entropy.

    Args:
        student_logits: Logits (N, classes).
        teacher_logits: Logits (N, classes), which get no gradient.
        temperature: Temperature T > 0 of the standardized logits. Default: 2.

    Raises:
        InputTypeError: Logits that are not tensors.
        ShapeError: Logits of different shapes, or of no image.
        OptionError: A temperature that is not positive, or logits that seem to be in the wrong order.

    Examples:
        >>> logits = torch.randn(4, 10)
        >>> standardized_kd_loss(3 * logits + 1, logits).abs().item() < 1e-5
        True
    """
    student, teacher = _logits(student_logits, teacher_logits)
    return kd_loss(_standardize(student), _standardize(teacher), temperature)


def dist_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """Compute `T² · (inter + intra)` of DIST: 1 minus mean Pearson correlations of the probabilities.

    The inter-class relation correlates the classes of an image, the intra-class relation the images of a class.
    Reference: Huang et al., *Knowledge Distillation from A Stronger Teacher* (NeurIPS 2022, arXiv 2205.10536), eq. 8
    and 9. Published weight for CIFAR-100: 2.

    Args:
        student_logits: Logits (N, classes).
        teacher_logits: Logits (N, classes), which get no gradient.
        temperature: Temperature T > 0. Default: 4.

    Raises:
        InputTypeError: Logits that are not tensors.
        ShapeError: Logits of different shapes, or of no image.
        OptionError: A temperature that is not positive, or logits that seem to be in the wrong order.

    Examples:
        >>> logits = torch.randn(4, 10)
        >>> dist_loss(logits + 1, logits).abs().item() < 1e-5
        True
    """
    student, teacher = (log_p.exp() for log_p in _log_probabilities(student_logits, teacher_logits, temperature))
    inter, intra = 1 - _row_correlations(student, teacher).mean(), 1 - _row_correlations(student.T, teacher.T).mean()
    return (inter + intra) * temperature**2


def mlkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0)
) -> Tensor:
    """Compute the multi-level distillation loss: instance, batch and class level, summed over temperatures.

    With the probabilities P (N, classes) at a temperature the levels are `kd_loss`, `‖P_T P_Tᵀ - P_S P_Sᵀ‖² / N` and
    `‖P_Tᵀ P_T - P_Sᵀ P_S‖² / classes`. Reference: Jin et al., *Multi-level Logit Distillation* (CVPR 2023). The
    published training also has a second, strongly augmented view of each image and masks confident predictions; both
    are left out. Published weight: 0.9, with 0.1 for the cross-entropy.

    Args:
        student_logits: Logits (N, classes).
        teacher_logits: Logits (N, classes), which get no gradient.
        temperatures: Temperatures, positive. Default: 2, 3, 4, 5, 6.

    Raises:
        InputTypeError: Logits that are not tensors.
        ShapeError: Logits of different shapes, or of no image.
        OptionError: No temperature, one that is not positive, or logits that seem to be in the wrong order.

    Examples:
        >>> logits = torch.randn(4, 10)
        >>> mlkd_loss(logits, logits).abs().item() < 1e-5
        True
    """
    temperatures = checked_value("temperatures", temperatures, Sequence[PositiveFloat])
    if not temperatures:
        raise OptionError("temperatures must hold at least one temperature, got none")
    total = _logits(student_logits, teacher_logits)[0].new_zeros(())
    for temperature in temperatures:
        student, teacher = (log_p.exp() for log_p in _log_probabilities(student_logits, teacher_logits, temperature))
        # Products of probabilities lose the small ones in half precision
        with torch.autocast(student.device.type, enabled=False):
            batch_level = (teacher @ teacher.T - student @ student.T).square().sum() / len(student)
            class_level = (teacher.T @ teacher - student.T @ student).square().sum() / student.shape[1]
        total = total + kd_loss(student_logits, teacher_logits, temperature) + batch_level + class_level
    return total


def _standardize(logits: Tensor) -> Tensor:
    """Return logits with mean 0 and unbiased variance 1 in every row; constant rows only get mean 0."""
    centered = logits - logits.mean(1, keepdim=True)
    deviation = torch.linalg.vector_norm(centered, dim=1, keepdim=True) / max(1, logits.shape[1] - 1) ** 0.5
    # A classifier that starts at zero has constant rows, at which 1 / deviation has no gradient
    return centered / torch.where(deviation > MIN_LOGIT_DEVIATION, deviation, torch.ones_like(deviation))


def _row_correlations(a: Tensor, b: Tensor) -> Tensor:
    """Return the Pearson correlation of every row of two matrices; 0 for constant rows."""
    return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1)


def _logits(student_logits: Any, teacher_logits: Any) -> tuple[Tensor, Tensor]:
    """Check the logits and return both in float32 or better, the teacher's detached."""
    for role, logits in (("student", student_logits), ("teacher", teacher_logits)):
        if not isinstance(logits, Tensor):
            hint = (
                "IsomorphismLoss.teacher_output is None after a call with teacher_features="
                if logits is None
                else 'Pass the logits of the output, such as output["logits"]'
            )
            raise InputTypeError(f"{role}_logits must be a tensor (N, classes), got {type(logits).__name__}. {hint}")
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise ShapeError(
            "expected student and teacher logits of one shape (N, classes), "
            f"got {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    if not len(student_logits):
        raise ShapeError(f"expected logits of at least one image, got shape {tuple(student_logits.shape)}")
    if torch.is_grad_enabled() and teacher_logits.requires_grad and not student_logits.requires_grad:
        raise OptionError(
            "expected (student_logits, teacher_logits), and the second have a gradient while the first have none. "
            "Swap them, or compute the loss under torch.no_grad()"
        )
    student, teacher = (
        logits.to(torch.promote_types(logits.dtype, torch.float32)) for logits in (student_logits, teacher_logits)
    )
    return student, teacher.detach()


def _labels(target: Any, num_images: int, num_classes: int) -> Tensor:
    """Check the labels and return them as int64."""
    if not isinstance(target, Tensor) or target.is_floating_point() or target.is_complex():
        kind = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise InputTypeError(f"target must be a tensor of integer labels (N,), got {kind}")
    if target.shape != (num_images,):
        raise ShapeError(f"target must hold one label per image, (N,) = ({num_images},); got {tuple(target.shape)}")
    if num_classes < 2:
        raise ShapeError("expected logits of at least 2 classes, got 1")
    # On a GPU, reading the labels would stall the step; `one_hot` stops there with a device-side assertion
    readable = target.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and (int(target.min()) < 0 or int(target.max()) >= num_classes):
        raise OptionError(
            f"target must hold labels from 0 to {num_classes - 1}, got labels from {int(target.min())} to "
            f"{int(target.max())}. Leave images without a label out"
        )
    labels: Tensor = target.long()
    return labels


def _log_probabilities(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Check the logits and return `log_softmax(logits / T)` of both, in float32 or better."""
    student, teacher = _logits(student_logits, teacher_logits)
    temperature = checked_value("temperature", temperature, PositiveFloat)
    return F.log_softmax(student / temperature, dim=1), F.log_softmax(teacher / temperature, dim=1)


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the KL divergence of log-probabilities, averaged over the batch; 0 log 0 = 0 for masked classes."""
    # Logits of -inf mask a class, and 0 · (-inf - x) would be NaN
    difference = torch.where(teacher > -torch.inf, teacher - student, torch.zeros_like(teacher))
    return (teacher.exp() * difference).sum() / len(student)


@dataclass(frozen=True)
class WeightSchedule:
    """Factor of a loss by call: linearly from 0 to 1 over `warmup` calls, then down to `final` at call `total`.

    Args:
        warmup: Calls with the loss on until the factor is 1. Default: 0, starts at 1.
        total: Call from which the factor is `final`. Default: no decay.
        final: Factor at the end, in [0, 1]. Default: 0.
        shape: Shape of the decay, "cosine" (default) or "linear".

    Raises:
        OptionTypeError: An option of the wrong type.
        OptionError: An option out of bounds, or `total` not above `warmup`.

    Examples:
        >>> schedule = WeightSchedule(warmup=10, total=110, final=0.5, shape="linear")
        >>> [schedule(call) for call in (0, 5, 10, 60, 110, 500)]
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.5]
    """

    warmup: NonNegativeInt = 0
    total: PositiveInt | None = None
    final: UnitFloat = 0.0
    shape: Literal["cosine", "linear"] = "cosine"

    def __post_init__(self) -> None:
        validate_fields(self)
        if self.total is not None and self.total <= self.warmup:
            raise OptionError(f"expected warmup < total, got warmup={self.warmup} and total={self.total}")

    def __call__(self, call: int) -> float:
        """Return the factor at a call, counted from 0."""
        if call < self.warmup:
            return call / self.warmup
        if self.total is None:
            return 1.0
        progress = min(1.0, (call - self.warmup) / (self.total - self.warmup))
        height = 1 - progress if self.shape == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.final + (1 - self.final) * height
