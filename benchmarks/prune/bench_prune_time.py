"""How long it takes to prune a large network without training, and how much memory: half of ResNet-50's multiply-adds, 512 photographs.

    python -m benchmarks.prune.bench_prune_time           # writes results/bench_prune_time.json, or …_gpu.json where there is
    a GPU; wants the cores alone
    python -m benchmarks.prune.bench_prune_time --quick   # does it run? ResNet-18 on 32 photographs, nothing is written

Beside `ki.prune` (rows=20) what a user would pick instead: torch-pruning's L1, one shot, and batch norms' statistics
from the same images of 224 px.
Each in a process of its own, whose peak memory is told: the process's, or on a GPU what PyTorch allocated there. No
weights of ResNet-50 are at hand,
so these are random, with live branches (timm's `zero_init_last=False`; zeroed ones would be skipped) and statistics of
the photographs. These are in
channels_last, in which CPUs convolve faster.
"unexplained" is the share of its output's variance over other photographs that the pruned network does not give, which
for random weights only says
that something was fitted.
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
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, zero_init_last=False).to(images.device)
    with torch.no_grad():
        recompute_statistics(model, images[: 4 * BATCH_SIZE].split(BATCH_SIZE))
    return model.eval()


def prune_by_isomorphism(model: nn.Module, images: Tensor) -> nn.Module:
    return ki.prune(
        model, images.split(BATCH_SIZE), macs=0.5, max_images=len(images), rows=SAMPLES_PER_FEATURE, progress=False
    ).model


def prune_by_l1(model: nn.Module, images: Tensor) -> nn.Module:
    """The largest ratio of thirty-two that keeps no more than half of the multiply-adds."""
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
    small = METHODS[method](model, images)
    if gpu:
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = (
        torch.cuda.max_memory_allocated() / 2**30 if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    )
    with torch.no_grad():
        wanted, given = model(others), small(others)
    left = float((given - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())
    row = {
        "network": name,
        "images": count,
        "method": method,
        "seconds": round(wall, 1),
        "processor seconds": round(cpu, 1),
    }
    return row | {
        "peak GiB": round(peak, 2),
        "MACs %": round(100 * macs(small) / macs(model), 2),
        "unexplained": round(left, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ResNet-18 on 32 photographs; nothing is written")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()
    what = ("resnet18", 32) if args.quick else ("resnet50", 512)
    rows = []
    for method in args.methods:
        with get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(run, (method, *what)))
        print(rows[-1], flush=True)
    print(table(rows))
    if not args.quick:
        record("bench_prune_time_gpu" if torch.cuda.is_available() else "bench_prune_time", rows)


if __name__ == "__main__":
    main()
