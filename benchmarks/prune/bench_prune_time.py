"""Time and memory of pruning ResNet-50 to half of its multiply-adds, with 512 photographs, without training.

    python -m benchmarks.prune.bench_prune_time           # 6 minutes on two idle cores; uses a GPU if there is one
    python -m benchmarks.prune.bench_prune_time --quick   # smoke test: ResNet-18, 32 photographs, no results file

The baseline is one-shot L1 of torch-pruning with recomputed batch-norm statistics, on the same images of 224 px. Each
method runs in its own process. Peak memory is that of the process, or on a GPU that of PyTorch's allocator.

Weights are random, with active branches (`zero_init_last=False` of timm; zero branches would be skipped) and statistics
of the photographs, in channels_last. "unexplained" is the unexplained share of the output's variance on other
photographs; for random weights it only shows that the refit works.
"""

from __future__ import annotations

import argparse
import copy
import resource
import time
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import timm
import torch
import torch_pruning as tp
from torch import Tensor, nn

import knowiso_train as ki
from benchmarks.baselines.grail_osscar import recompute_statistics
from benchmarks.baselines.tp_pruner import MacCounter
from benchmarks.common.results import record, table
from benchmarks.prune.tasks import TASKS, normalize

BATCH_SIZE, EVALUATION_IMAGES, SAMPLES_PER_FEATURE = 32, 96, 20


def build_network(name: str, images: Tensor) -> nn.Module:
    """Build the network with random weights and statistics of the images."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, zero_init_last=False).to(images.device)
    with torch.no_grad():
        recompute_statistics(model, images[: 4 * BATCH_SIZE].split(BATCH_SIZE))
    return model.eval()


def prune_by_isomorphism(model: nn.Module, images: Tensor) -> nn.Module:
    """Prune with the library."""
    return ki.prune(
        model, images.split(BATCH_SIZE), macs=0.5, max_images=len(images), rows=SAMPLES_PER_FEATURE, progress=False
    ).model


def prune_by_l1(model: nn.Module, images: Tensor) -> nn.Module:
    """Prune by L1 with the smallest pruning ratio, in steps of 1/32, that meets the budget."""
    macs, head = MacCounter(model, images[:2]), model.get_classifier()  # type: ignore[operator]
    for part in range(8, 32):
        torch.manual_seed(0)
        small = copy.deepcopy(model)
        options = {
            "pruning_ratio": part / 32,
            "ignored_layers": [small.get_submodule(name) for name, m in model.named_modules() if m is head],
        }
        tp.pruner.BasePruner(small, images[:1], tp.importance.MagnitudeImportance(p=1), **options).step()
        if macs(small) <= 0.5 * macs(model):
            break
    with torch.no_grad():
        recompute_statistics(small, images.split(BATCH_SIZE))
    return small.eval()


METHODS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "ki.prune": prune_by_isomorphism,
    "torch-pruning, L1, statistics": prune_by_l1,
}


def run(method: str, name: str, count: int) -> dict[str, Any]:
    """Run one method in this process and return its row."""
    warnings.simplefilter("ignore")
    photographs = normalize(TASKS["lite0"](False).photographs[0][: count + EVALUATION_IMAGES])
    gpu = torch.cuda.is_available()
    images, others = photographs.to("cuda" if gpu else "cpu").split([count, EVALUATION_IMAGES])
    model = build_network(name, images)
    macs = MacCounter(model, images[:2])
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    wall, cpu = time.perf_counter(), time.process_time()
    pruned = METHODS[method](model, images)
    if gpu:
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = (
        torch.cuda.max_memory_allocated() / 2**30 if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    )
    with torch.no_grad():
        expected, actual = model(others), pruned(others)
    unexplained = float((actual - expected).square().sum() / (expected - expected.mean(0)).square().sum())
    row = {
        "network": name,
        "images": count,
        "method": method,
        "seconds": round(wall, 1),
        "processor seconds": round(cpu, 1),
    }
    return row | {
        "peak GiB": round(peak, 2),
        "MACs %": round(100 * macs(pruned) / macs(model), 2),
        "unexplained": round(unexplained, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ResNet-18 on 32 photographs, no results file")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()
    network_and_images = ("resnet18", 32) if args.quick else ("resnet50", 512)
    rows = []
    for method in args.methods:
        with get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(run, (method, *network_and_images)))
        print(rows[-1], flush=True)
    print(table(rows))
    if not args.quick:
        record("bench_prune_time_gpu" if torch.cuda.is_available() else "bench_prune_time", rows)


if __name__ == "__main__":
    main()
