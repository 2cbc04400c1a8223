"""Stability of networks trained on disjoint images, by depth and by number of images.

    python -m benchmarks.claims.bench_stability     # 10 minutes on one CPU core; resumes

Pairs of ResNet-8 are trained on two disjoint sets of CIFAR-10 images, with different initial weights and equal steps:
halves of 6,000 images, and of 1,000. A layer is stable where the two networks of a pair reproduce each other's
features. Shares are of order 0, with 3×3 maps on 2,000 test images, averaged over both directions.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.claims.common import KERNEL_SIZE, LAYERS, SEEDS, judge, open_results, percentages, read_cifar10
from benchmarks.common.small_networks import Training, accuracy, train_networks, trained_network
from benchmarks.common.stats import mean_and_error
from knowiso_train import stability

SIZES = (3000, 500)  # images of each network, most first
SECTION = "4, stability of networks"
# Name of a figure in the text, by figure
FIGURES = {"unexplained": "unexplained share", "changed": "functional unexplained share"}


def pair(seed: int, num_images: int) -> list[Training]:
    """Return the trainings on the two sets of images."""
    # Those of 500 images share their first network with the ranking test
    first = seed if num_images == SIZES[-1] else 200 + seed
    return [
        Training(seed=first, num_images=num_images),
        Training(seed=210 + seed, first_image=num_images, num_images=num_images),
    ]


def training_row(seed: int, num_images: int, num_test_images: int) -> dict[str, Any]:
    """Train a pair, and return the accuracy of both networks on test images."""
    data, test = read_cifar10("train"), read_cifar10("test", num_test_images)
    train_networks(pair(seed, num_images), *data)
    return {"accuracy": [accuracy(trained_network(training, *data), *test) for training in pair(seed, num_images)]}


def stability_row(seed: int, num_images: int, num_test_images: int) -> dict[str, Any]:
    """Return the figures of a pair by layer."""
    networks = [trained_network(training, *read_cifar10("train")) for training in pair(seed, num_images)]
    loader = DataLoader(TensorDataset(*read_cifar10("test", num_test_images)), batch_size=250)
    report = stability(
        networks, loader, list(LAYERS), kernel_size=KERNEL_SIZE, noise_floor=False, bootstrap=0, progress=False
    )
    return {
        "unexplained": [report.spread(layer).mean for layer in LAYERS],
        "changed": [1 - report.spread(layer, "agreement").mean for layer in LAYERS],
    }


def main() -> None:
    num_images, store = open_results(__doc__, "claims_stability", sizes=SIZES)
    accuracies, figures = {}, {}
    for size in SIZES:
        accuracies[size] = [
            store.row(partial(training_row, seed, size, num_images), stage="train", seed=seed, size=size)["accuracy"]
            for seed in SEEDS
        ]
        figures[size] = [
            store.row(partial(stability_row, seed, size, num_images), stage="compare", seed=seed, size=size)
            for seed in SEEDS
        ]
    most, least = figures[SIZES[0]], figures[SIZES[-1]]
    claims = []
    for figure, name in FIGURES.items():
        claims += [
            judge(
                f"Deep layers are less stable than shallow ones ({size:,} images each)",
                [100 * (row[figure][-1] - row[figure][0]) for row in figures[size]],
                section=SECTION,
                measured=f"{name} of {LAYERS[-1]} minus that of {LAYERS[0]}, points",
            )
            for size in SIZES
        ]
        claims += [
            judge(
                f"Networks trained on fewer images are less stable ({layer})",
                [100 * (a[figure][i] - b[figure][i]) for a, b in zip(least, most, strict=True)],
                section=SECTION,
                measured=f"{name} with {SIZES[-1]} images minus that with {SIZES[0]:,}, points",
            )
            for i, layer in enumerate(LAYERS)
        ]
    rows = [
        {
            "images of each network": size,
            "top-1 %": mean_and_error([float(np.mean(row)) for row in accuracies[size]]),
            **{name: percentages([row[figure] for row in figures[size]]) for figure, name in FIGURES.items()},
        }
        for size in SIZES
    ]
    store.finish(claims, rows)


if __name__ == "__main__":
    main()
