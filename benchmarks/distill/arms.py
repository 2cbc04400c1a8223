"""Arms of `bench_distill.py`: the loss terms of a student, written as text.

`kd+fitnet,weight=10,schedule=decay` is cross-entropy + KD + 10 times FitNet's loss, decayed. The text of `ours` holds
options of `IsomorphismLoss`; without any, they are the defaults. `ce` is the cross-entropy alone.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines.distillation.hints import AttentionTransfer, FitNet, SimKD
from benchmarks.baselines.distillation.pooled import CRD, ITRD, SRD, VkD
from benchmarks.baselines.distillation.review import ReviewKD
from benchmarks.baselines.distillation.timm_task import TimmFeatureTask
from knowiso_train.distillation import dist_loss, dkd_loss, kd_loss, mlkd_loss, standardized_kd_loss

CROSS_ENTROPY, OURS = "ce", "ours"
TUNED = "tuned"
FINAL_FACTOR = 0.02


@dataclass(frozen=True)
class Features:
    """Feature maps (N, C, H, W) from shallow to deep, pooled features (N, D) and logits (N, classes) of a network."""

    maps: list[Tensor]
    pooled: Tensor
    logits: Tensor

    def to_float(self) -> Features:
        """Return a copy in float32."""
        return Features([x.float() for x in self.maps], self.pooled.float(), self.logits.float())


class LogitTerm(nn.Module):
    """Loss on the logits of student and teacher and the labels."""

    def __init__(self, loss: Callable[..., Tensor], with_labels: bool = False) -> None:
        super().__init__()
        self.loss, self.with_labels = loss, with_labels

    def forward(self, student: Features, teacher: Features, labels: Tensor) -> Tensor:
        return self.loss(student.logits, teacher.logits, *([labels] if self.with_labels else []))


class MapTerm(nn.Module):
    """Loss on the feature maps. Its convolutions run in the precision of the training."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, student: Features, teacher: Features, labels: Tensor) -> Tensor:
        loss: Tensor = self.loss(student.maps, teacher.maps)
        return loss


class PooledTerm(nn.Module):
    """Loss on the pooled features, in float32."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, student: Features, teacher: Features, labels: Tensor) -> Tensor:
        with torch.autocast(student.pooled.device.type, enabled=False):
            loss: Tensor = self.loss(student.pooled, teacher.pooled)
        return loss


def _logits(loss: Callable[..., Tensor], with_labels: bool = False) -> Callable[[Features, Features], nn.Module]:
    return lambda _student, _teacher: LogitTerm(loss, with_labels)


def _maps(make: Callable[[list[int], list[int]], nn.Module]) -> Callable[[Features, Features], nn.Module]:
    return lambda student, teacher: MapTerm(
        make([x.shape[1] for x in student.maps], [x.shape[1] for x in teacher.maps])
    )


def _pooled(make: Callable[[int, int], nn.Module]) -> Callable[[Features, Features], nn.Module]:
    return lambda student, teacher: PooledTerm(make(student.pooled.shape[1], teacher.pooled.shape[1]))


@dataclass(frozen=True)
class Method:
    """Loss term that is made for features of example shapes, its published weight and the schedule of the weight."""

    make: Callable[[Features, Features], nn.Module]
    weight: float
    schedule: str = "constant"


METHODS = {
    "kd": Method(_logits(kd_loss), 1.0),
    "std_kd": Method(_logits(standardized_kd_loss), 9.0),
    "dkd": Method(_logits(dkd_loss, with_labels=True), 1.0),
    "dist": Method(_logits(dist_loss), 2.0),
    "mlkd": Method(_logits(mlkd_loss), 0.9),
    "fitnet": Method(_maps(FitNet), 100.0),
    "fitnet3": Method(_maps(lambda student, teacher: FitNet(student, teacher, kernel_size=3)), 100.0),
    "linear3": Method(_maps(lambda student, teacher: FitNet(student, teacher, kernel_size=3, linear=True)), 100.0),
    "at": Method(_maps(lambda *_: AttentionTransfer()), 1000.0),
    "review": Method(_maps(ReviewKD), 1.0, "warmup"),
    "simkd": Method(_maps(lambda student, teacher: SimKD(student[-1], teacher[-1])), 1.0),
    "srd": Method(_pooled(SRD), 1.0),
    "vkd": Method(_pooled(VkD), 1.0),
    "crd": Method(_pooled(CRD), 0.8),
    "itrd": Method(_pooled(ITRD), 1.0),
    "timm": Method(_pooled(TimmFeatureTask), 5.0),
}
# Every rival as it is tuned and compared
RIVALS = (
    "kd", "std_kd", "dkd", "dist", "simkd", "kd+fitnet", "kd+at", "kd+review", "kd+srd", "kd+vkd", "kd+crd",
    "kd+itrd", "kd+timm",
)  # fmt: skip


def constant(progress: float) -> float:
    """Return 1."""
    return 1.0


def decay(progress: float) -> float:
    """Return 1 in the first half of the training, then a cosine down to 0.02 at its end."""
    cosine = (1 + math.cos(math.pi * max(0.0, min(1.0, 2 * progress - 1)))) / 2
    return FINAL_FACTOR + (1 - FINAL_FACTOR) * cosine


def warmup(progress: float) -> float:
    """Return a factor that grows linearly to 1 over a twelfth of the training: 20 of 240 epochs, as published."""
    return min(1.0, 12 * progress)


SCHEDULES: dict[str, Callable[[float], float]] = {"constant": constant, "decay": decay, "warmup": warmup}


@dataclass(frozen=True)
class Term:
    """Name of a method and the options in its text."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        texts = (f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in self.options)
        return ",".join([self.name, *texts])

    def option(self, key: str, default: Any) -> Any:
        """Return an option of the text, or the default."""
        return dict(self.options).get(key, default)

    def with_weight(self, weight: float | str) -> Term:
        """Return the term with another weight."""
        others = {key: value for key, value in self.options if key != "weight"}
        return replace(self, options=tuple({"weight": weight, **others}.items()))


@dataclass(frozen=True)
class Arm:
    """Loss terms beside the cross-entropy."""

    terms: tuple[Term, ...]

    def __str__(self) -> str:
        return "+".join(map(str, self.terms)) or CROSS_ENTROPY

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the methods."""
        return tuple(term.name for term in self.terms)

    def with_weight(self, weight: float | str) -> Arm:
        """Return the arm with another weight of its last term."""
        return Arm((*self.terms[:-1], self.terms[-1].with_weight(weight)))

    def unweighted(self) -> Arm:
        """Return the arm without weights and schedules, on which the cost of a step does not depend."""
        return Arm(
            tuple(
                Term(term.name, tuple(item for item in term.options if item[0] not in ("weight", "schedule")))
                for term in self.terms
            )
        )


def parse_arm(text: str) -> Arm:
    """Return the arm of a text such as "kd+ours,weight=30". The default schedule is left out."""
    terms = []
    for part in text.split("+"):
        name, *options = part.split(",")
        if name not in (*METHODS, OURS, CROSS_ENTROPY):
            raise SystemExit(f"expected one of {sorted([*METHODS, OURS, CROSS_ENTROPY])} in {text!r}, got {name!r}")
        values = {key: _value(value) for key, _, value in (option.partition("=") for option in options)}
        if name != OURS and not set(values) <= {"weight", "schedule"}:
            raise SystemExit(f"expected the options weight and schedule of {name!r}, got {part!r}")
        if name in METHODS and values.get("schedule") == METHODS[name].schedule:
            del values["schedule"]
        terms.append(Term(name, tuple(values.items())))
    return Arm(tuple(term for term in terms if term.name != CROSS_ENTROPY))


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


class WeightedTerm:
    """Loss term of a rival with its weight and schedule."""

    def __init__(self, term: Term, student: Features, teacher: Features) -> None:
        method = METHODS[term.name]
        self.module = method.make(student, teacher)
        self.weight = float(term.option("weight", method.weight))
        self.schedule = SCHEDULES[term.option("schedule", method.schedule)]

    def __call__(self, student: Features, teacher: Features, labels: Tensor, progress: float) -> Tensor:
        loss: Tensor = self.module(student, teacher, labels)
        return self.weight * self.schedule(progress) * loss


def simkd_projection(module: nn.Module, student: Features, grid: tuple[int, int]) -> Tensor:
    """Return the projected feature map of SimKD, which takes the place of the teacher's, on its grid."""
    projected: Tensor = module.loss.project(student.maps[-1], grid)
    return projected if tuple(projected.shape[2:]) == grid else F.interpolate(projected, grid)
