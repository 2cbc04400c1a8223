"""Unexplained share beside the functional shares of real networks, and the time that `functional=True` adds.

    python -m benchmarks.measure.bench_functional            # both parts; 10 minutes on one CPU core
    python -m benchmarks.measure.bench_functional --time     # the time alone

CIFAR-10 networks by two authors explain each other at the three stages, order 0, on the test images: 80 % to fit and
select the maps, 20 % to report on. Each network pair is saved when it is done, and not repeated while its settings are
the same. The time is that of the measurement with and without the option, interleaved, as the ratio of medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import models
from benchmarks.common.results import RESULTS, record, table
from knowiso_train import Report, measure

NAME = "functional"
LAYERS = ["layer1", "layer2", "layer3"]
IMAGES, BATCH_IMAGES, ORDER = 5_000, 125, 0
# Depth of the first author's network, and of the second author's
PAIRS = [(32, 32), (56, 32), (20, 8)]
# Networks, layers, directions and number of images
TIMED = {
    "ResNet-32 of two authors, 3 stages, forward": ("cifar", LAYERS, "forward", 1500),
    "ResNet-32 of two authors, 3 stages, both directions": ("cifar", LAYERS, "both", 1500),
    "timm ResNet-18 and ResNet-50 at 224 px, 2 layers, both directions": ("timm", ["layer3", "layer4"], "both", 96),
}
REPEATS = 3


class Normalized(nn.Module):
    """Network for images in [0, 1]."""

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.layer1, self.layer2, self.layer3 = model.layer1, model.layer2, model.layer3
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, x: Tensor) -> Any:
        return self.model((x - self.mean) / self.std)


def networks(depth: int, other_depth: int) -> tuple[nn.Module, nn.Module]:
    """Load a network of the first author and one of the second."""
    return (
        Normalized(models.cifar_resnet(depth), models.CIFAR10_MEAN, models.CIFAR10_STD),
        Normalized(models.cifar10_other_resnet(other_depth), models.CIFAR10_OTHER_MEAN, models.CIFAR10_OTHER_STD),
    )


def loader(count: int) -> DataLoader[Any]:
    """Return a loader of the first CIFAR-10 test images, in [0, 1], with labels."""
    pixels, labels = models.cifar_bytes("cifar10", "test", count)
    return DataLoader(TensorDataset(pixels.float() / 255, labels), batch_size=BATCH_IMAGES)


def rows_of(report: Report) -> list[dict[str, Any]]:
    """Return the figures of each pair of a report."""
    rows = []
    for pair in report:
        explaining, explained = report.roles(pair.direction)
        mapped, residual, own = pair.functional[-1], pair.residual_only, pair.target_output
        if residual is None or own is None:
            raise ValueError("the report has no functional shares")
        rows.append(
            {
                "explained": explained,
                "from": explaining,
                "layer": pair.target,
                "unexplained": pair.unexplained,
                "own top-1": own.top1,
                "top-1": mapped.top1,
                "residual top-1": residual.top1,
                "agreement": mapped.agreement,
                "agreement error": mapped.agreement_error,
                "residual agreement": residual.agreement,
                "KL": mapped.kl,
                "residual KL": residual.kl,
            }
        )
    return rows


def compare(count: int, saved: dict[str, Any]) -> None:
    """Measure the pairs of networks that are not saved yet."""
    for depth, other_depth in PAIRS:
        names = (f"resnet{depth}", f"resnet{other_depth}_cifar10")
        key = f"{' and '.join(names)}, {count} images, order {ORDER}"
        if key not in saved:
            options: dict[str, Any] = {"order": ORDER, "directions": "both", "noise_floor": False, "progress": False}
            report = measure(
                *networks(depth, other_depth), loader(count), LAYERS, functional=True, names=names, **options
            )
            saved[key] = rows_of(report)
            record(NAME, saved)
        print(f"\n{key}\n{table(saved[key])}", flush=True)


def timed_case(kind: str, count: int) -> tuple[nn.Module, nn.Module, DataLoader[Any]]:
    """Return two networks and a loader of their images; weights and images of timm's networks are random."""
    if kind == "cifar":
        return *networks(32, 32), loader(count)
    import timm

    images = torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    return (
        timm.create_model("resnet18"),
        timm.create_model("resnet50"),
        DataLoader(TensorDataset(images), batch_size=16),
    )


def compare_times(saved: dict[str, Any]) -> None:
    """Measure with and without the option in turn, and save the ratio of the median times."""
    rows = saved.setdefault("time", [])
    for name, (kind, layers, directions, count) in TIMED.items():
        if any(row["case"] == name for row in rows):
            continue
        source, target, data = timed_case(kind, count)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for repeat in range(REPEATS):
            for functional in (False, True) if repeat % 2 == 0 else (True, False):
                options: dict[str, Any] = {"order": ORDER, "directions": directions, "progress": False}
                began = time.process_time()
                measure(source, target, data, layers, functional=functional, **options)
                seconds[functional].append(time.process_time() - began)
        plain, added = (statistics.median(seconds[functional]) for functional in (False, True))
        rows.append(
            {"case": name, "images": count, "plain CPU s": plain, "functional CPU s": added, "ratio": added / plain}
        )
        record(NAME, saved)
    print(f"\n{table(rows)}")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--time", action="store_true", help="measure the time alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / f"{NAME}.json"
    saved = json.loads(path.read_text())["figures"] if path.exists() else {}
    if not arguments.time:
        compare(arguments.images, saved)
    compare_times(saved)


if __name__ == "__main__":
    main()
