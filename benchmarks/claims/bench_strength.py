"""Claim: a strong network has fewer blind spots than a weak one.

    python -m benchmarks.claims.bench_strength  # 3 minutes on one CPU core; resumes

Eight public CIFAR-10 networks by two authors are measured in pairs on 1,000 test images (order 0, 1×1 maps). Blind
spots of a network beside another: the share of the other's feature that it does not explain. Strength is top-1 on all
10,000 test images. In the first claim, a reference is compared with the four networks of the other author.
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import knowiso_train as ki
from benchmarks.claims.common import LAYERS, ClaimResults, judge
from benchmarks.common import models
from benchmarks.common.stats import mean_and_error, spearman

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "claims_strength"
FIRST_AUTHOR, SECOND_AUTHOR = (20, 32, 44, 56), (8, 14, 26, 32)
NETWORKS = {
    **{f"A-{depth}": partial(models.cifar_resnet, depth) for depth in FIRST_AUTHOR},
    **{f"B-{depth}": partial(models.cifar10_other_resnet, depth) for depth in SECOND_AUTHOR},
}
# Per cent of all 10,000 test images, as measured with these files; A-44 as published with them
TOP1 = {
    "A-20": 91.73,
    "A-32": 92.63,
    "A-44": 93.10,
    "A-56": 93.39,
    "B-8": 89.59,
    "B-14": 92.18,
    "B-26": 93.41,
    "B-32": 93.69,
}
STATISTICS = {
    "A": (models.CIFAR10_MEAN, models.CIFAR10_STD),
    "B": (models.CIFAR10_OTHER_MEAN, models.CIFAR10_OTHER_STD),
}
TEST_IMAGES, BATCH_IMAGES = 1000, 125
SECTION = "4, network diagnosis"


def normalize(author: str, images: torch.Tensor) -> torch.Tensor:
    """Normalize images in [0, 1] as in the training of an author's networks."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in STATISTICS[author])
    return (images - mean) / std


def transform(name: str) -> Any:
    """Return the transform of images for a network."""
    return partial(normalize, name[0])


def pairs(reference: str, others: list[str]) -> dict[str, Any]:
    """Return the blind spots of a reference and of others beside each other, by other network and layer."""
    pixels, labels = models.cifar_bytes("cifar10", "test", TEST_IMAGES)
    stages: dict[str, Any] = {name: NETWORKS[name] for name in others}
    network: nn.Module = NETWORKS[reference]()
    comparison = ki.compare_stages(
        network,
        stages,
        DataLoader(TensorDataset(pixels.float() / 255, labels), batch_size=BATCH_IMAGES),
        list(LAYERS),
        functional=False,
        bootstrap=0,
        reference_transform=transform(reference),
        stage_transform={name: transform(name) for name in others},
        path=CACHE / reference,
    )
    return {
        "blind_spots": {
            stage.name: {entry.layer: {"of_stage": entry.lost, "of_reference": entry.gained} for entry in stage}
            for stage in comparison
        }
    }


def blind_spots(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, float]]:
    """Return the blind spots by (network, network beside it) and layer."""
    shares: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        for name, layers in row["blind_spots"].items():
            shares[name, row["reference"]] = {layer: value["of_stage"] for layer, value in layers.items()}
            shares[row["reference"], name] = {layer: value["of_reference"] for layer, value in layers.items()}
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="claims_strength", help="results file")
    args = parser.parse_args()
    results = ClaimResults(args.name, {"networks": list(NETWORKS), "test_images": TEST_IMAGES, "order": 0})
    accuracies, names = TOP1, list(NETWORKS)
    rows = [
        results.row(partial(pairs, name, names[i + 1 :]), reference=name)
        for i, name in enumerate(names)
        if i + 1 < len(names)
    ]
    shares = blind_spots(rows)
    by_reference: dict[str, dict[str, float]] = {}
    for reference in names:
        others = [name for name in names if name[0] != reference[0]]
        by_reference[reference] = {
            layer: -spearman([accuracies[name] for name in others], [shares[name, reference][layer] for name in others])
            for layer in LAYERS
        }
    # Of every pair of one author: blind spots of the weaker network minus those of the stronger one
    differences: dict[str, list[float]] = {"A": [], "B": []}
    for one, two in combinations(names, 2):
        if one[0] == two[0]:
            weak, strong = sorted((one, two), key=accuracies.__getitem__)
            differences[one[0]].append(
                100 * fmean(shares[weak, strong][layer] - shares[strong, weak][layer] for layer in LAYERS)
            )
    claims = [
        judge(
            "Stronger networks have fewer blind spots beside one reference",
            [fmean(value.values()) for value in by_reference.values()],
            section=SECTION,
            measured="− Spearman correlation of top-1 and blind spots of four networks, mean over layers, by reference",
        ),
        judge(
            "Of two networks, the weaker one has more blind spots beside the other",
            [value for author in differences.values() for value in author],
            section=SECTION,
            measured="blind spots of the weaker minus those of the stronger network, points, by pair of one author",
        ),
    ]
    table = [
        {
            "network": name,
            "top-1": accuracies[name],
            **{
                f"blind spots {layer}": mean_and_error(
                    [100 * shares[name, other][layer] for other in names if other[0] != name[0]]
                )
                for layer in LAYERS
            },
            **{
                f"unreliable {layer}": mean_and_error(
                    [100 * shares[other, name][layer] for other in names if other[0] != name[0]]
                )
                for layer in LAYERS
            },
        }
        for name in names
    ]
    results.finish(claims, table, spearman=by_reference, differences=differences)


if __name__ == "__main__":
    main()
