"""Fit of orders 0 to 2: the present solver and that of an earlier commit, on the same real features.

    python -m benchmarks.measure.bench_orders                       # half an hour on one CPU core, resumable
    python -m benchmarks.measure.bench_orders --cases stage2 --seeds 1
    python -m benchmarks.measure.bench_orders --readme              # time of the README's networks with order 2 instead

The earlier solver is read from git (`git archive`). Both fit in processes of one thread, in turn. Seconds are CPU time
of the whole fit, and of the orders above 0 alone. The unexplained share is that of held-out images. The defaults of
the present solver were chosen on the selection images of these pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from benchmarks.common.models import cifar10, cifar_features, efficientnet_lite
from benchmarks.common.results import RESULTS, record, table
from benchmarks.measure.bench_networks import Photographs

RIVAL_COMMIT = "2caf5d8"
SOLVERS = ("earlier", "present")
RUNS = ("order 0", "present", "earlier")  # of each pair and seed; order 0 alone, the same in both solvers
CHUNK_IMAGES = 50
README_NETWORKS, README_LAYERS = ("resnet18", "resnet50"), ["layer3", "layer4"]
README_IMAGES, README_THREADS = 1000, 2


@dataclass(frozen=True)
class Case:
    """One pair of layers and the numbers of fitting, selection and held-out images."""

    description: str
    kernel_size: int
    order: int
    images: tuple[int, int, int]


CASES = {
    "stage2": Case("CIFAR-10 ResNet-32 → 44, stage 2", 3, 2, (2100, 300, 600)),
    "stage3": Case("CIFAR-10 ResNet-32 → 44, stage 3", 3, 2, (2100, 300, 600)),
    "pointwise": Case("CIFAR-10 ResNet-20 → 56, stage 3", 1, 2, (2100, 300, 600)),
    "wide": Case("EfficientNet-Lite0 → Lite1, blocks.4.1.bn2", 1, 1, (360, 120, 300)),
}


def load_features(name: str) -> tuple[Tensor, Tensor]:
    """Compute source and target features of a case."""
    count = sum(CASES[name].images)
    if name == "wide":
        return wide_features(count)
    stage = 2 if name == "stage2" else 3
    source, target = (20, 56) if name == "pointwise" else (32, 44)
    images, _ = cifar10("train", count)
    return cifar_features(source, images, stage), cifar_features(target, images, stage)


def photographs(count: int) -> Dataset[Tensor]:
    """Return `count` photographs of ImageNet."""
    images = Photographs()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count].tolist()
    return Subset(images, order)


@torch.no_grad()
def wide_features(count: int) -> tuple[Tensor, Tensor]:
    """Compute a layer of 672 channels of two EfficientNet-Lite on photographs of ImageNet."""
    outputs: tuple[list[Tensor], list[Tensor]] = ([], [])
    networks = [efficientnet_lite(size) for size in (0, 1)]
    for network, output in zip(networks, outputs, strict=True):
        network.get_submodule("blocks.4.1.bn2").register_forward_hook(
            lambda module, args, feature, output=output: output.append(feature.clone())
        )
    for images in DataLoader(photographs(count), batch_size=CHUNK_IMAGES):
        for network in networks:
            network(images)
    return torch.cat(outputs[0]), torch.cat(outputs[1])


@torch.no_grad()
def fit(name: str, features: Path, order: int, seed: int) -> dict[str, Any]:
    """Fit orders 0 to `order` in this process; return CPU seconds and the held-out unexplained share of each."""
    from knowiso_train import Disentangler

    warnings.simplefilter("ignore")
    x, y = torch.load(features, weights_only=True)
    fitting, selection, _ = CASES[name].images
    select = slice(fitting, fitting + selection)
    began = time.process_time()
    maps = Disentangler(order=order, kernel_size=CASES[name].kernel_size, seed=seed)
    maps.fit(x[:fitting], y[:fitting], select=(x[select], y[select]))
    seconds = time.process_time() - began
    held_x, held_y = x[fitting + selection :], y[fitting + selection :]
    residual, unexplained, total = held_y, [], centered_energy(held_y)
    parts = [maps.components(chunk) for chunk in held_x.split(CHUNK_IMAGES)]
    for component in (torch.cat(chunks) for chunks in zip(*parts, strict=True)):
        residual = residual - component
        unexplained.append(centered_energy(residual) / total)
    return {"seconds": seconds, "unexplained": unexplained}


def centered_energy(feature: Tensor) -> float:
    """Return the squared sum of a feature without its mean over images and positions."""
    return float((feature - feature.mean((0, 2, 3), keepdim=True)).double().square().sum())


def time_readme() -> None:
    """Time `measure` with order 2 on the README's networks, with random weights, and record it."""
    import timm

    from knowiso_train import measure

    torch.set_num_threads(README_THREADS)
    torch.manual_seed(0)
    student, teacher = (timm.create_model(name, pretrained=False).eval() for name in README_NETWORKS)
    loader = DataLoader(photographs(README_IMAGES), batch_size=CHUNK_IMAGES)
    load, wall, cpu = os.getloadavg()[0], time.perf_counter(), time.process_time()
    report = measure(student, teacher, loader, README_LAYERS, directions="both", progress=False)
    figures = {
        "CPU seconds": time.process_time() - cpu,
        "wall seconds": time.perf_counter() - wall,
        "load average before": load,
        "threads": README_THREADS,
        "peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        "unexplained": {f"{pair.source} to {pair.target}, {pair.direction}": pair.unexplained for pair in report.pairs},
    }
    print(json.dumps(figures, indent=1))
    record("orders_readme", figures, networks=README_NETWORKS, layers=README_LAYERS, images=README_IMAGES)


def run_fit(root: Path, *arguments: str) -> dict[str, Any]:
    """Run `fit` in a process that imports the library from a folder."""
    here = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{here}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.measure.bench_orders", "--fit", *arguments]
    result = subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True, text=True)
    return dict(json.loads(result.stdout.splitlines()[-1]))


def export_rival(folder: Path) -> Path:
    """Write the library of the earlier commit into a folder."""
    here = Path(__file__).resolve().parents[2]
    archive = subprocess.run(
        ["git", "archive", RIVAL_COMMIT, "knowiso_train"], cwd=here, check=True, capture_output=True
    ).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    return folder


def measured_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of an interrupted run."""
    return list(json.loads(path.read_text())["rows"]) if path.exists() else []


def summary(rows: list[dict[str, Any]], cases: Iterable[str]) -> list[dict[str, Any]]:
    """Return means over the seeds that both solvers have, and the largest difference of the last order."""
    figures = []
    for name in cases:
        runs = {solver: {r["seed"]: r for r in rows if (r["case"], r["solver"]) == (name, solver)} for solver in RUNS}
        seeds = sorted(set.intersection(*(set(run) for run in runs.values())))
        if not seeds:
            continue
        shares, seconds = (
            {solver: torch.tensor([runs[solver][seed][key] for seed in seeds]) for solver in RUNS}
            for key in ("unexplained", "seconds")
        )
        above = {solver: seconds[solver] - seconds["order 0"] for solver in SOLVERS}
        difference = (shares["present"] - shares["earlier"])[:, -1].max()
        figures.append(
            {
                "pair": CASES[name].description,
                "kernel": CASES[name].kernel_size,
                "seeds": len(seeds),
                **{f"unexplained, {solver}": format_shares(shares[solver]) for solver in SOLVERS},
                "largest difference": round(float(difference), 4),
                **{f"seconds, {solver}": float(seconds[solver].mean()) for solver in SOLVERS},
                **{f"seconds above order 0, {solver}": float(above[solver].mean()) for solver in SOLVERS},
                "times faster": float(seconds["earlier"].mean() / seconds["present"].mean()),
                "times faster above order 0": float(above["earlier"].mean() / above["present"].mean()),
            }
        )
    return figures


def format_shares(shares: Tensor) -> str:
    """Return the mean over the seeds of the share of each order."""
    return " / ".join(f"{share:.4f}" for share in shares.mean(0).tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="pairs to fit")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each pair and solver")
    parser.add_argument(
        "--fit", nargs=4, metavar=("CASE", "FEATURES", "ORDER", "SEED"), help="one fit, for main itself"
    )
    parser.add_argument("--readme", action="store_true", help="time `measure` on the README's networks instead")
    args = parser.parse_args()
    if args.readme:
        time_readme()
        return
    if args.fit:
        name, features, order, seed = args.fit
        print(json.dumps(fit(name, Path(features), int(order), int(seed))))
        return
    path = RESULTS / "orders.json"
    rows = measured_rows(path)
    here = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "rival").mkdir()
        roots = {"earlier": export_rival(folder / "rival")}
        done = {(r["case"], r["seed"], r["solver"]) for r in rows}
        for seed, name, solver in product(range(args.seeds), args.cases, RUNS):
            if (name, seed, solver) in done:
                continue
            features = folder / f"{name}.pt"
            if not features.exists():
                torch.save(load_features(name), features)
            order = 0 if solver == "order 0" else CASES[name].order
            result = run_fit(roots.get(solver, here), name, str(features), str(order), str(seed))
            rows.append({"case": name, "seed": seed, "solver": solver} | result)
            record("orders", summary(rows, CASES), rows=rows, rival=RIVAL_COMMIT)
    print(table(summary(rows, CASES)))


if __name__ == "__main__":
    main()
