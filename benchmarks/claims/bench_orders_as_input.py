"""Claim: the consistent features of orders 0, 0 + 1 and 0 + 1 + 2 are an ever better input of the rest of the network.

    python -m benchmarks.claims.bench_orders_as_input  # 4 minutes on one CPU core; resumes

Pairs of CIFAR-10 networks explain each other's `layer2` and `layer3` by 1×1 maps of order 2: two pairs of public
networks by two authors, and three pairs of ResNet-8 trained here on 6,000 images from different seeds. The part of
orders 0…k then replaces the feature, and the rest of the explained network, unchanged, classifies it: top-1 on 40 % of
2,000 test images, the others to fit and select. The paper trains that rest again.
"""

from __future__ import annotations

import argparse
from functools import partial
from statistics import fmean
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import knowiso_train as ki
from benchmarks.claims.bench_compression import small_network
from benchmarks.claims.bench_strength import NETWORKS, transform
from benchmarks.claims.common import SEEDS, ClaimResults, judge
from benchmarks.common import models
from benchmarks.common.stats import mean_and_error

PUBLIC_PAIRS = (("A-20", "B-14"), ("A-32", "B-8"))
LAYERS = ("layer2", "layer3")
ORDER, TEST_IMAGES, BATCH_IMAGES, SPLIT = 2, 2000, 125, (0.5, 0.1, 0.4)
MAX_ROWS = 40_000  # positions that orders 1 and 2 are fitted on
SECTION = "4, feature refinement"


def network(name: str) -> nn.Module:
    """Return a public network, or the ResNet-8 of a seed."""
    if name in NETWORKS:
        return NETWORKS[name]()
    return small_network(int(name.rpartition(" ")[2]))


def figures(source: str, target: str) -> dict[str, Any]:
    """Return the figures of a pair of networks in both directions, by explained network and layer."""
    pixels, labels = models.cifar_bytes("cifar10", "test", TEST_IMAGES)
    report = ki.measure(
        network(source),
        network(target),
        DataLoader(TensorDataset(pixels.float() / 255, labels), batch_size=BATCH_IMAGES),
        list(LAYERS),
        order=ORDER,
        directions="both",
        functional=True,
        split=SPLIT,
        noise_floor=False,
        bootstrap=0,
        max_rows=MAX_ROWS,
        source_transform=transform(source if source in NETWORKS else "A"),
        target_transform=transform(target if target in NETWORKS else "A"),
        progress=False,
    )
    result: dict[str, Any] = {}
    for pair in report.pairs:
        explained = target if pair.direction == "forward" else source
        own, residual = pair.target_output, pair.residual_only
        result.setdefault(explained, {})[pair.target] = {
            "own": own and own.top1,
            "orders": [part.top1 for part in pair.functional],
            "residual": residual and residual.top1,
            "shares": pair.shares,
            "unexplained": pair.unexplained,
        }
    return {"explained": result}


def mean_difference(layers: dict[str, Any], k: int, other: int) -> float:
    """Return the rise of top-1 from orders 0…other to orders 0…k in points, mean over the layers."""
    return fmean(100 * (entry["orders"][k] - entry["orders"][other]) for entry in layers.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="claims_orders_as_input", help="results file")
    args = parser.parse_args()
    small = [(f"ResNet-8, seed {SEEDS[i - 1]}", f"ResNet-8, seed {seed}") for i, seed in enumerate(SEEDS)]
    settings = {"pairs": [*PUBLIC_PAIRS, *small], "layers": LAYERS, "order": ORDER, "images": TEST_IMAGES}
    results = ClaimResults(args.name, settings)
    rows, replicates = [], []
    for source, target in (*PUBLIC_PAIRS, *small):
        explained = results.row(partial(figures, source, target), source=source, target=target)["explained"]
        for name, layers in explained.items():
            replicates.append(layers)
            for layer, entry in layers.items():
                rows.append(
                    {
                        "network": name,
                        "explained from": source if name == target else target,
                        "layer": layer,
                        "own top-1": 100 * entry["own"],
                        **{f"orders 0…{k}": 100 * top1 for k, top1 in enumerate(entry["orders"])},
                        "residual": 100 * entry["residual"],
                        "unexplained": 100 * entry["unexplained"],
                    }
                )
    rises = [
        [fmean(100 * (e["orders"][k + 1] - e["orders"][k]) for e in r.values()) for r in replicates] for k in (0, 1)
    ]
    excess = [fmean(100 * (entry["orders"][-1] - entry["own"]) for entry in r.values()) for r in replicates]
    claims = [
        judge(
            f"Accuracy rises when order {k + 1} is added to the input",
            rises[k],
            section=SECTION,
            measured=f"top-1 with orders 0…{k + 1} minus top-1 with orders 0…{k}, points, by explained network",
        )
        for k in (0, 1)
    ]
    claims.append(
        judge(
            "Consistent features of orders 0…2 classify better than the raw features",
            excess,
            section=SECTION,
            measured="top-1 with orders 0…2 minus the network's own top-1, points, by explained network",
        )
    )
    public = 2 * len(PUBLIC_PAIRS)
    groups = {"public networks": replicates[:public], "ResNet-8": replicates[public:]}
    summary = [
        {
            "networks": name,
            "layer": layer,
            "own top-1": mean_and_error([100 * r[layer]["own"] for r in group]),
            **{f"orders 0…{k}": mean_and_error([100 * r[layer]["orders"][k] for r in group]) for k in range(ORDER + 1)},
            "residual alone": mean_and_error([100 * r[layer]["residual"] for r in group]),
            "unexplained": mean_and_error([100 * r[layer]["unexplained"] for r in group]),
        }
        for name, group in groups.items()
        for layer in LAYERS
    ]
    results.finish(claims, summary, pairs=rows)


if __name__ == "__main__":
    main()
