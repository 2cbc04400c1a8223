"""Checkpoints of a training in order: Spearman correlation of the step with kept shares, CKA and Procrustes.

    python -m benchmarks.measure.bench_trajectory          # ten minutes on one CPU core; resumes
    python -m benchmarks.measure.bench_trajectory --time   # time of 30 checkpoints of ResNet-20

Two ResNet-8 networks are trained on CIFAR-10 (`common/small_networks.py`), with 30 checkpoints each. The checkpoints
of a run are compared with its last one, and with the trained network of the other run. Every measure sees the same
1,000 test images at the same layers; shares are those of order 0. A score is the mean over layers and runs.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common.models import CifarResNet, cifar10, cifar_resnet
from benchmarks.common.results import record, table
from benchmarks.common.small_networks import CACHE_FOLDER, Training, trained_network
from benchmarks.common.stats import mean_and_error, spearman
from knowiso_train import compare_stages
from knowiso_train.diagnosis.comparison import StageComparison

LAYERS = ("layer1", "layer2", "layer3")
SEEDS = (0, 1)
REFERENCES = {"last checkpoint": 0, "the other run": 1}  # distance of the seeds
NUM_CHECKPOINTS = 30
TIMED_IMAGES = 2000
# Figures of a layer, as functions of its result that rise as a stage approaches the reference
FIGURES = {
    "kept share": lambda entry: entry.kept,
    "share that is not gained": lambda entry: -entry.gained,
    "functional agreement": lambda entry: entry.figure("agreement"),
    "functional KL": lambda entry: -entry.figure("kl"),
    "CKA": lambda entry: entry.of_reference.similarity["cka"],
    "Procrustes": lambda entry: entry.of_reference.similarity["procrustes"],
    "R²": lambda entry: entry.of_reference.similarity["r2"],
}


def trajectory(seed: int, reference_seed: int, images: int, num_checkpoints: int) -> StageComparison:
    """Return the comparison of a run's checkpoints with the trained network of a run, without that network itself."""
    data = cifar10("train")
    run, other = (Training(seed=s, num_checkpoints=num_checkpoints) for s in (seed, reference_seed))
    count = num_checkpoints - (seed == reference_seed)
    stages = {
        f"step {step}": partial(trained_network, run, *data, checkpoint)
        for checkpoint, step in enumerate(run.checkpoint_steps[:count])
    }
    return compare_stages(
        trained_network(other, *data),
        stages,
        DataLoader(TensorDataset(*cifar10("test", images)), batch_size=250),
        list(LAYERS),
        bootstrap=0,
        similarity=("cka", "procrustes", "r2"),
        path=CACHE_FOLDER.parent / "trajectory" / f"{seed}_{reference_seed}_{images}_{num_checkpoints}",
    )


def scores(comparison: StageComparison) -> dict[str, list[float]]:
    """Return the Spearman correlation of the order of the stages with every figure, for each layer."""
    return {
        name: [spearman(range(len(comparison)), [figure(stage[layer]) for stage in comparison]) for layer in LAYERS]
        for name, figure in FIGURES.items()
    }


def orders(images: int, num_checkpoints: int) -> Iterator[dict[str, Any]]:
    """Yield a table of the scores, and the scores and shares of every layer and run, after each reference."""
    rows: dict[str, dict[str, Any]] = {name: {"measure": name} for name in FIGURES}
    details = {}
    for reference, distance in REFERENCES.items():
        by_run = {seed: trajectory(seed, SEEDS[seed - distance], images, num_checkpoints) for seed in SEEDS}
        by_score = {seed: scores(comparison) for seed, comparison in by_run.items()}
        details[reference] = {
            seed: {
                "scores": by_score[seed],
                "kept": {layer: comparison.curve(layer, "kept") for layer in LAYERS},
                "agreement": {layer: comparison.curve(layer, "agreement") for layer in LAYERS},
                "seconds": sum(stage.seconds for stage in comparison),
            }
            for seed, comparison in by_run.items()
        }
        for name, row in rows.items():
            row[reference] = mean_and_error([float(np.mean(run[name])) for run in by_score.values()])
            row[f"{reference}, lowest"] = min(value for run in by_score.values() for value in run[name])
        yield {"table": list(rows.values()), "runs": details}


def interpolated(network: CifarResNet, start: CifarResNet, share: float) -> nn.Module:
    """Return a network between two others, which stands for a checkpoint in the measurement of time."""
    result = copy.deepcopy(network)
    state: dict[str, Tensor] = result.state_dict()
    for name, value in start.state_dict().items():
        if state[name].is_floating_point():
            state[name].lerp_(value, 1 - share)
    return result


def times(images: int) -> Iterator[dict[str, Any]]:
    """Yield the seconds for 30 checkpoints of ResNet-20, both directions, without and with functional figures."""
    torch.manual_seed(0)
    network, start = cifar_resnet(20), CifarResNet(20).eval()
    shares = [(i + 1) / NUM_CHECKPOINTS for i in range(NUM_CHECKPOINTS)]
    stages = {f"{share:.2f}": partial(interpolated, network, start, share) for share in shares}
    loader = DataLoader(TensorDataset(*cifar10("test", images)), batch_size=250)
    for functional in (False, True):
        begin, cpu = time.perf_counter(), time.process_time()
        compare_stages(network, stages, loader, list(LAYERS), functional=functional, progress=False)
        yield {
            "functional": functional,
            "seconds": time.perf_counter() - begin,
            "cpu_seconds": time.process_time() - cpu,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000, help="test images of each comparison")
    parser.add_argument("--checkpoints", type=int, default=NUM_CHECKPOINTS, help="checkpoints of each run")
    parser.add_argument("--time", action="store_true", help="measure the time instead")
    parser.add_argument("--name", help="results file")
    args = parser.parse_args()
    if args.time:
        rows, settings = [], {"images": TIMED_IMAGES, "checkpoints": NUM_CHECKPOINTS, "order": 0}
        for row in times(TIMED_IMAGES):
            rows.append(row)
            print(table(rows), flush=True)
            record(args.name or "trajectory_time", rows, settings=settings)
        return
    settings = {"images": args.images, "checkpoints": args.checkpoints, "order": 0}
    for figures in orders(args.images, args.checkpoints):
        print(table(figures["table"]), flush=True)
        record(args.name or "trajectory", figures, settings=settings)


if __name__ == "__main__":
    main()
