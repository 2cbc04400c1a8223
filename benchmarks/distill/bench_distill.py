"""A student on CIFAR-10, taught by ResNet-56's real weights: cross-entropy alone, KD, FitNet, attention transfer, and our moment form.

    python -m benchmarks.distill.bench_distill             # about 25 minutes on one core; stopped and started again, it goes on
    where it was
    python -m benchmarks.distill.bench_distill --depth 20 --images 9000 --epochs 60 --name bench_distill_long

Equal start, images, order, augmentation and number of steps for every method of a seed: they train side by side on the
same batch, and the teacher
runs once on it for all. Weights are chosen for every method in the same way: three values a decade apart, and a fourth
where the best is at the
edge; on a seed, training images and validation images that the judged runs do not use. Refresh and window of the moment
form are tried there
too, and reported only: the judged runs keep the library's defaults. Test images are seen by the finished students of
    the judged seeds alone.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

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
from knowiso_train.errors import NonFiniteError

LAYERS = ("layer1", "layer2", "layer3")
WIDTHS = (16, 32, 64)
# Of the training images at hand
TRAIN_IMAGES, TUNING_IMAGES, VALIDATION_IMAGES = slice(0, 9000), slice(9000, 13000), slice(13000, 15000)
TUNING_SEED = 1000
# Of the grids: terms of about the size of the cross-entropy at the start
CENTER_WEIGHTS = {"kd": 1.0, "fitnet": 1.0, "at": 1000.0, "moment": 1.0}
SETTINGS_TRIED = ({"refresh": 1}, {"refresh": 50}, {"window": 5}, {"window": 100})


@dataclass(frozen=True)
class Arm:
    """What is added to the cross-entropy, and with what weight."""

    weights: dict[str, float] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return " + ".join(["cross-entropy", *self.weights])

    def __hash__(self) -> int:
        return hash(json.dumps(asdict(self), sort_keys=True))


class Student:
    """One network in training with its own losses and optimizer."""

    def __init__(
        self, arm: Arm, args: argparse.Namespace, seed: int, teacher: nn.Module, features: dict[str, Tensor]
    ) -> None:
        torch.manual_seed(seed)
        self.arm, self.features, self.seconds, self.diverged = arm, features, 0.0, False
        self.model = CifarResNet(args.depth)
        self.seen: dict[str, Tensor] = {}
        if "moment" in arm.weights:
            self.iso = IsomorphismLoss(self.model, teacher, LAYERS, weight=arm.weights["moment"], **arm.options)
        torch.manual_seed(seed + 1)
        self.rivals = {"fitnet": FitNet(WIDTHS, WIDTHS), "at": AttentionTransfer()}
        self.rivals = {name: rival for name, rival in self.rivals.items() if name in arm.weights}
        if self.rivals:
            capture_features(self.model, self.seen)
        parameters = [*self.model.parameters(), *(p for rival in self.rivals.values() for p in rival.parameters())]
        self.optimizer = torch.optim.SGD(parameters, lr=args.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)

    def step(self, images: Tensor, labels: Tensor, teacher_logits: Tensor, lr: float) -> float:
        """One step; a student that has diverged stays as it is, and is judged so."""
        if self.diverged:
            return math.nan
        began = time.perf_counter()
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.zero_grad()
        logits = self.model(images)
        loss = F.cross_entropy(logits, labels)
        if "kd" in self.arm.weights:
            loss = loss + self.arm.weights["kd"] * kd_loss(logits, teacher_logits)
        for name, rival in self.rivals.items():
            loss = loss + self.arm.weights[name] * rival(
                [self.seen[layer] for layer in LAYERS], [self.features[layer] for layer in LAYERS]
            )
        if "moment" in self.arm.weights:
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
        self.model.eval()
        right = sum(
            int((self.model(x).argmax(1) == y).sum()) for x, y in zip(images.split(250), labels.split(250), strict=True)
        )
        self.model.train()
        return 100 * right / len(images)


def capture_features(model: nn.Module, features: dict[str, Tensor]) -> None:
    for layer in LAYERS:
        getattr(model, layer).register_forward_hook(lambda _m, _x, out, layer=layer: features.update({layer: out}))


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops of the image padded by 4, and flips."""
    return random_crops_and_flips(F.pad(images, (4,) * 4), 32, generator)


def train(
    arms: Sequence[Arm],
    seed: int,
    pool: tuple[Tensor, Tensor],
    judge: tuple[Tensor, Tensor],
    teacher: nn.Module,
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """All arms of a seed side by side; their accuracy on `judge` when they are done."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(pool[0]), generator=generator)[: args.images]
    features: dict[str, Tensor] = {}
    steps, done, teaching, losses = args.epochs * math.ceil(args.images / args.batch_size), 0, 0.0, [0.0] * len(arms)
    with ExitStack() as stack:
        students = [Student(arm, args, seed, teacher, features) for arm in arms]
        for student in students:
            if "moment" in student.arm.weights:
                stack.enter_context(student.iso)
        for layer in LAYERS:
            handle = getattr(teacher, layer).register_forward_hook(
                lambda _m, _x, out, layer=layer: features.update({layer: out})
            )
            stack.callback(handle.remove)
        for epoch in range(args.epochs):
            order = chosen[torch.randperm(len(chosen), generator=generator)]
            for batch in order.split(args.batch_size):
                images, labels = augment(pool[0][batch], generator), pool[1][batch]
                lr = args.lr * min(1.0, (done + 1) / args.warmup) * (1 + math.cos(math.pi * done / steps)) / 2
                began = time.perf_counter()
                with torch.no_grad():
                    logits = teacher(images)
                teaching += time.perf_counter() - began
                losses = [student.step(images, labels, logits, lr) for student in students]
                done += 1
            print(f"seed {seed}, epoch {epoch + 1} of {args.epochs}:", *(f"{loss:.2f}" for loss in losses), flush=True)
        rows = []
        for student in students:
            row = {"seed": seed, **asdict(student.arm), "accuracy": student.accuracy(*judge), "steps": done}
            row |= {"seconds of the student": round(student.seconds, 1), "seconds of the teacher": round(teaching, 1)}
            if "moment" in student.arm.weights:
                row["shares"] = {layer: round(student.iso.log()[f"iso/{layer}/share"], 3) for layer in LAYERS}
            rows.append(row)
    return rows


class ResultsStore:
    """Rows that are done, in the results file; a run that is started again takes them up where the settings are the same."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.name = args.name
        self.settings = {key: value for key, value in vars(args).items() if key not in ("name", "seeds")}
        path = RESULTS / f"{args.name}.json"
        kept = json.loads(path.read_text()) if path.exists() else {"figures": {"rows": []}, "settings": self.settings}
        if kept["settings"] != self.settings:
            raise SystemExit(
                f"{path} holds a run with other settings: {kept['settings']}. Remove it, or choose another --name."
            )
        self.rows: list[dict[str, Any]] = kept["figures"]["rows"]

    def found(self, arm: Arm, seed: int) -> dict[str, Any] | None:
        return next(
            (row for row in self.rows if row["seed"] == seed and {key: row[key] for key in asdict(arm)} == asdict(arm)),
            None,
        )

    def accuracies(
        self, arms: Sequence[Arm], seed: int, run: Callable[[list[Arm]], list[dict[str, Any]]]
    ) -> list[float]:
        missing = [arm for arm in arms if self.found(arm, seed) is None]
        if missing:
            self.rows += run(missing)
            self.write()
        return [self.found(arm, seed)["accuracy"] for arm in arms]  # type: ignore[index]

    def write(self, **more: Any) -> None:
        record(self.name, {**more, "rows": self.rows}, settings=self.settings)


def tune_weights(run: Callable[[list[Arm]], list[float]]) -> dict[str, float]:
    """The best weight of each method; the grid goes one step further where its edge is the best."""
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
    parts = [(), ("kd",), ("fitnet",), ("fitnet", "kd"), ("at",), ("at", "kd"), ("moment",), ("moment", "kd")]
    return [Arm({name: weights[name] for name in part}) for part in parts]


def comparison_table(arms: Sequence[Arm], accuracies: list[list[float]]) -> list[dict[str, Any]]:
    """Mean over seeds, and mean and standard error of the paired differences."""
    values = torch.tensor(accuracies, dtype=torch.float64).T  # (arms, seeds)
    rows = []
    for arm, own in zip(arms, values, strict=True):
        row: dict[str, Any] = {
            "method": arm.label,
            "weights": ", ".join(f"{w:g}" for w in arm.weights.values()) or "-",
            "top-1 %": round(float(own.mean()), 2),
        }
        for name, other in (("cross-entropy", values[0]), ("KD", values[1])):
            row[f"over {name}"] = mean_and_error((own - other).tolist(), signed=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=8, help="of the student, 6n + 2")
    parser.add_argument(
        "--images",
        type=int,
        default=2000,
        help="training images of each seed, drawn from 9,000 (tuning: from 4,000 others)",
    )
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--lr", type=float, default=0.1, help="peak; linear warm-up, then cosine to zero")
    parser.add_argument("--warmup", type=int, default=20, help="steps")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--test-images", type=int, default=5000)
    parser.add_argument("--name", default="bench_distill", help="of the results file")
    args = parser.parse_args()
    book, teacher = ResultsStore(args), cifar_resnet(56)
    images, labels = cifar10("train")

    def part(which: slice) -> tuple[Tensor, Tensor]:
        return images[which], labels[which]

    weights = tune_weights(
        lambda arms: book.accuracies(
            arms,
            TUNING_SEED,
            lambda left: train(left, TUNING_SEED, part(TUNING_IMAGES), part(VALIDATION_IMAGES), teacher, args),
        )
    )
    tuning = [row for row in book.rows if row["seed"] == TUNING_SEED]
    print(
        table([{key: row[key] for key in ("weights", "options", "accuracy")} for row in tuning]),
        "\nchosen:",
        weights,
        flush=True,
    )

    arms, test = final_arms(weights), cifar10("test", args.test_images)
    accuracies = [
        book.accuracies(arms, seed, lambda left, s=seed: train(left, s, part(TRAIN_IMAGES), test, teacher, args))
        for seed in range(args.seeds)
    ]
    rows = comparison_table(arms, accuracies)
    print(table(rows))
    book.write(table=rows, chosen=weights)


if __name__ == "__main__":
    main()
