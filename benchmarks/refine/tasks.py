"""What sections `full` and `transfer` of bench_refine.py train on.

clothes:   lite0 with ImageNet weights at 160 px, peers lite1 and lite2, on 3,068 photographs of clothes.
cifar-10:  a ResNet-20 that was trained on CIFAR-100, peers of 32 and of 8 layers, on 10,000 images of CIFAR-10; with
crops and flips, or as they are.
cifar-100: a ResNet-20 that was trained on CIFAR-10, peers of 32 and of 44 layers, on 10,000 images of CIFAR-100.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.models import efficientnet_lite
from benchmarks.refine.cifar_transfer_data import (
    TEST,
    transfer_augment,
    transfer_features,
    transfer_network,
    transfer_normalize,
    transfer_pixels,
)
from benchmarks.refine.data import ALL_LABELS, augment, features, normalize, pixels

LABELS_ONLY = ("plain", "ours, labels")  # ways that see no unlabeled image, so that there is nothing to weigh


@dataclass(frozen=True)
class Task:
    """Images with few labels, and networks that were trained for another task.

    Attributes:
        names: of the networks, first the one that is refined.
        features: by a network's name, (images, channels) by split, and the labels by split under "labels".
        pixels: images (N, 3, H, W) of a split, as bytes.
        normalized: what the networks are given, from bytes.
        changed: the same from crops and flips that a generator draws.
        network: anew, by its name.
        classifier: attribute of each.
        layers: that `fine_tune` compares; None takes what pools.
        steps: of every training.
        rates: learning rates that are tried for `plain`; the middle two, each with two weights, for every other way.
        tested: test images.
        auto: whether what `refine(method="auto")` would choose is a way of its own.
        labels: per class, one after another; more than there are takes all.
    """

    names: tuple[str, ...]
    features: Callable[[str], dict[str, Any]]
    pixels: Callable[[str], Tensor]
    normalized: Callable[[Tensor], Tensor]
    changed: Callable[[Tensor, torch.Generator], Tensor]
    network: Callable[[str], nn.Module]
    classifier: str
    steps: int
    rates: tuple[float, float, float, float]
    tested: int
    auto: bool = False
    labels: tuple[int, ...] = (10, 5)
    layers: tuple[str, ...] | None = None
    classes: int = 10

    def grid(self, way: str) -> list[dict[str, float]]:
        """Settings that are tried, four for every way."""
        if way in LABELS_ONLY:
            return [{"lr": lr, "weight": 0.0} for lr in self.rates]
        return [{"lr": lr, "weight": weight} for lr in self.rates[1:3] for weight in (1.0, 3.0)]


CLOTHES = Task(
    names=("lite0", "lite1", "lite2"),
    features=features,
    pixels=pixels,
    normalized=normalize,
    changed=augment,
    network=lambda name: efficientnet_lite(int(name[4])).to(memory_format=torch.channels_last),
    classifier="classifier",
    steps=40,
    rates=(0.001, 0.003, 0.01, 0.03),
    tested=372,
    labels=(10, 5, 3, 20, 50, ALL_LABELS),
)


def transfer_task(images: str, names: tuple[str, ...], classes: int) -> Task:
    """ResNets by their depths, trained on the other of the two CIFARs."""
    return Task(
        names=names,
        features=partial(transfer_features, images),
        pixels=partial(transfer_pixels, images),
        normalized=partial(transfer_normalize, images),
        changed=partial(transfer_augment, images),
        network=partial(transfer_network, images),
        classifier="linear",
        steps=120,
        rates=(0.003, 0.01, 0.03, 0.1),
        tested=TEST,
        layers=("layer3",),
        classes=classes,
    )


CIFAR10 = transfer_task("cifar10", ("20", "32", "8"), 10)
CIFAR10_PLAIN = replace(CIFAR10, changed=lambda x, _: transfer_normalize("cifar10", x), auto=True)
CIFAR100 = replace(transfer_task("cifar100", ("20", "32", "44"), 100), auto=True)
