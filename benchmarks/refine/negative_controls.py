"""Sections `harm` and `paper` of bench_refine.py: useless peers, and the published composite."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.models import cifar10
from benchmarks.common.stats import mean_and_error
from benchmarks.refine.cifar import LABELED, Batches, accuracy, train_network
from benchmarks.refine.data import NUM_CLASSES, draw_labeled, features
from knowiso_train import measure
from knowiso_train.errors import KnowisoWarning
from knowiso_train.refinement._composite import Composite, train_after
from knowiso_train.refinement.api import refine

LAYERS, ORDER, PAPER_STEPS, PAPER_LR = ("layer2", "layer3"), 2, 100, 0.003
LABELS_PER_CLASS = 5


class FeatureSlice(nn.Module):
    """Network whose features are a slice of its input, which holds the features of all networks."""

    def __init__(self, start: int, width: int) -> None:
        super().__init__()
        self.start, self.width = start, width
        self.fc = nn.Linear(width, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x[:, self.start : self.start + self.width])


def compare_useless_peers(
    seeds: int, useless: tuple[str, ...], rows: list[dict[str, Any]], save: Any
) -> list[dict[str, Any]]:
    """Run `refine(method="auto")` with lite1, with lite1 and a useless peer, and with the useless peer alone.

    Rows hold the accuracy of the refined network.
    """
    names = ("lite0", "lite1", *useless)
    data = {name: features(name) for name in names}
    labels = data["lite0"]["labels"]
    x = {split: torch.cat([data[name][split] for name in names], 1) for split in ("train", "validation", "test")}
    start, nets = 0, {}
    for name in names:
        torch.manual_seed(0)
        nets[name] = FeatureSlice(start, data[name]["train"].shape[1])
        start += nets[name].width
    groups = [("lite1",), *((bad,) for bad in useless), *(("lite1", bad) for bad in useless)]
    for seed in range(seeds):
        labeled = draw_labeled(labels["train"], LABELS_PER_CLASS, seed)
        for peers in groups:
            if any(row["seed"] == seed and row["peers"] == list(peers) for row in rows):
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", KnowisoWarning)
                shuffled = torch.randperm(len(x["train"]), generator=torch.Generator().manual_seed(seed))
                report = refine(
                    nets["lite0"],
                    [nets[name] for name in peers],
                    x["train"][shuffled].split(512),
                    labeled=[(x["train"][labeled], labels["train"][labeled])],
                    validation=[(x["validation"], labels["validation"])],
                    test=[(x["test"], labels["test"])],
                    names=["lite0", *peers],
                    progress=False,
                    seed=seed,
                ).report
            useful = [peer.name for peer in report.peers if peer.useful]
            row = {"seed": seed, "peers": list(peers), "useful": useful, "chosen": report.chosen}
            rows.append(row | {"accuracy": report.row("after").test.accuracy})
            save()
            print(rows[-1], flush=True)
    return rows


def useless_peers_table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean accuracy by group of peers, and the paired difference to lite1 alone."""
    base = {row["seed"]: row["accuracy"] for row in rows if row["peers"] == ["lite1"]}
    table_rows = []
    for peers in dict.fromkeys(tuple(row["peers"]) for row in rows):
        group_rows = [row for row in rows if row["peers"] == list(peers) and row["seed"] in base]
        gaps = [row["accuracy"] - base[row["seed"]] for row in group_rows]
        table_rows.append(
            {
                "peers": " + ".join(peers),
                "found useful": ", ".join(group_rows[0]["useful"]) or "none",
                "top-1 %": round(sum(row["accuracy"] for row in group_rows) / len(group_rows), 2),
                "over lite1 alone": mean_and_error(gaps, signed=True),
            }
        )
    return table_rows


def compare_composites(seeds: int, rows: list[dict[str, Any]], save: Any) -> list[dict[str, Any]]:
    """Replace a layer of ResNet-8 by components that another seed's network explains, without augmentation.

    The orders are 0, 0 and 1, and 0 to 2. The control is the same training on the network's own features.
    """
    images, labels = cifar10("train")
    test = cifar10("test", 5000)
    for seed in range(seeds):
        if any(row["seed"] == seed for row in rows):
            continue
        order = torch.randperm(10000, generator=torch.Generator().manual_seed(seed))
        labeled = images[order[:LABELED]], labels[order[:LABELED]]
        nets = [train_network(labeled, 10 * seed + i, False) for i in range(2)]
        row: dict[str, Any] = {"seed": seed, "start": accuracy(nets[0], *test)}
        for layer in LAYERS:
            report = measure(
                nets[1],
                nets[0],
                labeled[0].split(250),
                [(layer, layer)],
                order=ORDER,
                max_rows=32_768,
                noise_floor=False,
                bootstrap=0,
                progress=False,
            )
            row[f"{layer}, shares"] = [round(share, 3) for share in report.pairs[0].shares]
            plain = copy.deepcopy(nets[0])
            train_after(plain, plain, layer, Batches(*labeled, seed, False), steps=PAPER_STEPS, lr=PAPER_LR)
            row[f"{layer}, own features"] = accuracy(plain, *test)
            for orders in range(ORDER + 1):
                composite = Composite(nets[0], layer, nets[1], layer, report.pairs[0].disentangler.float(), orders)
                train_after(
                    composite, composite.model, layer, Batches(*labeled, seed, False), steps=PAPER_STEPS, lr=PAPER_LR
                )
                row[f"{layer}, orders 0…{orders}"] = accuracy(composite, *test)
        rows.append(row)
        save()
        print(row, flush=True)
    return rows


def composites_table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean accuracy, and the paired difference to the same training on own features."""
    table_rows = []
    for layer in LAYERS:
        for name in ("own features", *(f"orders 0…{k}" for k in range(ORDER + 1))):
            accuracies = [row[f"{layer}, {name}"] for row in rows]
            line = {"layer": layer, "handed on": name, "top-1 %": round(sum(accuracies) / len(accuracies), 2)}
            table_rows.append(
                line
                | {
                    "over own features": mean_and_error(
                        [row[f"{layer}, {name}"] - row[f"{layer}, own features"] for row in rows], signed=True
                    )
                }
            )
    return table_rows
