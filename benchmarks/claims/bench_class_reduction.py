"""Claim: features for many classes, reduced to those that a network for some of them confirms, classify these better.

    python -m benchmarks.claims.bench_class_reduction  # 5 minutes on one CPU core; resumes

The public CIFAR-100 ResNet-32 has features for 100 classes. A ResNet-8 is trained on ten of them, and one on ten others
(400 steps). The part of the large network's `layer3` that the small one explains (orders 0…2, 1×1 maps, fitted on
2,500 training images of the ten classes) replaces it. Accuracy on the 1,000 test images of the ten classes: with the
large network's own classifier, restricted to them, and with a ridge classifier that is fitted on the same training
images. Classes and weights differ by seed.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import knowiso_train as ki
from benchmarks.claims.common import SEEDS, ClaimResults, judge
from benchmarks.common.models import Cifar100ResNet, cifar100_resnet, cifar_images
from benchmarks.common.small_networks import Training, accuracy, trained_network
from benchmarks.common.stats import mean_and_error

NUM_CLASSES, NUM_STEPS, FIT_IMAGES, ORDER = 10, 400, 2500, 2
MAX_ROWS = 40_000  # positions that orders 1 and 2 are fitted on
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # relative to the mean variance of a feature
SELECTION_STRIDE = 5  # every fifth training image selects the ridge
SECTION = "4, feature refinement"


@dataclass(frozen=True)
class SubsetTraining(Training):
    """Training on the CIFAR-100 images of some classes.

    Attributes:
        classes: Their indices, separated by hyphens.
    """

    classes: str = ""


@cache
def images_of(split: str) -> tuple[Tensor, Tensor]:
    return cifar_images("cifar100", split)


def subset(split: str, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the images of some classes, and their positions in the list of classes as labels."""
    images, labels = images_of(split)
    matches = labels[:, None] == classes
    return images[matches.any(1)], matches[matches.any(1)].int().argmax(1)


def small_network(seed: int, classes: Tensor) -> nn.Module:
    """Return a ResNet-8 that is trained on some classes."""
    images, labels = subset("train", classes)
    training = SubsetTraining(
        seed=seed, num_images=len(images), num_steps=NUM_STEPS, classes="-".join(map(str, classes.tolist()))
    )
    return trained_network(training, images, labels)


@torch.no_grad()
def layer3(network: nn.Module, images: Tensor) -> Tensor:
    """Return the output of the last stage, (N, 64, 8, 8)."""
    outputs: list[Tensor] = []
    handle = network.get_submodule("layer3").register_forward_hook(lambda *call: outputs.append(call[2].clone()))
    try:
        for batch in images.split(250):
            network(batch)
    finally:
        handle.remove()
    return torch.cat(outputs)


def pooled(features: Tensor) -> Tensor:
    """Return what the classifier of the large network reads, (N, 256)."""
    return F.avg_pool2d(F.relu(features), 4).flatten(1)


@torch.no_grad()
def accuracies(
    network: Cifar100ResNet, classes: Tensor, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """Return the accuracies in percent of the own classifier and of a ridge classifier on features of `layer3`."""
    inputs = pooled(test[0])
    own = network.linear(inputs)[:, classes]
    classifier = ridge_classifier(pooled(train[0]), train[1])
    return {
        name: 100 * float((logits.argmax(1) == test[1]).double().mean())
        for name, logits in (("own", own), ("ridge", classifier(inputs)))
    }


def ridge_classifier(x: Tensor, labels: Tensor) -> Any:
    """Fit one-hot targets by ridge regression; the ridge is selected on every fifth image."""
    x, y = x.double(), F.one_hot(labels, NUM_CLASSES).double()
    selects = torch.arange(len(x)) % SELECTION_STRIDE == 0
    candidates = [(_ridge(x[~selects], y[~selects], ridge), ridge) for ridge in RIDGES]
    _, best = max(
        (float((_apply(weights, x[selects]).argmax(1) == labels[selects]).double().mean()), -ridge)
        for weights, ridge in candidates
    )
    return partial(_apply, _ridge(x, y, -best))


def _ridge(x: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    mean_x, mean_y = x.mean(0), y.mean(0)
    covariance = (x - mean_x).T @ (x - mean_x)
    covariance.diagonal().add_(ridge * covariance.diagonal().mean())
    return torch.linalg.solve(covariance, (x - mean_x).T @ (y - mean_y)), mean_x, mean_y


def _apply(weights: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
    map_, mean_x, mean_y = weights
    return (x.double() - mean_x) @ map_ + mean_y


def figures(seed: int) -> dict[str, Any]:
    """Return the accuracies of one seed, by features and classifier."""
    order = torch.randperm(100, generator=torch.Generator().manual_seed(seed))
    classes, others = order[:NUM_CLASSES], order[NUM_CLASSES : 2 * NUM_CLASSES]
    (train_images, train_labels), (test_images, test_labels) = subset("train", classes), subset("test", classes)
    train_images, train_labels = train_images[:FIT_IMAGES], train_labels[:FIT_IMAGES]
    large = cifar100_resnet(32)
    train, test = layer3(large, train_images), layer3(large, test_images)
    result: dict[str, Any] = {
        "whole": accuracies(large, classes, (train, train_labels), (test, test_labels)),
        "classes": classes.tolist(),
    }
    for name, trained_on in (("the same classes", classes), ("other classes", others)):
        small = small_network(seed, trained_on)
        if name == "the same classes":
            result["small network"] = accuracy(small, test_images, test_labels)
        maps = ki.Disentangler(order=ORDER, max_rows=MAX_ROWS, seed=seed).fit(layer3(small, train_images), train)
        with torch.no_grad():
            parts = [
                [torch.stack(maps.components(layer3(small, batch))[: k + 1]).sum(0) for batch in images.split(500)]
                for images in (train_images, test_images)
                for k in (0, ORDER)
            ]
        reduced = [torch.cat(part) for part in parts]
        for k, train_part, test_part in ((0, reduced[0], reduced[2]), (ORDER, reduced[1], reduced[3])):
            entry = accuracies(large, classes, (train_part, train_labels), (test_part, test_labels))
            entry["unexplained"] = 100 * float((test - test_part).var((0, 2, 3)).sum() / test.var((0, 2, 3)).sum())
            result[f"{name}, orders 0…{k}"] = entry
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="claims_class_reduction", help="results file")
    args = parser.parse_args()
    results = ClaimResults(
        args.name,
        {
            "classes": NUM_CLASSES,
            "steps": NUM_STEPS,
            "fit_images": FIT_IMAGES,
            "order": ORDER,
            "seeds": SEEDS,
            "depth": 32,
        },
    )
    rows = [results.row(partial(figures, seed), seed=seed) for seed in SEEDS]
    reduced, control = (f"{name}, orders 0…{ORDER}" for name in ("the same classes", "other classes"))
    claims = [
        judge(
            "Features reduced to those that a network for some of the classes confirms classify these classes better",
            [row[reduced][head] - row["whole"][head] for row in rows],
            section=SECTION,
            measured=f"top-1 of reduced minus whole features, points, {description}",
        )
        for head, description in (("ridge", "classifier fitted again"), ("own", "own classifier"))
    ]
    claims.append(
        judge(
            "The features that remain are those of these classes",
            [row[reduced]["ridge"] - row[control]["ridge"] for row in rows],
            section=SECTION,
            measured="top-1 of features that a network for the same classes confirms minus one for others, points",
        )
    )
    names = ["whole", *(f"{name}, orders 0…{k}" for name in ("the same classes", "other classes") for k in (0, ORDER))]
    table = [
        {
            "features": "whole" if name == "whole" else f"confirmed by a network for {name}",
            "classifier fitted again": mean_and_error([row[name]["ridge"] for row in rows]),
            "own classifier": mean_and_error([row[name]["own"] for row in rows]),
            "unexplained": "–" if name == "whole" else mean_and_error([row[name]["unexplained"] for row in rows]),
        }
        for name in names
    ]
    results.finish(claims, table, small_network=mean_and_error([row["small network"] for row in rows]))


if __name__ == "__main__":
    main()
