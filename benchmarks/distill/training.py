"""Training of the students of `bench_distill.py`, side by side on the same batches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.common.profiling import peak_allocated_bytes, quantile
from benchmarks.distill.arms import OURS, SCHEDULES, Arm, Features, WeightedTerm, simkd_projection
from benchmarks.distill.pairs import Images, Pair, Part
from benchmarks.distill.teacher_cache import TeacherBatch, TeacherCache
from knowiso_train import IsomorphismLoss
from knowiso_train.errors import NonFiniteError

BATCH_IMAGES, EVALUATION_BATCH_IMAGES = 64, 250
PEAK_LEARNING_RATE, WARMUP_STEPS = 0.05, 50
# Closed-form maps are solved in every tenth step, and are in this one
PROFILED_STEP = 60
FOLDING_IMAGES, FOLDING_RIDGE = 5000, 1e-3


@dataclass(frozen=True)
class Run:
    """Pair, images and teacher of a training, its part and length."""

    pair: Pair
    images: Images
    cache: TeacherCache
    teacher_classifier: nn.Module
    part: Part
    budget: int
    seed: int

    @property
    def num_steps(self) -> int:
        """Number of optimizer steps."""
        return self.budget * math.ceil(len(self.images.training_indices(self.part)) / BATCH_IMAGES)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step: a short linear rise, and a cosine to 0."""
        warmup = min(1.0, (step + 1) / WARMUP_STEPS)
        return PEAK_LEARNING_RATE * warmup * (1 + math.cos(math.pi * step / self.num_steps)) / 2

    def teacher_features(self, batch: TeacherBatch) -> Features:
        """Return the features that rivals compare."""
        maps = [self.pair.activation(x) for x in batch.features.values()]
        return Features(maps, batch.pooled, batch.logits)


class Student:
    """Network in training with the loss terms and the optimizer of an arm."""

    def __init__(self, arm: Arm, run: Run, example: tuple[Tensor, TeacherBatch]) -> None:
        self.arm, self.run = arm, run
        self.peak_bytes, self.diverged = 0, False
        self.step_seconds: list[float] = []
        self.memory_format = torch.channels_last if run.pair.channels_last else torch.contiguous_format
        torch.manual_seed(run.seed)
        self.device = example[0].device
        self.model = run.pair.student().to(self.device, memory_format=self.memory_format)
        self._captured: dict[str, Tensor] = {}
        self._register_hooks()
        self.iso = self._isomorphism_loss()
        with torch.no_grad():
            student = self.model.eval()(example[0])
        student_features, teacher = self._features(student).to_float(), run.teacher_features(example[1])
        torch.manual_seed(run.seed + 1)
        self.model.train()
        self.terms = {
            term.name: WeightedTerm(term, student_features, teacher) for term in arm.terms if term.name != OURS
        }
        parameters = [parameter for module in self.modules() for parameter in module.to(self.device).parameters()]
        self.optimizer = torch.optim.SGD(parameters, PEAK_LEARNING_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)

    def modules(self) -> list[nn.Module]:
        """Return the network and the modules of the loss terms."""
        return [self.model, *(term.module for term in self.terms.values()), *([self.iso] if self.iso else [])]

    def step(self, images: Tensor, labels: Tensor, batch: TeacherBatch, step: int) -> float:
        """Run one step and return the loss. A student that has diverged is not trained further."""
        if self.diverged:
            return math.nan
        if step == PROFILED_STEP and self.device.type == "cpu":
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                loss = self._step(images, labels, batch, step)
            self.peak_bytes = peak_allocated_bytes(profiler)
            return loss
        began = time.process_time()
        loss = self._step(images, labels, batch, step)
        self.step_seconds.append(time.process_time() - began)
        return loss

    def _step(self, images: Tensor, labels: Tensor, batch: TeacherBatch, step: int) -> float:
        progress = step / self.run.num_steps
        self.optimizer.param_groups[0]["lr"] = self.run.learning_rate(step)
        self.optimizer.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.run.pair.autocast):
            logits = self.model(images.contiguous(memory_format=self.memory_format))
            loss = self._loss(logits, labels, batch, progress)
        self.diverged = not bool(loss.isfinite())
        if not self.diverged:
            loss.backward()
            self.optimizer.step()
        return float(loss.detach())

    def _loss(self, logits: Tensor, labels: Tensor, batch: TeacherBatch, progress: float) -> Tensor:
        student, teacher = self._features(logits).to_float(), self.run.teacher_features(batch)
        loss = student.logits.new_zeros(()) if "simkd" in self.terms else F.cross_entropy(student.logits, labels)
        for term in self.terms.values():
            loss = loss + term(student, teacher, labels, progress)
        if self.iso is not None:
            try:
                loss = loss + self.iso(teacher_features=batch.features)
            except NonFiniteError:
                loss = loss * math.nan
        return loss

    def _features(self, logits: Tensor) -> Features:
        maps = [self.run.pair.activation(self._captured[layer]) for layer in self.run.pair.layers]
        return Features(maps, self._captured["pooled"], logits)

    def _register_hooks(self) -> None:
        for layer in self.run.pair.layers:
            hook = lambda _m, _x, out, layer=layer: self._captured.update({layer: out})  # noqa: E731
            self.model.get_submodule(layer).register_forward_hook(hook)
        self.model.get_submodule(self.run.pair.classifiers[0]).register_forward_pre_hook(
            lambda _m, inputs: self._captured.update({"pooled": inputs[0]})
        )

    def _isomorphism_loss(self) -> IsomorphismLoss | None:
        options = next((dict(term.options) for term in self.arm.terms if term.name == OURS), None)
        if options is None:
            return None
        if "schedule" in options:
            schedule, num_steps = SCHEDULES[options["schedule"]], self.run.num_steps
            options["schedule"] = lambda call: schedule(call / num_steps)
        return IsomorphismLoss(self.model, self.run.cache.teacher.model, self.run.pair.layers, **options)

    @torch.no_grad()
    def accuracies(self) -> dict[str, float]:
        """Return the top-1 accuracy in percent, also with the teacher's classifier on mapped pooled features.

        The map is the ridge regression of the teacher's pooled features on the student's, on training images. A
        student of SimKD classifies with the teacher's classifier on its projected features in both cases.
        """
        self.model.eval()
        fold = None if "simkd" in self.terms else self._folded_classifier()
        num_correct = num_folded = 0
        images, labels = self.run.images.evaluation(self.run.part)
        for x, y in zip(images.split(EVALUATION_BATCH_IMAGES), labels.split(EVALUATION_BATCH_IMAGES), strict=True):
            features = self._features(self.model(x.contiguous(memory_format=self.memory_format)))
            logits = features.logits if fold else self._simkd_logits(features)
            num_correct += int((logits.argmax(1) == y).sum())
            num_folded += int(((fold(features.pooled) if fold else logits).argmax(1) == y).sum())
        self.model.train()
        return {"accuracy": 100 * num_correct / len(labels), "folded_accuracy": 100 * num_folded / len(labels)}

    def _simkd_logits(self, features: Features) -> Tensor:
        module = self.terms["simkd"].module.eval()
        _, height, width = self.run.cache.shapes[-1]
        projected = simkd_projection(module, features, (height, width))
        module.train()
        logits: Tensor = self.run.teacher_classifier(self.run.pair.pool(projected))
        return logits

    def _folded_classifier(self) -> Callable[[Tensor], Tensor]:
        """Return the teacher's classifier after the ridge regression from the student's pooled features."""
        epoch, sources, targets = self.run.budget - 1, [], []
        for indices in self.run.images.training_indices(self.run.part)[:FOLDING_IMAGES].split(EVALUATION_BATCH_IMAGES):
            images = self.run.images.augmented(epoch, indices)
            self.model(images.contiguous(memory_format=self.memory_format))
            sources.append(self._captured["pooled"].double())
            targets.append(self.run.cache.batch(epoch, indices, images).pooled.double())
        x, y = torch.cat(sources), torch.cat(targets)
        x_mean, y_mean = x.mean(0), y.mean(0)
        gram = (x - x_mean).T @ (x - x_mean)
        gram.diagonal().add_(FOLDING_RIDGE * gram.diagonal().mean() + 1e-12)
        weights = torch.linalg.solve(gram, (x - x_mean).T @ (y - y_mean))
        return lambda pooled: self.run.teacher_classifier(((pooled - x_mean) @ weights + y_mean).float())

    def costs(self) -> dict[str, float]:
        """Return the median CPU time of a step and its peak memory with the state of the loss terms."""
        state = sum(t.nbytes for module in self.modules()[1:] for t in (*module.parameters(), *module.buffers()))
        return {
            "step_ms": round(1000 * quantile(self.step_seconds or [math.nan], 0.5), 2),
            "peak_mib": round((self.peak_bytes + state) / 2**20, 1),
        }

    def row(self) -> dict[str, Any]:
        """Return the figures of the finished student."""
        figures: dict[str, Any] = self.accuracies() | self.costs()
        figures |= {"steps": self.run.num_steps, "diverged": self.diverged}
        if self.iso is not None:
            log = self.iso.log()
            prefix, suffix = "iso/train/", "/share"
            figures["shares"] = {
                key.removeprefix(prefix).removesuffix(suffix): round(log[key], 3) for key in log if key.endswith(suffix)
            }
        return figures


def train(arms: Sequence[Arm], run: Run, max_steps: int | None = None) -> list[Student]:
    """Train the students of some arms side by side, all steps of the run or the first ones.

    Images, order and augmentation are functions of run, epoch and seed, so that arms trained at other times saw the
    same batches.
    """
    indices = run.images.training_indices(run.part)
    first = run.images.augmented(0, indices[:2])
    example = first, run.cache.batch(0, indices[:2], first)
    with ExitStack() as stack:
        students = [Student(arm, run, example) for arm in arms]
        for student in students:
            if student.iso is not None:
                stack.enter_context(student.iso)
        step = 0
        for epoch in range(run.budget):
            generator = torch.Generator().manual_seed(1_000_003 * run.seed + epoch)
            losses: list[float] = []
            for batch in indices[torch.randperm(len(indices), generator=generator)].split(BATCH_IMAGES):
                images = run.images.augmented(epoch, batch)
                teacher = run.cache.batch(epoch, batch, images)
                losses = [student.step(images, run.images.labels[batch], teacher, step) for student in students]
                step += 1
                if step == max_steps:
                    return students
            print(f"seed {run.seed}, epoch {epoch + 1} of {run.budget}:", *(f"{x:.2f}" for x in losses), flush=True)
    return students
