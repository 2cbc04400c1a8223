"""Networks, pooled features and images for the transfer between CIFAR-10 and CIFAR-100."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.augment import random_crops_and_flips
from benchmarks.common.models import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    CIFAR100_MEAN,
    CIFAR100_STD,
    cifar100_resnet,
    cifar_bytes,
    cifar_resnet,
)
from benchmarks.refine.data import CACHE, SPLITS

TRAIN, VALIDATION, TEST, PADDING = 10_000, 1_000, 5_000, 4
_BYTES: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}


def transfer_network(images: str, depth: str) -> nn.Module:
    """Load a network trained on the other of the two datasets."""
    return cifar100_resnet(int(depth)) if images == "cifar10" else cifar_resnet(int(depth))


def transfer_normalize(images: str, pixels: Tensor) -> Tensor:
    """Normalize uint8 images as in the training of the networks."""
    mean, std = (CIFAR100_MEAN, CIFAR100_STD) if images == "cifar10" else (CIFAR10_MEAN, CIFAR10_STD)
    shift, scale = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
    return (pixels.float() / 255 - shift) / scale


def transfer_augment(images: str, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Apply random crops of the image padded with gray, and flips."""
    return random_crops_and_flips(F.pad(transfer_normalize(images, pixels), (PADDING,) * 4), 32, generator)


def transfer_pixels(images: str, split: str) -> Tensor:
    """Return the images of a split as uint8, (N, 3, 32, 32)."""
    return _split(images)[split][0]


def transfer_features(images: str, depth: str) -> dict[str, Any]:
    """Return the classifier's inputs, (N, channels), by split, and "labels", by split."""
    path = CACHE / f"{images}, ResNet-{depth} of the other.pt"
    if not path.exists():
        CACHE.mkdir(exist_ok=True)
        torch.save({split: _pooled(images, transfer_network(images, depth), split) for split in SPLITS}, path)
    stored: dict[str, Any] = torch.load(path, weights_only=True)
    return stored | {"labels": {split: _split(images)[split][1] for split in SPLITS}}


def _split(images: str) -> dict[str, tuple[Tensor, Tensor]]:
    if images not in _BYTES:
        x, y = cifar_bytes(images, "train", TRAIN + VALIDATION)
        _BYTES[images] = {
            "train": (x[:TRAIN], y[:TRAIN]),
            "validation": (x[TRAIN:], y[TRAIN:]),
            "test": cifar_bytes(images, "test", TEST),
        }
    return _BYTES[images]


@torch.inference_mode()
def _pooled(images: str, model: nn.Module, split: str) -> Tensor:
    features: list[Tensor] = []
    model.get_submodule("linear").register_forward_pre_hook(lambda _m, args: features.append(args[0].clone()))
    for x in transfer_pixels(images, split).split(250):
        model(transfer_normalize(images, x))
    return torch.cat(features)
