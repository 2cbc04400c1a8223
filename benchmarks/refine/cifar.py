"""Sections `compare_on_cifar` and `cifar-100` of bench_refine.py: a small network on few labeled images, refined by two that differ only in their seed.

ResNet-8, 2,000 labeled CIFAR-10 images (5,000 of CIFAR-100) with crops and flips or without, the rest of 10,000
unlabeled, or instead of these the
labeled ones again (CIFAR-10 alone); all three networks are trained alike. Then one of them is trained for MORE steps
in each of
these ways, from the same start and with the same batches (50 labeled, 50 unlabeled images):

cross-entropy       the labels alone, once more
self-distillation   and its own frozen logits on all images
ensemble            and the mean of all three networks' logits on all images
ours                `knowiso_train.refinement.fine_tune`: the ensemble's logits, and the part of its layer3 that the
peers reproduce

Also without training: `consensus_head` on the pooled features, and all three networks at once. The learning rate is
    chosen for plain fine-tuning,
the weight of each other way at that rate, all on a seed, labeled images and validation images that the judged runs do
not use.
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
    """Images with few labels: `labeled` of the first TRAIN, those behind TUNING to tune on; and steps that train the networks."""

    name: str
    classes: int
    labeled: int
    kinds: tuple[tuple[bool, bool], ...]
    steps: int = STEPS


CIFAR_TASKS = {
    "cifar": CifarTask("cifar10", 10, LABELED, CONDITIONS),
    "cifar-100": CifarTask("cifar100", 100, 5000, CONDITIONS[1::-1], 1000),
}


def compare_on_cifar(task: CifarTask, seeds: int, kept: list[dict[str, Any]], save: Any) -> list[dict[str, Any]]:
    """One row for each seed and kind of images, with the accuracy of everything."""
    count, classes = task.labeled, task.classes
    images, labels = cifar_images(task.name, "train", TUNING + count)
    test = cifar_images(task.name, "test", TEST)
    for augment, unlabeled in task.kinds:
        kind = {"augment": augment, "unlabeled": unlabeled}
        found = [row for row in kept if matches(row, kind)]
        chosen = next((row["chosen"] for row in found if "chosen" in row), None)
        if chosen is None:
            known = images[TUNING:], labels[TUNING:]
            others = images[count:TRAIN] if unlabeled else known[0]
            chosen = tune_settings(task, known, others, (images[VALIDATION], labels[VALIDATION]), augment)
            kept.append({**kind, "seed": TUNING_SEED, **chosen})
            chosen = chosen["chosen"]
            save()
        for seed in range(seeds):
            if any(row["seed"] == seed for row in found):
                continue
            order = torch.randperm(TRAIN, generator=torch.Generator().manual_seed(seed))
            few = order[:count]
            rest = order[count:] if unlabeled else few
            began = time.perf_counter()
            nets = [
                train_network((images[few], labels[few]), 10 * seed + i, augment, classes, task.steps) for i in range(3)
            ]
            row: dict[str, Any] = {**kind, "seed": seed} | closed_form_accuracies(
                nets, (images[few], labels[few]), images[rest], test
            )
            for way in METHODS:
                done = finetune(way, nets, (images[few], labels[few]), images[rest], seed, augment, **chosen[way])
                row[way] = accuracy(done, *test)
            row["seconds"] = round(time.perf_counter() - began)
            kept.append(row)
            save()
            print(
                {name: round(value, 2) if isinstance(value, float) else value for name, value in row.items()},
                flush=True,
            )
    return kept


def matches(row: dict[str, Any], kind: dict[str, bool]) -> bool:
    """Rows of before there was a choice had unlabeled images."""
    return row["augment"] == kind["augment"] and row.get("unlabeled", True) == kind["unlabeled"]


def tune_settings(
    task: CifarTask, known: tuple[Tensor, Tensor], others: Tensor, validation: tuple[Tensor, Tensor], augment: bool
) -> dict[str, Any]:
    """Learning rate and weight of each way, on images of their own."""
    nets = [train_network(known, 10 * TUNING_SEED + i, augment, task.classes, task.steps) for i in range(3)]
    tried: dict[str, Any] = {}
    rates: tuple[float, ...] = LRS
    for way in METHODS:
        grid = [{"lr": lr, "weight": w} for lr in rates for w in ((0.0,) if way == "cross-entropy" else WEIGHTS)]
        tried[way] = [
            (accuracy(finetune(way, nets, known, others, TUNING_SEED, augment, **g), *validation), g) for g in grid
        ]
        rates = (max(tried["cross-entropy"], key=lambda item: item[0])[1]["lr"],)
        print("augmented" if augment else "plain", way, tried[way], flush=True)
    return {"chosen": {way: max(found, key=lambda item: item[0])[1] for way, found in tried.items()}, "tried": tried}


def closed_form_accuracies(
    nets: list[nn.Module], known: tuple[Tensor, Tensor], others: Tensor, test: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """The start, the ensemble, and the closed form with and without peers."""
    few, many, judged = ([pooled_features(net, x) for net in nets] for x in (known[0], others, test[0]))
    together = torch.stack([net.linear(x).softmax(1) for net, x in zip(nets, judged, strict=True)]).mean(0)
    found = {
        "start": accuracy(nets[0], *test),
        "three networks": 100 * float((together.argmax(1) == test[1]).float().mean()),
    }
    for name, n in (("self-training head", 1), ("consensus head", 3)):
        head = consensus_head(few[:n], known[1], many[:n], nets[0].linear.out_features)
        found[name] = 100 * float((head(judged[0]).argmax(1) == test[1]).float().mean())
    return found


def train_network(
    known: tuple[Tensor, Tensor], seed: int, augment: bool, classes: int = 10, steps: int = STEPS
) -> nn.Module:
    torch.manual_seed(seed)
    model, generator = CifarResNet(8, classes), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4, nesterov=True)
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LR * min(1.0, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
        which = torch.randint(len(known[0]), (BATCH,), generator=generator)
        loss = F.cross_entropy(model(apply_augmentation(known[0][which], generator, augment)), known[1][which])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def finetune(
    way: str,
    nets: list[nn.Module],
    known: tuple[Tensor, Tensor],
    others: Tensor,
    seed: int,
    augment: bool,
    *,
    lr: float,
    weight: float,
) -> nn.Module:
    """The first network, trained for MORE steps: every way is `finetune_classifier` with other weights, so budget and batches are the same."""
    kinds: dict[str, dict[str, Any]] = {
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
        **kinds[way],
    )
    networks = [classifier_model(net, f"seed {i}") for i, net in enumerate(nets)]
    few, many = Batches(*known, seed, augment), Batches(others, None, seed + 1, augment)
    return finetune_classifier(nets[0], networks[0], networks[1:], many, few, settings)


class Batches:
    """Endless batches, the same at every reading."""

    def __init__(self, images: Tensor, labels: Tensor | None, seed: int, augment: bool) -> None:
        self.images, self.labels, self.seed, self.augment = images, labels, seed, augment

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            which = torch.randint(len(self.images), (BATCH,), generator=generator)
            x = apply_augmentation(self.images[which], generator, self.augment)
            yield x if self.labels is None else (x, self.labels[which])


def apply_augmentation(images: Tensor, generator: torch.Generator, augment: bool) -> Tensor:
    """Random crops of the image padded by 4, and flips."""
    if not augment:
        return images
    return random_crops_and_flips(F.pad(images, (4,) * 4), 32, generator)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (
        100
        * sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(250), labels.split(250), strict=True))
        / len(images)
    )


@torch.no_grad()
def pooled_features(model: nn.Module, images: Tensor) -> Tensor:
    """Input of the classifier."""
    kept: list[Tensor] = []
    handle = model.linear.register_forward_pre_hook(lambda _m, args: kept.append(args[0].clone()))
    for x in images.split(250):
        model(x)
    handle.remove()
    return torch.cat(kept)


def cifar_table(task: CifarTask, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean accuracy, and paired differences to plain fine-tuning and to the ensemble's distillation."""
    found = []
    for augment, unlabeled in task.kinds:
        kind = {"augment": augment, "unlabeled": unlabeled}
        judged = [row for row in rows if matches(row, kind) and row["seed"] != TUNING_SEED]
        for name in (
            ("start", "three networks", "self-training head", "consensus head", *METHODS) if len(judged) > 1 else ()
        ):
            own = torch.tensor([row[name] for row in judged], dtype=torch.float64)
            line: dict[str, Any] = {
                "images": "augmented" if augment else "plain",
                "unlabeled": f"{TRAIN - task.labeled:,}" if unlabeled else "none",
            }
            line |= {"method": name, "top-1 %": round(float(own.mean()), 2)}
            for other in ("start", "cross-entropy", "ensemble"):
                line[f"over {other}"] = mean_and_error([row[name] - row[other] for row in judged], signed=True)
            found.append(line)
    return found
