"""Tasks of the sections `full` and `transfer` of bench_refine.py.

clothes:   lite0 with ImageNet weights at 160 px, peers lite1 and lite2, on 3,068 photographs of clothes.
cifar-10:  ResNet-20 trained on CIFAR-100, peers of 32 and 8 layers, on 10,000 images of CIFAR-10, with and without
    crops and flips.
cifar-100: ResNet-20 trained on CIFAR-10, peers of 32 and 44 layers, on 10,000 images of CIFAR-100.
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

LABELS_ONLY = ("plain", "ours, labels")  # methods without unlabeled images, hence without a weight


@dataclass(frozen=True)
class Task:
    """Images with few labels, and networks that were trained for another task.

    Attributes:
        names: Names of the networks; the first one is refined.
        features: Function of a network's name that returns (images, channels) by split, and the labels under "labels".
        pixels: Function of a split that returns its images, (N, 3, H, W), as uint8.
        normalize: Function that normalizes uint8 images.
        augment: Function that augments uint8 images with a generator, and normalizes them.
        network: Function of a name that builds a new network.
        classifier: Name of the classifier's attribute.
        layers: Layers that the finetuning compares. None: the input of the pooling.
        steps: Steps of every training.
        rates: Learning rates that are tried for `plain`; the middle two, each with two weights, for every other method.
        num_test_images: Number of test images.
        auto: Include the choice of `refine(method="auto")` as a method.
        labels: Numbers of labels per class. A number larger than the class takes all.
    """

    names: tuple[str, ...]
    features: Callable[[str], dict[str, Any]]
    pixels: Callable[[str], Tensor]
    normalize: Callable[[Tensor], Tensor]
    augment: Callable[[Tensor, torch.Generator], Tensor]
    network: Callable[[str], nn.Module]
    classifier: str
    steps: int
    rates: tuple[float, float, float, float]
    num_test_images: int
    auto: bool = False
    labels: tuple[int, ...] = (10, 5)
    layers: tuple[str, ...] | None = None
    classes: int = 10

    def grid(self, method: str) -> list[dict[str, float]]:
        """Return the four settings that are tried for a method."""
        if method in LABELS_ONLY:
            return [{"lr": lr, "weight": 0.0} for lr in self.rates]
        return [{"lr": lr, "weight": weight} for lr in self.rates[1:3] for weight in (1.0, 3.0)]


CLOTHES = Task(
    names=("lite0", "lite1", "lite2"),
    features=features,
    pixels=pixels,
    normalize=normalize,
    augment=augment,
    network=lambda name: efficientnet_lite(int(name[4])).to(memory_format=torch.channels_last),
    classifier="classifier",
    steps=40,
    rates=(0.001, 0.003, 0.01, 0.03),
    num_test_images=372,
    labels=(10, 5, 3, 20, 50, ALL_LABELS),
)


def transfer_task(images: str, names: tuple[str, ...], classes: int) -> Task:
    """Build the task of a dataset for ResNets, given by depth, trained on the other dataset."""
    return Task(
        names=names,
        features=partial(transfer_features, images),
        pixels=partial(transfer_pixels, images),
        normalize=partial(transfer_normalize, images),
        augment=partial(transfer_augment, images),
        network=partial(transfer_network, images),
        classifier="linear",
        steps=120,
        rates=(0.003, 0.01, 0.03, 0.1),
        num_test_images=TEST,
        layers=("layer3",),
        classes=classes,
    )


CIFAR10 = transfer_task("cifar10", ("20", "32", "8"), 10)
CIFAR10_PLAIN = replace(CIFAR10, augment=lambda x, _: transfer_normalize("cifar10", x), auto=True)
CIFAR100 = replace(transfer_task("cifar100", ("20", "32", "44"), 100), auto=True)
