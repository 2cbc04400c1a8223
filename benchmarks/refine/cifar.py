"""Sections `cifar` and `cifar-100` of bench_refine.py: a small network on few labels, refined by two other seeds.

ResNet-8, 2,000 labeled images of CIFAR-10 (5,000 of CIFAR-100), with and without crops and flips. The rest of 10,000
images is unlabeled, or the labeled ones are used again. All three networks are trained alike. One of them is then
trained for FINETUNE_STEPS steps by each method, from the same start with the same batches (50 labeled, 50 unlabeled):

cross-entropy       labels only
self-distillation   and its own frozen logits on all images
ensemble            and the mean logits of all three networks on all images
ours                `finetune_classifier`: the ensemble's logits, and the part of its layer3 that the peers reproduce

Without training: `consensus_head` on the pooled features, and the three networks as an ensemble. The learning rate is
chosen for cross-entropy, the weight of every other method at that rate, on a seed, labeled images and validation images
that the final runs do not use.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.augment import random_crops_and_flips
from benchmarks.common.models import CifarResNet, cifar_images
from benchmarks.common.stats import mean_and_error
from knowiso_train.refinement.finetune import RefineFinetuneConfig, finetune_classifier
from knowiso_train.refinement.heads import consensus_head
from knowiso_train.refinement.models import classifier_model

LABELED, STEPS, FINETUNE_STEPS, BATCH, LR = 2000, 250, 60, 50, 0.1
TRAIN, TUNING, TUNING_SEED, VALIDATION, TEST = 10_000, 13_000, 1000, slice(10_000, 12_000), 5000
LRS, WEIGHTS = (0.01, 0.03), (1.0, 3.0)
METHODS = ("cross-entropy", "self-distillation", "ensemble", "ours")
CONDITIONS = ((False, True), (True, True), (False, False), (True, False))  # augmented, unlabeled images


@dataclass(frozen=True)
class CifarTask:
    """Images with few labels.

    Attributes:
        name: Dataset.
        classes: Number of classes.
        labeled: Number of labeled images among the first TRAIN, and of those from TUNING on for the tuning.
        conditions: Pairs of (augmented, with unlabeled images).
        steps: Steps that train the networks.
    """

    name: str
    classes: int
    labeled: int
    conditions: tuple[tuple[bool, bool], ...]
    steps: int = STEPS


CIFAR_TASKS = {
    "cifar": CifarTask("cifar10", 10, LABELED, CONDITIONS),
    "cifar-100": CifarTask("cifar100", 100, 5000, CONDITIONS[1::-1], 1000),
}


def compare_on_cifar(task: CifarTask, seeds: int, rows: list[dict[str, Any]], save: Any) -> list[dict[str, Any]]:
    """Return one row for each seed and condition, with the accuracy of every method."""
    count, classes = task.labeled, task.classes
    images, labels = cifar_images(task.name, "train", TUNING + count)
    test = cifar_images(task.name, "test", TEST)
    for augment, unlabeled in task.conditions:
        condition = {"augment": augment, "unlabeled": unlabeled}
        condition_rows = [row for row in rows if matches(row, condition)]
        chosen = next((row["chosen"] for row in condition_rows if "chosen" in row), None)
        if chosen is None:
            known = images[TUNING:], labels[TUNING:]
            others = images[count:TRAIN] if unlabeled else known[0]
            chosen = tune_settings(task, known, others, (images[VALIDATION], labels[VALIDATION]), augment)
            rows.append({**condition, "seed": TUNING_SEED, **chosen})
            chosen = chosen["chosen"]
            save()
        for seed in range(seeds):
            if any(row["seed"] == seed for row in condition_rows):
                continue
            order = torch.randperm(TRAIN, generator=torch.Generator().manual_seed(seed))
            labeled = order[:count]
            others = order[count:] if unlabeled else labeled
            began = time.perf_counter()
            nets = [
                train_network((images[labeled], labels[labeled]), 10 * seed + i, augment, classes, task.steps)
                for i in range(3)
            ]
            row: dict[str, Any] = {**condition, "seed": seed} | closed_form_accuracies(
                nets, (images[labeled], labels[labeled]), images[others], test
            )
            for method in METHODS:
                model = finetune(
                    method, nets, (images[labeled], labels[labeled]), images[others], seed, augment, **chosen[method]
                )
                row[method] = accuracy(model, *test)
            row["seconds"] = round(time.perf_counter() - began)
            rows.append(row)
            save()
            print(
                {name: round(value, 2) if isinstance(value, float) else value for name, value in row.items()},
                flush=True,
            )
    return rows


def matches(row: dict[str, Any], condition: dict[str, bool]) -> bool:
    """Return whether a row has the condition. Rows of early runs have unlabeled images."""
    return row["augment"] == condition["augment"] and row.get("unlabeled", True) == condition["unlabeled"]


def tune_settings(
    task: CifarTask, known: tuple[Tensor, Tensor], others: Tensor, validation: tuple[Tensor, Tensor], augment: bool
) -> dict[str, Any]:
    """Return learning rate and weight of each method, tuned on separate images."""
    nets = [train_network(known, 10 * TUNING_SEED + i, augment, task.classes, task.steps) for i in range(3)]
    tried: dict[str, Any] = {}
    rates: tuple[float, ...] = LRS
    for method in METHODS:
        grid = [{"lr": lr, "weight": w} for lr in rates for w in ((0.0,) if method == "cross-entropy" else WEIGHTS)]
        tried[method] = [
            (accuracy(finetune(method, nets, known, others, TUNING_SEED, augment, **g), *validation), g) for g in grid
        ]
        rates = (max(tried["cross-entropy"], key=lambda item: item[0])[1]["lr"],)
        print("augmented" if augment else "plain", method, tried[method], flush=True)
    return {
        "chosen": {method: max(results, key=lambda item: item[0])[1] for method, results in tried.items()},
        "tried": tried,
    }


def closed_form_accuracies(
    nets: list[nn.Module], known: tuple[Tensor, Tensor], others: Tensor, test: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """Return the accuracy of the start, of the ensemble, and of the closed form with and without peers."""
    labeled, unlabeled, evaluated = ([pooled_features(net, x) for net in nets] for x in (known[0], others, test[0]))
    ensemble = torch.stack([net.linear(x).softmax(1) for net, x in zip(nets, evaluated, strict=True)]).mean(0)
    accuracies = {
        "start": accuracy(nets[0], *test),
        "three networks": 100 * float((ensemble.argmax(1) == test[1]).float().mean()),
    }
    for name, n in (("self-training head", 1), ("consensus head", 3)):
        head = consensus_head(labeled[:n], known[1], unlabeled[:n], nets[0].linear.out_features)
        accuracies[name] = 100 * float((head(evaluated[0]).argmax(1) == test[1]).float().mean())
    return accuracies


def train_network(
    known: tuple[Tensor, Tensor], seed: int, augment: bool, classes: int = 10, steps: int = STEPS
) -> nn.Module:
    """Train a ResNet-8 with labels."""
    torch.manual_seed(seed)
    model, generator = CifarResNet(8, classes), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4, nesterov=True)
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LR * min(1.0, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
        indices = torch.randint(len(known[0]), (BATCH,), generator=generator)
        loss = F.cross_entropy(model(apply_augmentation(known[0][indices], generator, augment)), known[1][indices])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def finetune(
    method: str,
    nets: list[nn.Module],
    known: tuple[Tensor, Tensor],
    others: Tensor,
    seed: int,
    augment: bool,
    *,
    lr: float,
    weight: float,
) -> nn.Module:
    """Train the first network for FINETUNE_STEPS steps.

    Every method is `finetune_classifier` with other weights, so budget and batches are equal.
    """
    weights: dict[str, dict[str, Any]] = {
        "cross-entropy": {"consensus_weight": 0.0, "kd_weight": 0.0},
        "self-distillation": {"consensus_weight": 0.0, "kd_weight": weight, "targets": "original"},
        "ensemble": {"consensus_weight": 0.0, "kd_weight": weight},
        "ours": {"consensus_weight": weight, "kd_weight": 3.0},
    }
    settings = RefineFinetuneConfig(
        steps=FINETUNE_STEPS,
        lr=lr,
        weight_decay=5e-4,
        layers=["layer3"],
        freeze_batch_norm=False,
        max_grad_norm=5.0,
        temperature=2.0,
        **weights[method],
    )
    networks = [classifier_model(net, f"seed {i}") for i, net in enumerate(nets)]
    labeled, unlabeled = Batches(*known, seed, augment), Batches(others, None, seed + 1, augment)
    return finetune_classifier(nets[0], networks[0], networks[1:], unlabeled, labeled, settings)


class Batches:
    """Endless batches that are the same in every iteration."""

    def __init__(self, images: Tensor, labels: Tensor | None, seed: int, augment: bool) -> None:
        self.images, self.labels, self.seed, self.augment = images, labels, seed, augment

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            indices = torch.randint(len(self.images), (BATCH,), generator=generator)
            x = apply_augmentation(self.images[indices], generator, self.augment)
            yield x if self.labels is None else (x, self.labels[indices])


def apply_augmentation(images: Tensor, generator: torch.Generator, augment: bool) -> Tensor:
    """Apply random crops of the image padded by 4, and flips."""
    if not augment:
        return images
    return random_crops_and_flips(F.pad(images, (4,) * 4), 32, generator)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the top-1 accuracy in percent."""
    return (
        100
        * sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(250), labels.split(250), strict=True))
        / len(images)
    )


@torch.no_grad()
def pooled_features(model: nn.Module, images: Tensor) -> Tensor:
    """Return the input of the classifier."""
    features: list[Tensor] = []
    handle = model.linear.register_forward_pre_hook(lambda _m, args: features.append(args[0].clone()))
    for x in images.split(250):
        model(x)
    handle.remove()
    return torch.cat(features)


def cifar_table(task: CifarTask, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean accuracy, and paired differences to the start, cross-entropy and the ensemble."""
    lines = []
    for augment, unlabeled in task.conditions:
        condition = {"augment": augment, "unlabeled": unlabeled}
        final_rows = [row for row in rows if matches(row, condition) and row["seed"] != TUNING_SEED]
        for name in (
            ("start", "three networks", "self-training head", "consensus head", *METHODS) if len(final_rows) > 1 else ()
        ):
            accuracies = torch.tensor([row[name] for row in final_rows], dtype=torch.float64)
            line: dict[str, Any] = {
                "images": "augmented" if augment else "plain",
                "unlabeled": f"{TRAIN - task.labeled:,}" if unlabeled else "none",
            }
            line |= {"method": name, "top-1 %": round(float(accuracies.mean()), 2)}
            for other in ("start", "cross-entropy", "ensemble"):
                line[f"over {other}"] = mean_and_error([row[name] - row[other] for row in final_rows], signed=True)
            lines.append(line)
    return lines
