"""Accuracy of a CIFAR-10 student taught by ResNet-56: KD, FitNet, attention transfer and `IsomorphismLoss`.

    python -m benchmarks.distill.bench_distill             # 25 minutes on one core; resumes
    python -m benchmarks.distill.bench_distill --depth 20 --images 9000 --epochs 60 --name bench_distill_long
    python -m benchmarks.distill.bench_distill --untuned --name bench_distill_defaults    # half an hour a seed

All methods of a seed have equal initial weights, images, order, augmentation and number of steps. They are trained
side by side on the same batches, and the teacher runs once for all.

Weights of the terms are tuned in the same way for every method: three values a decade apart, and a fourth if the best
one is at the edge. Tuning uses a seed, training images and validation images that the final runs do not use. Refresh
interval and window of the closed form are tried there too, but only reported; the final runs use the defaults. Test
images are used only by the finished students of the final seeds.

`--untuned` compares `IsomorphismLoss` with its defaults, FitNet at its published weight and KD, without any tuning.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines.feature_kd import AttentionTransfer, FitNet
from benchmarks.common.augment import random_crops_and_flips
from benchmarks.common.models import CifarResNet, cifar10, cifar_resnet
from benchmarks.common.results import RESULTS, record, table
from benchmarks.common.stats import mean_and_error
from knowiso_train import IsomorphismLoss
from knowiso_train.distillation import kd_loss
from knowiso_train.distillation.config import IsomorphismLossConfig
from knowiso_train.errors import NonFiniteError

WIDTHS = {"layer1": 16, "layer2": 32, "layer3": 64}
# Disjoint parts of the 15,000 training images
TRAIN_IMAGES, TUNING_IMAGES, VALIDATION_IMAGES = slice(0, 9000), slice(9000, 13000), slice(13000, 15000)
TUNING_SEED = 1000
# Centers of the grids: terms are then about as large as the cross-entropy at the start
CENTER_WEIGHTS = {"kd": 1.0, "fitnet": 1.0, "at": 1000.0, "moment": 1.0, "log": 10.0}
# Scales of `IsomorphismLoss`, by the name of its term
SCALES: dict[str, Literal["linear", "log"]] = {"moment": "linear", "log": "log"}
DEFAULT_TERM = "defaults"  # `IsomorphismLoss(student, teacher, layers)` without any option
SETTINGS_TRIED = ({"refresh": 1}, {"refresh": 50}, {"window": 5}, {"window": 100})
# FitNet's weight is that of its publication in the common benchmark of CRD (arXiv 1910.10699)
UNTUNED_WEIGHTS = {"kd": 1.0, "fitnet": 100.0, DEFAULT_TERM: IsomorphismLossConfig().weight}


@dataclass(frozen=True)
class Arm:
    """Terms that are added to the cross-entropy, with their weights."""

    weights: dict[str, float] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return " + ".join(["cross-entropy", *self.weights])

    def __hash__(self) -> int:
        return hash(json.dumps(asdict(self), sort_keys=True))

    @property
    def isomorphism_term(self) -> str | None:
        """Name of the term of `IsomorphismLoss`, or None."""
        return next((name for name in (*SCALES, DEFAULT_TERM) if name in self.weights), None)


class Student:
    """Network in training with its losses and optimizer."""

    def __init__(
        self, arm: Arm, args: argparse.Namespace, seed: int, teacher: nn.Module, features: dict[str, Tensor]
    ) -> None:
        torch.manual_seed(seed)
        self.arm, self.features, self.seconds, self.diverged = arm, features, 0.0, False
        self.layers = args.layers
        self.model = CifarResNet(args.depth)
        self.student_features: dict[str, Tensor] = {}
        if (term := arm.isomorphism_term) is not None:
            options = (
                {} if term == DEFAULT_TERM else {"scale": SCALES[term], "weight": arm.weights[term], **arm.options}
            )
            self.iso = IsomorphismLoss(self.model, teacher, args.layers, **options)
        torch.manual_seed(seed + 1)
        widths = [WIDTHS[layer] for layer in args.layers]
        self.baselines = {"fitnet": FitNet(widths, widths), "at": AttentionTransfer()}
        self.baselines = {name: baseline for name, baseline in self.baselines.items() if name in arm.weights}
        if self.baselines:
            capture_features(self.model, args.layers, self.student_features)
        parameters = [
            *self.model.parameters(),
            *(p for baseline in self.baselines.values() for p in baseline.parameters()),
        ]
        self.optimizer = torch.optim.SGD(parameters, lr=args.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)

    def step(self, images: Tensor, labels: Tensor, teacher_logits: Tensor, lr: float) -> float:
        """Run one step and return the loss.

        A student that has diverged is not trained further, and is evaluated as it is.
        """
        if self.diverged:
            return math.nan
        began = time.perf_counter()
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.zero_grad()
        logits = self.model(images)
        loss = F.cross_entropy(logits, labels)
        if "kd" in self.arm.weights:
            loss = loss + self.arm.weights["kd"] * kd_loss(logits, teacher_logits)
        for name, baseline in self.baselines.items():
            loss = loss + self.arm.weights[name] * baseline(
                [self.student_features[layer] for layer in self.layers], [self.features[layer] for layer in self.layers]
            )
        if self.arm.isomorphism_term:
            try:
                loss = loss + self.iso(teacher_output=teacher_logits)
            except NonFiniteError:
                loss = loss * math.nan
        self.diverged = not bool(loss.isfinite())
        loss.backward()
        self.optimizer.step()
        self.seconds += time.perf_counter() - began
        return float(loss.detach())

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Return the top-1 accuracy in percent."""
        self.model.eval()
        num_correct = sum(
            int((self.model(x).argmax(1) == y).sum()) for x, y in zip(images.split(250), labels.split(250), strict=True)
        )
        self.model.train()
        return 100 * num_correct / len(images)


def capture_features(model: nn.Module, layers: Sequence[str], features: dict[str, Tensor]) -> None:
    """Register hooks that store the outputs of the layers."""
    for layer in layers:
        getattr(model, layer).register_forward_hook(lambda _m, _x, out, layer=layer: features.update({layer: out}))


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Apply random crops of the image padded by 4, and flips."""
    return random_crops_and_flips(F.pad(images, (4,) * 4), 32, generator)


def train(
    arms: Sequence[Arm],
    seed: int,
    train_set: tuple[Tensor, Tensor],
    evaluation_set: tuple[Tensor, Tensor],
    teacher: nn.Module,
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Train all arms of a seed side by side and return their rows."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randperm(len(train_set[0]), generator=generator)[: args.images]
    features: dict[str, Tensor] = {}
    num_steps, step, teacher_seconds, losses = (
        args.epochs * math.ceil(args.images / args.batch_size),
        0,
        0.0,
        [0.0] * len(arms),
    )
    with ExitStack() as stack:
        students = [Student(arm, args, seed, teacher, features) for arm in arms]
        for student in students:
            if student.arm.isomorphism_term:
                stack.enter_context(student.iso)
        for layer in args.layers:
            handle = getattr(teacher, layer).register_forward_hook(
                lambda _m, _x, out, layer=layer: features.update({layer: out})
            )
            stack.callback(handle.remove)
        for epoch in range(args.epochs):
            order = indices[torch.randperm(len(indices), generator=generator)]
            for batch in order.split(args.batch_size):
                images, labels = augment(train_set[0][batch], generator), train_set[1][batch]
                lr = args.lr * min(1.0, (step + 1) / args.warmup) * (1 + math.cos(math.pi * step / num_steps)) / 2
                began = time.perf_counter()
                with torch.no_grad():
                    logits = teacher(images)
                teacher_seconds += time.perf_counter() - began
                losses = [student.step(images, labels, logits, lr) for student in students]
                step += 1
            print(f"seed {seed}, epoch {epoch + 1} of {args.epochs}:", *(f"{loss:.2f}" for loss in losses), flush=True)
        rows = []
        for student in students:
            row = {"seed": seed, **asdict(student.arm), "accuracy": student.accuracy(*evaluation_set), "steps": step}
            row |= {
                "seconds of the student": round(student.seconds, 1),
                "seconds of the teacher": round(teacher_seconds, 1),
            }
            if student.arm.isomorphism_term:
                row["shares"] = {layer: round(student.iso.log()[f"iso/{layer}/share"], 3) for layer in args.layers}
            rows.append(row)
    return rows


class ResultsStore:
    """Finished rows in the results file. A run with the same settings resumes from them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.name = args.name
        self.settings = {key: value for key, value in vars(args).items() if key not in ("name", "seeds")}
        path = RESULTS / f"{args.name}.json"
        stored = json.loads(path.read_text()) if path.exists() else {"figures": {"rows": []}, "settings": self.settings}
        if stored["settings"] != self.settings:
            raise SystemExit(
                f"{path} holds a run with other settings: {stored['settings']}. Remove it, or choose another --name."
            )
        self.rows: list[dict[str, Any]] = stored["figures"]["rows"]

    def find(self, arm: Arm, seed: int) -> dict[str, Any] | None:
        """Return the row of an arm and seed, or None."""
        return next(
            (row for row in self.rows if row["seed"] == seed and {key: row[key] for key in asdict(arm)} == asdict(arm)),
            None,
        )

    def accuracies(
        self, arms: Sequence[Arm], seed: int, run: Callable[[list[Arm]], list[dict[str, Any]]]
    ) -> list[float]:
        """Return the accuracies of arms; run those without a row."""
        missing = [arm for arm in arms if self.find(arm, seed) is None]
        if missing:
            self.rows += run(missing)
            self.write()
        return [self.find(arm, seed)["accuracy"] for arm in arms]  # type: ignore[index]

    def write(self, **more: Any) -> None:
        record(self.name, {**more, "rows": self.rows}, settings=self.settings)


def tune_weights(run: Callable[[list[Arm]], list[float]]) -> dict[str, float]:
    """Return the best weight of each method.

    A grid whose best value is at the edge is extended once.
    """
    grids = {name: [middle / 10, middle, middle * 10] for name, middle in CENTER_WEIGHTS.items()}

    def best(scores: dict[tuple[str, float], float], name: str) -> float:
        return max(grids[name], key=lambda weight: scores[name, weight])

    def scored() -> dict[tuple[str, float], float]:
        points = [(name, weight) for name, grid in grids.items() for weight in grid]
        arms = [Arm({name: weight}) for name, weight in points] + [
            Arm({"moment": CENTER_WEIGHTS["moment"]}, options) for options in SETTINGS_TRIED
        ]
        return dict(zip(points, run(arms), strict=False))

    scores = scored()
    for name, grid in grids.items():
        if best(scores, name) == grid[0]:
            grid.insert(0, grid[0] / 10)
        elif best(scores, name) == grid[2]:
            grid.append(grid[2] * 10)
    scores = scored()
    return {name: best(scores, name) for name in grids}


def final_arms(weights: dict[str, float]) -> list[Arm]:
    """Return the arms of the final runs."""
    feature_terms = ("fitnet", "at", "moment", "log")
    parts = [(), ("kd",), *(part for term in feature_terms for part in ((term,), (term, "kd")))]
    return [Arm({name: weights[name] for name in part}) for part in parts]


def comparison_table(arms: Sequence[Arm], accuracies: list[list[float]]) -> list[dict[str, Any]]:
    """Return means over seeds, and mean ± standard error of the paired differences."""
    values = torch.tensor(accuracies, dtype=torch.float64).T  # (arms, seeds)
    rows = []
    baselines = {arm.label: other for arm, other in zip(arms, values, strict=True)}
    for arm, arm_values in zip(arms, values, strict=True):
        row: dict[str, Any] = {
            "method": arm.label,
            "weights": ", ".join(f"{w:g}" for w in arm.weights.values()) or "-",
            "top-1 %": round(float(arm_values.mean()), 2),
        }
        for name, label in (("cross-entropy", "cross-entropy"), ("KD", "cross-entropy + kd")):
            if label in baselines:
                row[f"over {name}"] = mean_and_error((arm_values - baselines[label]).tolist(), signed=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=8, help="depth of the student, 6n + 2")
    parser.add_argument(
        "--images",
        type=int,
        default=2000,
        help="training images of each seed, drawn from 9,000 (tuning: from 4,000 others)",
    )
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--lr", type=float, default=0.1, help="peak learning rate; linear warm-up, then cosine to zero")
    parser.add_argument("--warmup", type=int, default=20, help="warm-up steps")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--test-images", type=int, default=5000)
    parser.add_argument("--layers", nargs="+", choices=sorted(WIDTHS), default=sorted(WIDTHS))
    parser.add_argument(
        "--untuned", action="store_true", help="compare published and default weights, train on all 15,000 images"
    )
    parser.add_argument("--name", default="bench_distill", help="results file")
    args = parser.parse_args()
    store, teacher = ResultsStore(args), cifar_resnet(56)
    images, labels = cifar10("train")

    def images_and_labels(subset: slice) -> tuple[Tensor, Tensor]:
        return images[subset], labels[subset]

    if args.untuned:
        terms: tuple[tuple[str, ...], ...] = (("kd",), ("kd", "fitnet"), ("kd", DEFAULT_TERM))
        arms = [Arm({name: UNTUNED_WEIGHTS[name] for name in names}) for names in terms]
        compare(arms, (images, labels), teacher, store, args)
        return
    weights = tune_weights(
        lambda arms: store.accuracies(
            arms,
            TUNING_SEED,
            lambda missing: train(
                missing,
                TUNING_SEED,
                images_and_labels(TUNING_IMAGES),
                images_and_labels(VALIDATION_IMAGES),
                teacher,
                args,
            ),
        )
    )
    tuning = [row for row in store.rows if row["seed"] == TUNING_SEED]
    print(
        table([{key: row[key] for key in ("weights", "options", "accuracy")} for row in tuning]),
        "\nchosen:",
        weights,
        flush=True,
    )

    compare(final_arms(weights), images_and_labels(TRAIN_IMAGES), teacher, store, args, chosen=weights)


def compare(
    arms: Sequence[Arm],
    train_set: tuple[Tensor, Tensor],
    teacher: nn.Module,
    store: ResultsStore,
    args: argparse.Namespace,
    **figures: Any,
) -> None:
    """Train the arms on all seeds, and print and write their accuracy on the test images."""
    test_set = cifar10("test", args.test_images)
    accuracies = []
    for seed in range(args.seeds):
        accuracies.append(
            store.accuracies(arms, seed, lambda missing, s=seed: train(missing, s, train_set, test_set, teacher, args))
        )
        rows = comparison_table(arms, accuracies)
        print(table(rows), flush=True)
        store.write(table=rows, **figures)


if __name__ == "__main__":
    main()
