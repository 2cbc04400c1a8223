"""Sections `compare_useless_peers` and `compare_composites` of bench_refine.py: useless peers through `refine` itself, and the published composite in its own regime."""

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
from knowiso_train.refinement.api import refine
from knowiso_train.refinement.composite import Composite, train_after

LAYERS, ORDER, PAPER_STEPS, PAPER_LR = ("layer2", "layer3"), 2, 100, 0.003
LABELS_PER_CLASS = 5


class FeatureSlice(nn.Module):
    """A network whose pooled features are kept: it is called on the features of all networks side by side."""

    def __init__(self, start: int, width: int) -> None:
        super().__init__()
        self.start, self.width = start, width
        self.fc = nn.Linear(width, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x[:, self.start : self.start + self.width])


def compare_useless_peers(
    seeds: int, useless: tuple[str, ...], kept: list[dict[str, Any]], save: Any
) -> list[dict[str, Any]]:
    """`refine(method="auto")` with lite1, with lite1 and a useless peer, and with the useless peer alone: accuracy of what it gives back."""
    names = ("lite0", "lite1", *useless)
    data = {name: features(name) for name in names}
    labels = data["lite0"]["labels"]
    x = {split: torch.cat([data[name][split] for name in names], 1) for split in ("train", "validation", "test")}
    starts, nets = 0, {}
    for name in names:
        torch.manual_seed(0)
        nets[name] = FeatureSlice(starts, data[name]["train"].shape[1])
        starts += nets[name].width
    groups = [("lite1",), *((bad,) for bad in useless), *(("lite1", bad) for bad in useless)]
    for seed in range(seeds):
        few = draw_labeled(labels["train"], LABELS_PER_CLASS, seed)
        for peers in groups:
            if any(row["seed"] == seed and row["peers"] == list(peers) for row in kept):
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", KnowisoWarning)
                shuffled = torch.randperm(len(x["train"]), generator=torch.Generator().manual_seed(seed))
                report = refine(
                    nets["lite0"], [nets[name] for name in peers], x["train"][shuffled].split(512),
                    labeled=[(x["train"][few], labels["train"][few])], validation=[(x["validation"], labels["validation"])],
                    test=[(x["test"], labels["test"])], names=["lite0", *peers], progress=False, seed=seed,
                ).report  # fmt: skip
            useful = [found.name for found in report.peers if found.useful]
            row = {"seed": seed, "peers": list(peers), "useful": useful, "chosen": report.chosen}
            kept.append(row | {"accuracy": report.row("after").test.accuracy})
            save()
            print(kept[-1], flush=True)
    return kept


def useless_peers_table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean accuracy by group of peers, and the paired difference to lite1 alone."""
    base = {row["seed"]: row["accuracy"] for row in rows if row["peers"] == ["lite1"]}
    found = []
    for peers in dict.fromkeys(tuple(row["peers"]) for row in rows):
        own = [row for row in rows if row["peers"] == list(peers) and row["seed"] in base]
        gaps = [row["accuracy"] - base[row["seed"]] for row in own]
        found.append(
            {
                "peers": " + ".join(peers),
                "found useful": ", ".join(own[0]["useful"]) or "none",
                "top-1 %": round(sum(row["accuracy"] for row in own) / len(own), 2),
                "over lite1 alone": mean_and_error(gaps, signed=True),
            }
        )
    return found


def compare_composites(seeds: int, kept: list[dict[str, Any]], save: Any) -> list[dict[str, Any]]:
    """ResNet-8 without augmentation: its layer rebuilt from another seed's, orders 0, 0+1, 0+1+2; and the same training on its own features."""
    images, labels = cifar10("train")
    test = cifar10("test", 5000)
    for seed in range(seeds):
        if any(row["seed"] == seed for row in kept):
            continue
        order = torch.randperm(10000, generator=torch.Generator().manual_seed(seed))
        known = images[order[:LABELED]], labels[order[:LABELED]]
        nets = [train_network(known, 10 * seed + i, False) for i in range(2)]
        row: dict[str, Any] = {"seed": seed, "start": accuracy(nets[0], *test)}
        for layer in LAYERS:
            report = measure(
                nets[1], nets[0], known[0].split(250), [(layer, layer)], order=ORDER, max_rows=32_768, noise_floor=False, bootstrap=0, progress=False
            )  # fmt: skip
            row[f"{layer}, shares"] = [round(share, 3) for share in report.pairs[0].shares]
            plain = copy.deepcopy(nets[0])
            train_after(plain, plain, layer, Batches(*known, seed, False), steps=PAPER_STEPS, lr=PAPER_LR)
            row[f"{layer}, own features"] = accuracy(plain, *test)
            for orders in range(ORDER + 1):
                composite = Composite(nets[0], layer, nets[1], layer, report.pairs[0].disentangler.float(), orders)
                train_after(
                    composite, composite.model, layer, Batches(*known, seed, False), steps=PAPER_STEPS, lr=PAPER_LR
                )
                row[f"{layer}, orders 0…{orders}"] = accuracy(composite, *test)
        kept.append(row)
        save()
        print(row, flush=True)
    return kept


def composites_table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean accuracy, and the paired difference to the same training on the network's own features."""
    found = []
    for layer in LAYERS:
        for name in ("own features", *(f"orders 0…{k}" for k in range(ORDER + 1))):
            own = [row[f"{layer}, {name}"] for row in rows]
            line = {"layer": layer, "handed on": name, "top-1 %": round(sum(own) / len(own), 2)}
            found.append(
                line
                | {
                    "over own features": mean_and_error(
                        [row[f"{layer}, {name}"] - row[f"{layer}, own features"] for row in rows], signed=True
                    )
                }
            )
    return found
