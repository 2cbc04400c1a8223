"""Diagnosis of real networks: ResNet-20 beside ResNet-56 on CIFAR-10, and a ResNet-56 with erased parts.

    python -m benchmarks.measure.bench_diagnose     # 5 minutes on one CPU core

The erased parts are known, so that the precision of the blind spots can be stated: 16 of the 64 channels of layer3, or
one class, whose images the weak network gets without content.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common.models import CIFAR10_MEAN, CIFAR10_STD, cifar10, cifar_resnet
from benchmarks.common.results import record, table
from knowiso_train import diagnose, measure
from knowiso_train.diagnosis import Diagnosis

STAGES = ["layer1", "layer2", "layer3"]
ERASED_CHANNELS, ERASED_CLASS = 16, 3
CLASS_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class ErasedChannels(nn.Module):
    """Layer whose last channels are set to zero."""

    def __init__(self, layer: nn.Module, channels: int) -> None:
        super().__init__()
        self.layer, self.channels = layer, channels

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return torch.cat([y[:, : -self.channels], torch.zeros_like(y[:, -self.channels :])], 1)


def rows_of(diagnosis: Diagnosis) -> list[dict[str, Any]]:
    """Return a row for each result."""
    rows = []
    for layer in diagnosis:
        effects = [direction.effect for direction in layer.directions if direction.effect is not None]
        rows.append(
            {
                "kind": layer.kind,
                "layer": layer.layer,
                "unexplained": layer.pair.unexplained,
                "first direction": layer.directions[0].share,
                "largest KL of a direction": max(effect.kl for effect in effects),
                "smallest KL of a direction": min(effect.kl for effect in effects),
                "most unexplained class": CLASS_NAMES[layer.classes[0].label],
                "its unexplained share": layer.classes[0].unexplained,
                "least unexplained class": CLASS_NAMES[layer.classes[-1].label],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1500, help="CIFAR-10 images")
    parser.add_argument("--page", type=Path, help="HTML page of ResNet-20 and ResNet-56 (default: not written)")
    args = parser.parse_args()
    images, labels = cifar10("train", args.images)
    loader = DataLoader(TensorDataset(images, labels), batch_size=200)
    weak, strong = cifar_resnet(20), cifar_resnet(56)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CIFAR10_MEAN, CIFAR10_STD))
    start = time.perf_counter()
    measure(weak, strong, loader, STAGES, order=0, directions="both", progress=False)
    seconds = {"measure": time.perf_counter() - start}
    for name, functional in (("diagnose without outputs", False), ("diagnose", True)):
        diagnosis = diagnose(
            weak,
            strong,
            loader,
            STAGES,
            functional=functional,
            class_names=CLASS_NAMES,
            names=("ResNet-20", "ResNet-56"),
            to_image=lambda x: x * std + mean,
            progress=False,
        )
        seconds[name] = diagnosis.seconds
    print(diagnosis)
    print(diagnosis["layer3"])
    if args.page is not None:
        diagnosis.to_html(args.page)
    rows = rows_of(diagnosis)

    erased = cifar_resnet(56)
    erased.layer3 = ErasedChannels(erased.layer3, ERASED_CHANNELS)
    channels = diagnose(erased, strong, loader, "layer3", functional=False, progress=False)["layer3"].channels
    top = sorted(range(len(channels)), key=lambda c: channels[c])[-ERASED_CHANNELS:]
    found = sum(c >= len(channels) - ERASED_CHANNELS for c in top) / ERASED_CHANNELS

    blank = images * (labels != ERASED_CLASS).float()[:, None, None, None]
    pairs = TensorDataset(torch.stack([blank, images], 1), labels)
    classes = diagnose(
        cifar_resnet(56),
        strong,
        DataLoader(pairs, batch_size=200),
        "layer3",
        weak_transform=lambda both: both[:, 0],
        strong_transform=lambda both: both[:, 1],
        functional=False,
        progress=False,
    )["layer3"].classes
    planted = {
        "erased channels among the 16 most unexplained": found,
        "most unexplained class is the erased one": classes[0].label == ERASED_CLASS,
        "unexplained share of the erased class": classes[0].unexplained,
        "largest unexplained share of another class": classes[1].unexplained,
    }
    print(table(rows))
    print(seconds, planted)
    record("diagnose", {"resnet20_resnet56": rows, "planted": planted, "seconds": seconds}, settings=diagnosis.settings)


if __name__ == "__main__":
    main()
