"""Checkpoints of a training in order: Spearman correlation of the step with kept shares, CKA and Procrustes.

    python -m benchmarks.measure.bench_trajectory          # ten minutes on one CPU core; resumes
    python -m benchmarks.measure.bench_trajectory --time   # time of 30 checkpoints of ResNet-20

Three ResNet-8 networks are trained on CIFAR-10 (`common/small_networks.py`), with 12 checkpoints each. The checkpoints
of a run are compared with its last one, and with the trained network of another run. Every measure sees the same 2,000
test images at the same layers; shares are those of order 0. A score is the mean over layers and runs.
"""

from __future__ import annotations

import argparse
import copy
import time
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
SEEDS = (0, 1, 2)
NUM_TIMED = 30  # stages in the measurement of time
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


def orders(images: int, num_checkpoints: int) -> dict[str, Any]:
    """Return a table of the scores, and the scores of every layer and run."""
    rows: dict[str, dict[str, Any]] = {name: {"measure": name} for name in FIGURES}
    details = {}
    for reference, offset in (("last checkpoint", 0), ("another run", 1)):
        by_run = {seed: scores(trajectory(seed, SEEDS[seed - offset], images, num_checkpoints)) for seed in SEEDS}
        details[reference] = by_run
        for name, row in rows.items():
            row[reference] = mean_and_error([float(np.mean(run[name])) for run in by_run.values()])
            row[f"{reference}, lowest"] = min(value for run in by_run.values() for value in run[name])
    return {"table": list(rows.values()), "scores": details}


def interpolated(network: CifarResNet, start: CifarResNet, share: float) -> nn.Module:
    """Return a network between two others, which stands for a checkpoint in the measurement of time."""
    result = copy.deepcopy(network)
    state: dict[str, Tensor] = result.state_dict()
    for name, value in start.state_dict().items():
        if state[name].is_floating_point():
            state[name].lerp_(value, 1 - share)
    return result


def times(images: int) -> list[dict[str, Any]]:
    """Return the seconds for 30 checkpoints of ResNet-20, both directions, with and without functional figures."""
    torch.manual_seed(0)
    network, start = cifar_resnet(20), CifarResNet(20).eval()
    shares = [(i + 1) / NUM_TIMED for i in range(NUM_TIMED)]
    stages = {f"{share:.2f}": partial(interpolated, network, start, share) for share in shares}
    loader = DataLoader(TensorDataset(*cifar10("test", images)), batch_size=250)
    rows = []
    for functional in (False, True):
        for cache_gib in (2.0, 0.0):
            begin, cpu = time.perf_counter(), time.process_time()
            compare_stages(network, stages, loader, list(LAYERS), functional=functional, cache_gib=cache_gib)
            rows.append(
                {
                    "functional": functional,
                    "cache_gib": cache_gib,
                    "seconds": time.perf_counter() - begin,
                    "cpu_seconds": time.process_time() - cpu,
                }
            )
            print(table(rows[-1:]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="test images of each comparison")
    parser.add_argument("--checkpoints", type=int, default=12, help="checkpoints of each run")
    parser.add_argument("--time", action="store_true", help="measure the time instead")
    parser.add_argument("--name", help="results file")
    args = parser.parse_args()
    settings = {"images": args.images, "checkpoints": NUM_TIMED if args.time else args.checkpoints, "order": 0}
    if args.time:
        rows = times(args.images)
        print(table(rows))
        record(args.name or "trajectory_time", rows, settings=settings)
        return
    figures = orders(args.images, args.checkpoints)
    print(table(figures["table"]))
    record(args.name or "trajectory", figures, settings=settings)


if __name__ == "__main__":
    main()
