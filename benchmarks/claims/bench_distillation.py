"""Blind spots and unreliable features of a student alone and of distilled students.

    python -m benchmarks.claims.bench_distillation     # 15 minutes on one CPU core; resumes

ResNet-8 students are trained on 6,000 CIFAR-10 images with labels alone, and distilled from ResNet-56 by KD, FitNet
and `IsomorphismLoss` with its defaults. Those of a seed have equal initial weights, batches and steps. Each is compared
with its teacher, and with ResNet-44 of the same author, which taught none of them. Shares are of order 0, with 3×3 maps
on 2,000 test images. A public pair is measured too: ResNet-8 and its distilled twin, by another author, beside
ResNet-32, with 3×3 and with 1×1 maps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.claims.common import (
    KERNEL_SIZE,
    LAYERS,
    SEEDS,
    judge,
    open_results,
    percentages,
    read_cifar10,
    stage_figures,
)
from benchmarks.common.models import (
    CIFAR10_OTHER_MEAN,
    CIFAR10_OTHER_STD,
    cifar10_distilled_resnet,
    cifar10_other_resnet,
    cifar_bytes,
    cifar_resnet,
)
from benchmarks.common.small_networks import Method, Training, accuracy, train_networks, trained_network
from benchmarks.common.stats import mean_and_error
from knowiso_train import compare_stages

ALONE = "alone"
METHODS: dict[str, Method] = {ALONE: "", "KD": "kd", "FitNet": "fitnet", "ours": "isomorphism"}
REFERENCES = {"teacher": 56, "other network": 44}  # depth
PUBLIC = {"public pair, 3×3 maps": KERNEL_SIZE, "public pair, 1×1 maps": 1}  # kernel size
SECTION = "4, explanation of knowledge distillation"


def compare(
    reference: nn.Module,
    stages: dict[str, Any],
    images: torch.Tensor,
    labels: torch.Tensor,
    kernel_size: int = KERNEL_SIZE,
) -> dict[str, Any]:
    """Return the figures of every stage by name."""
    loader = DataLoader(TensorDataset(images, labels), batch_size=250)
    comparison = compare_stages(
        reference, stages, loader, list(LAYERS), kernel_size=kernel_size, bootstrap=0, progress=False
    )
    return {stage.name: stage_figures(stage) for stage in comparison}


def student_row(seed: int, depth: int, num_images: int) -> dict[str, Any]:
    """Return the figures of the students of a seed beside a reference."""
    data, test = read_cifar10("train"), read_cifar10("test", num_images)
    stages = {name: partial(trained_network, training, *data) for name, training in trainings(seed).items()}
    return {"students": compare(cifar_resnet(depth), stages, *test)}


def trainings(seed: int) -> dict[str, Training]:
    """Return the settings of the students of a seed by name."""
    return {name: Training(seed=seed, method=method) for name, method in METHODS.items()}


def training_row(seed: int, num_images: int) -> dict[str, Any]:
    """Train the students of a seed, and return their accuracy on test images."""
    data, test = read_cifar10("train"), read_cifar10("test", num_images)
    train_networks(list(trainings(seed).values()), *data)
    return {"accuracy": {name: accuracy(trained_network(t, *data), *test) for name, t in trainings(seed).items()}}


def public_row(num_images: int, kernel_size: int) -> dict[str, Any]:
    """Return the figures of the public ResNet-8 and its distilled twin."""
    pixels, labels = cifar_bytes("cifar10", "test", num_images)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (CIFAR10_OTHER_MEAN, CIFAR10_OTHER_STD))
    stages = {ALONE: cifar10_other_resnet(8), "distilled": cifar10_distilled_resnet()}
    return {
        "students": compare(cifar10_other_resnet(32), stages, (pixels.float() / 255 - mean) / std, labels, kernel_size)
    }


def reduction(students: dict[str, Any], name: str, figure: str) -> float:
    """Return how much smaller a figure is than without distillation, as a mean over layers in percentage points."""
    return 100 * float(np.mean(np.subtract(students[ALONE][figure], students[name][figure])))


def relative_reduction(students: dict[str, Any], name: str, figure: str) -> float:
    """Return the reduction as a percentage of the figure without distillation."""
    return reduction(students, name, figure) / float(np.mean(students[ALONE][figure]))


# Statements about distilled students, with the definition of the effect
STATEMENTS: dict[str, tuple[str, Callable[[dict[str, Any], str], float]]] = {
    "discards unreliable features": (
        "fall of the unreliable share, points",
        lambda row, name: reduction(row, name, "unreliable"),
    ),
    "makes the student's output depend less on unreliable features": (
        "fall of the functional unreliable share, points",
        lambda row, name: reduction(row, name, "functional_unreliable"),
    ),
    "reduces blind spots": (
        "fall of the blind spots, points",
        lambda row, name: reduction(row, name, "blind_spots"),
    ),
    "discards unreliable features more than it reduces blind spots": (
        "fall of the unreliable share minus that of the blind spots, each in % of its value without distillation",
        lambda row, name: relative_reduction(row, name, "unreliable") - relative_reduction(row, name, "blind_spots"),
    ),
}


def claims_of(students: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the verdicts on every method: all beside the teacher, and the first beside the other network.

    Args:
        students: Figures of all students, one entry per seed, by reference.
    """
    return [
        judge(
            f"Distillation ({name}) {statement} beside the {reference}",
            [effect(row, name) for row in students[reference]],
            section=SECTION,
            measured=f"{measured}, mean of three layers",
        )
        for name in METHODS
        if name != ALONE
        for reference in REFERENCES
        for statement, (measured, effect) in list(STATEMENTS.items())[: None if reference == "teacher" else 1]
    ]


def main() -> None:
    num_images, store = open_results(__doc__, "claims_distillation")
    accuracies = [
        store.row(partial(training_row, seed, num_images), stage="train", seed=seed)["accuracy"] for seed in SEEDS
    ]
    students = {
        reference: [
            store.row(partial(student_row, seed, depth, num_images), stage=reference, seed=seed)["students"]
            for seed in SEEDS
        ]
        for reference, depth in REFERENCES.items()
    }
    for reference, kernel_size in PUBLIC.items():
        students[reference] = [store.row(partial(public_row, num_images, kernel_size), stage=reference)["students"]]
    lines = [
        {
            "beside": reference,
            "student": name,
            "top-1 %": mean_and_error([row[name] for row in accuracies]) if reference in REFERENCES else "",
            **{figure: percentages([row[name][figure] for row in rows]) for figure in rows[0][name]},
        }
        for reference, rows in students.items()
        for name in rows[0]
    ]
    store.finish(claims_of(students), lines)


if __name__ == "__main__":
    main()
