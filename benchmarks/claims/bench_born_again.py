"""Blind spots and unreliable features of born-again networks by generation.

    python -m benchmarks.claims.bench_born_again     # 15 minutes on one CPU core; resumes

Five generations of ResNet-8 are trained on 6,000 CIFAR-10 images: the first with labels alone, each later one distilled
by KD from the one before, with other initial weights and batches. Each is compared with ResNet-56 with published
weights, a stronger network that had no part in the training. Shares are of order 0, with 3×3 maps on 2,000
test images.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
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
from benchmarks.common.models import cifar_resnet
from benchmarks.common.small_networks import Training, accuracy, trained_network
from benchmarks.common.stats import mean_and_error
from knowiso_train import compare_stages

GENERATIONS = range(5)
REFERENCE_DEPTH = 56
SECTION = "4, explanation of knowledge distillation"
# Statement about a later generation, by figure
STATEMENTS = {
    "unreliable": "contain fewer unreliable features",
    "blind_spots": "have fewer blind spots",
    "functional_unreliable": "depend less on unreliable features in their output",
    "functional_blind_spots": "have fewer blind spots that the reference's output needs",
}


def generation_row(seed: int, generation: int, num_images: int) -> dict[str, Any]:
    """Train a generation, and return its accuracy on test images."""
    network = trained_network(Training(seed=seed, generation=generation), *read_cifar10("train"))
    return {"accuracy": accuracy(network, *read_cifar10("test", num_images))}


def comparison_row(seed: int, num_images: int) -> dict[str, Any]:
    """Return the figures of all generations of a seed."""
    data, loader = read_cifar10("train"), DataLoader(TensorDataset(*read_cifar10("test", num_images)), batch_size=250)
    stages = {str(g): partial(trained_network, Training(seed=seed, generation=g), *data) for g in GENERATIONS}
    comparison = compare_stages(
        cifar_resnet(REFERENCE_DEPTH),
        stages,
        loader,
        list(LAYERS),
        kernel_size=KERNEL_SIZE,
        bootstrap=0,
        progress=False,
    )
    return {"generations": [stage_figures(stage) for stage in comparison]}


def slope(values: list[float]) -> float:
    """Return the rise from one generation to the next, of the straight line that fits best."""
    return float(np.polyfit(range(len(values)), values, 1)[0])


def main() -> None:
    num_images, store = open_results(__doc__, "claims_born_again", generations=len(GENERATIONS))
    accuracies = [
        [
            store.row(partial(generation_row, seed, g, num_images), stage="train", seed=seed, generation=g)["accuracy"]
            for g in GENERATIONS
        ]
        for seed in SEEDS
    ]
    figures = [
        store.row(partial(comparison_row, seed, num_images), stage="compare", seed=seed)["generations"]
        for seed in SEEDS
    ]
    claims = [
        judge(
            f"Later generations of born-again networks {statement}",
            [-slope([100 * float(np.mean(generation[figure])) for generation in chain]) for chain in figures],
            section=SECTION,
            measured="fall of the share per generation, points, mean of three layers",
        )
        for figure, statement in STATEMENTS.items()
    ]
    claims.append(
        judge(
            "Later generations of born-again networks are more accurate",
            [slope(chain) for chain in accuracies],
            section=SECTION,
            measured="rise of the top-1 accuracy per generation, points",
        )
    )
    rows = [
        {
            "generation": generation + 1,
            "top-1 %": mean_and_error([chain[generation] for chain in accuracies]),
            **{figure: percentages([chain[generation][figure] for chain in figures]) for figure in STATEMENTS},
        }
        for generation in GENERATIONS
    ]
    store.finish(claims, rows)


if __name__ == "__main__":
    main()
