"""Fit of a disentangler: closed form, and the paper's network with the paper's recipe, on the same real features.

    python -m benchmarks.measure.bench_fit                 # interleaved comparison, 10 minutes
    python -m benchmarks.measure.bench_fit --paper-full    # 1,000 epochs of the paper's recipe, 20 minutes per stage

CIFAR-10 ResNet-32 → ResNet-44, outputs of stages 2 and 3; 2,400 images to fit (the closed form selects its ridge on
300 of them), 600 held out. `--paper-full` writes the curve of held-out shares.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.paper import PublishedDisentangler, held_out_unexplained, train_epochs
from benchmarks.common.models import cifar10, cifar_features
from benchmarks.common.results import RESULTS, record, table
from knowiso_train import Disentangler

FIT_IMAGES, SELECT_IMAGES, REPORT_IMAGES, PAPER_EPOCHS = 2400, 300, 600, 1000


def features(stage: int) -> tuple[Tensor, Tensor]:
    images, _ = cifar10("train", FIT_IMAGES + REPORT_IMAGES)
    return cifar_features(32, images, stage), cifar_features(44, images, stage)


def fit_closed_form(order: int, x: Tensor, y: Tensor, seed: int) -> tuple[Disentangler, float]:
    """Fit a disentangler in closed form; return it and the seconds."""
    began = time.perf_counter()
    inner = FIT_IMAGES - SELECT_IMAGES
    maps = Disentangler(order=order, kernel_size=3, max_rows=10**6, seed=seed).fit(
        x[:inner], y[:inner], select=(x[inner:FIT_IMAGES], y[inner:FIT_IMAGES])
    )
    return maps, time.perf_counter() - began


def time_paper_epoch(epochs: int, x: Tensor, y: Tensor, seed: int) -> float:
    """Return the seconds of one epoch of the paper's recipe."""
    torch.manual_seed(seed)
    net, began = PublishedDisentangler(x.shape[1]), 0.0
    for epoch in train_epochs(net, x[:FIT_IMAGES], y[:FIT_IMAGES], seed=seed):
        if epoch == 0:  # the first one warms up
            began = time.perf_counter()
        if epoch == epochs:
            break
    return (time.perf_counter() - began) / epochs


def train_paper_network(stage: int, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Train the paper's network for 1,000 epochs and return its curve."""
    torch.manual_seed(0)
    net, curve, seconds, began = PublishedDisentangler(x.shape[1]), [], 0.0, time.perf_counter()
    for epoch in train_epochs(net, x[:FIT_IMAGES], y[:FIT_IMAGES], epochs=PAPER_EPOCHS):
        seconds += time.perf_counter() - began
        if epoch < 10 or epoch % 10 == 9:
            curve.append([epoch + 1, held_out_unexplained(net, x[FIT_IMAGES:], y[FIT_IMAGES:]), round(seconds, 1)])
            print(stage, *curve[-1], flush=True)
        began = time.perf_counter()
    return {
        "stage": stage,
        "curve (epoch, held-out unexplained, seconds)": curve,
        "best": min(u for _, u, _ in curve),
        "last": curve[-1][1],
    }


def compare_interleaved(stage: int, x: Tensor, y: Tensor, repeats: int, epochs: int) -> list[dict[str, Any]]:
    """Time both solvers interleaved and return the rows."""
    methods: dict[str, Callable[[int], tuple[Disentangler | None, float]]] = {
        f"closed form, K = {k}": lambda s, k=k: fit_closed_form(k, x, y, s) for k in (0, 1, 2)
    }
    methods["paper, K = 2, one epoch"] = lambda s: (None, time_paper_epoch(epochs, x, y, s))
    times: dict[str, list[float]] = {kind: [] for kind in methods}
    unexplained: dict[str, list[float]] = {kind: [] for kind in methods}
    for seed in range(repeats):
        for kind, run in methods.items():
            maps, seconds = run(seed)
            times[kind].append(seconds)
            if maps is not None:
                unexplained[kind].append(held_out_unexplained(maps, x[FIT_IMAGES:], y[FIT_IMAGES:]))
    paper_seconds = torch.tensor(times["paper, K = 2, one epoch"]).median().item() * PAPER_EPOCHS
    rows = []
    for kind in list(methods)[:-1]:
        seconds = torch.tensor(times[kind]).median().item()
        u = torch.tensor(unexplained[kind])
        rows.append(
            {
                "stage": stage,
                "what": kind,
                "held-out unexplained": float(u.mean()),
                "over seeds": f"{float(u.min()):.4f}..{float(u.max()):.4f}",
                "seconds": seconds,
                "faster than 1,000 epochs": paper_seconds / seconds,
            }
        )
    curves = RESULTS / "fit_rival_curve.json"
    best = (
        {f["stage"]: f["best"] for f in json.loads(curves.read_text())["figures"]}.get(stage, float("nan"))
        if curves.exists()
        else float("nan")
    )
    rows.append(
        {
            "stage": stage,
            "what": "paper, K = 2, 1,000 epochs",
            "held-out unexplained": best,
            "over seeds": "best epoch",
            "seconds": paper_seconds,
            "faster than 1,000 epochs": 1.0,
        }
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--paper-full", action="store_true", help="train the paper's network for 1,000 epochs and write its curve"
    )
    parser.add_argument("--repeats", type=int, default=3, help="interleaved repetitions, each with its own seed")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of the paper's network timed in each repetition")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for stage in (2, 3):
        x, y = features(stage)
        if args.paper_full:
            rows.append(train_paper_network(stage, x, y))
        else:
            rows += compare_interleaved(stage, x, y, args.repeats, args.epochs)
            print(table([row for row in rows if row["stage"] == stage]), flush=True)
    record(
        "fit_rival_curve" if args.paper_full else "fit",
        rows,
        task="CIFAR-10 ResNet-32 → ResNet-44, 3×3, 2,400 images fit, 600 held out",
    )


if __name__ == "__main__":
    main()
