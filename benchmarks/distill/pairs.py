"""Pairs of student and teacher of `bench_distill.py`, with their images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.augment import crops_and_flips, draw_crops_and_flips
from benchmarks.common.models import Cifar100ResNet, CifarResNet, cifar100_resnet, cifar_images, cifar_resnet
from benchmarks.distill.teacher_cache import CACHE

SIDE_PIXELS, MARGIN_PIXELS = 32, 4
Part = Literal["tuning", "final"]


def identity(feature: Tensor) -> Tensor:
    """Return the feature."""
    return feature


@dataclass(frozen=True)
class Pair:
    """Student and teacher with their layers and images.

    Rivals that follow their publication compare features after a ReLU, which `activation` adds where the layers end
    before it. Pooled features are the inputs of the classifiers.

    Args:
        dataset: "cifar10" or "cifar100", of which all training images of the folder are used.
        teacher: Trained network.
        student: Network with random weights.
        layers: {student layer: teacher layer}, from shallow to deep, on equal grids.
        classifiers: Names of the last linear layers of student and teacher.
        pool: Function from the teacher's last of `layers`, after `activation`, to its pooled feature.
        activation: Function between a layer and the next one. Default: none.
        num_tuning_images: Training images of the tuning runs; the others validate.
        autocast: Train in bfloat16, where that is faster. Default: yes.
        channels_last: Train in this memory format, where that is faster. Default: no.
    """

    dataset: str
    teacher: Callable[[], nn.Module]
    student: Callable[[], nn.Module]
    layers: dict[str, str]
    classifiers: tuple[str, str]
    pool: Callable[[Tensor], Tensor]
    num_tuning_images: int
    activation: Callable[[Tensor], Tensor] = identity
    autocast: bool = True
    channels_last: bool = False


def pooled(feature: Tensor) -> Tensor:
    """Average over all positions."""
    return feature.mean((2, 3))


def pooled_quarters(feature: Tensor) -> Tensor:
    """Average over 4×4 positions, and flatten."""
    return F.avg_pool2d(feature, 4).flatten(1)


def mobilenet() -> nn.Module:
    """Create timm's mobilenetv2_035 for images of 32 pixels: no stride in the stem and in two of the stages."""
    import timm

    model = timm.create_model("mobilenetv2_035", num_classes=10)
    for convolution in (model.blocks[1][0].conv_dw, model.blocks[3][0].conv_dw):
        convolution.stride = (1, 1)
    return model


STAGES = {"layer2": "layer2", "layer3": "layer3"}
PAIRS = {
    "resnet56_resnet8_cifar10": Pair(
        "cifar10", lambda: cifar_resnet(56), lambda: CifarResNet(8), STAGES, ("linear", "linear"), pooled, 10_000
    ),
    "resnet56_resnet20_cifar10": Pair(
        "cifar10", lambda: cifar_resnet(56), lambda: CifarResNet(20), STAGES, ("linear", "linear"), pooled, 10_000
    ),
    "resnet32_resnet8_cifar100": Pair(
        "cifar100", lambda: cifar100_resnet(32), lambda: Cifar100ResNet(8), STAGES, ("linear", "linear"),
        pooled_quarters, 40_000, activation=F.relu,
    ),
    "resnet56_mobile_cifar10": Pair(
        "cifar10", lambda: cifar_resnet(56), mobilenet, {"blocks.1": "layer2", "blocks.4": "layer3"},
        ("classifier", "linear"), pooled, 10_000, autocast=False, channels_last=True,
    ),
}  # fmt: skip


def decoded_images(dataset: str, split: str) -> tuple[Tensor, Tensor]:
    """Return images in float16 and labels of a data set, which are kept on disk once they are decoded."""
    path = CACHE / f"{dataset}_{split}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        images, labels = cifar_images(dataset, split)
        torch.save((images.half(), labels), path)
    images, labels = torch.load(path, weights_only=True)
    return images, labels


class Images:
    """Images of a pair: all training images, augmented by epoch, and the images of the evaluation.

    The tuning runs train on the first images and validate on the other training images; the final runs train on all
    and are evaluated on the test images. The augmentation depends only on data set, epoch and image.

    Args:
        pair: Pair with the name of the data set.
        device: Device of all images. Default: CPU.
        num_images: Number of training images. None: all.
    """

    def __init__(self, pair: Pair, device: torch.device | str = "cpu", num_images: int | None = None) -> None:
        self.pair, self.device = pair, device
        images, labels = decoded_images(pair.dataset, "train")
        self.padded = F.pad(images[:num_images].to(device), (MARGIN_PIXELS,) * 4)
        self.labels = labels[:num_images].to(device)
        self.training = self.padded[:, :, MARGIN_PIXELS:-MARGIN_PIXELS, MARGIN_PIXELS:-MARGIN_PIXELS]
        self._epoch, self._crops = -1, (torch.empty(0), torch.empty(0))

    @cached_property
    def _test(self) -> tuple[Tensor, Tensor]:
        images, labels = decoded_images(self.pair.dataset, "test")
        return images.to(self.device), labels.to(self.device)

    def training_indices(self, part: Part) -> Tensor:
        """Return the indices of the training images of a part."""
        count = self.pair.num_tuning_images if part == "tuning" else len(self.labels)
        return torch.arange(count, device=self.device)

    def evaluation(self, part: Part) -> tuple[Tensor, Tensor]:
        """Return images and labels on which the students of a part are evaluated."""
        others = slice(self.pair.num_tuning_images, None)
        images, labels = (self.training[others], self.labels[others]) if part == "tuning" else self._test
        return images.float(), labels

    def augmented(self, epoch: int, indices: Tensor) -> Tensor:
        """Return random crops of the padded images, and flips."""
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(epoch)
            corners, flips = draw_crops_and_flips(len(self.labels), 2 * MARGIN_PIXELS, generator)
            self._epoch, self._crops = epoch, (corners.to(self.device), flips.to(self.device))
        corners, flips = (values[indices] for values in self._crops)
        return crops_and_flips(self.padded[indices].float(), SIDE_PIXELS, corners, flips)
