"""Ranking test of similarity measures: orders of networks by a known property, as in the ReSi benchmark.

    python -m benchmarks.measure.bench_ranking             # an hour on one CPU core; resumes

ResNet-8 networks are trained on CIFAR-10 (`common/small_networks.py`). Six orderings are known:

- epoch: a checkpoint is the closer to the trained network of another seed, the later it is;
- label noise: a network is the closer to a network trained on clean labels, the lower its share of random labels;
- data: a network is the closer to one trained on 6,000 images, the more images it was trained on (equal steps);
- pruning: a network is the closer to the original, the fewer of its weights are set to zero (by magnitude);
- seed: two networks of equal initial weights are closer than two of different ones;
- half: two networks trained on one half of the images are closer than two trained on different halves.

Score of the first four: Spearman correlation of similarity and property. Score of the last two: probability that a
pair that shares seed or half is closer than one that does not, scaled to -1…1 (2 AUC - 1). All measures see the same
2,000 test images at the same layers; a score is the mean over layers and seeds, with the standard error over seeds.

The first comparison had six figures of ours and six rivals, each averaged over both directions. Three further figures
of ours (`VARIANTS`) were fixed before any of them was computed; nothing else was tried.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from benchmarks.common.models import cifar10
from benchmarks.common.results import RESULTS, record, table
from benchmarks.common.small_networks import Training, trained_network
from benchmarks.common.stats import mean_and_error, spearman
from knowiso_train import FeatureTaps, measure

LAYERS = ("layer1", "layer2", "layer3")
SEEDS = (0, 1, 2)
NOISE_LEVELS = (0.8, 0.6, 0.4, 0.2, 0.0)
NUM_IMAGES = (500, 1000, 2000, 4000, 6000)
SPARSITIES = (0.9, 0.8, 0.65, 0.5, 0.3)
CHECKPOINTS = (0, 1, 3, 5, 8, 11)
BASE = Training(num_checkpoints=12)
HALF_IMAGES = 3000
SIMILARITIES = ("cka", "procrustes", "r2", "pooled_cka", "pooled_procrustes", "pooled_r2")
ORDER = 1
POOLED, POOLED_SMALLER, POOLED_ABOVE_FLOOR = VARIANTS = (
    "explained, order 0, pooled",
    "explained, order 0, pooled, smaller of both directions",
    "explained, order 0, pooled, above the noise floor",
)


@dataclass(frozen=True)
class Variant:
    """Network of a ranking test: a training run, one of its checkpoints, and a share of weights set to zero."""

    training: Training
    checkpoint: int = -1
    sparsity: float = 0.0

    @property
    def key(self) -> str:
        """Text of all settings, equal in all versions of the benchmark."""
        return f"{self.training.folder.name},checkpoint={self.checkpoint},sparsity={self.sparsity}"


@dataclass(frozen=True)
class Comparison:
    """Pair of networks with the property that determines its rank: a higher value means a closer pair."""

    ordering: str
    group: int
    value: float
    reference: Variant
    variant: Variant

    @property
    def key(self) -> str:
        return f"{self.ordering}/{self.group}/{self.value}/{self.reference.key}/{self.variant.key}"


def comparisons() -> Iterator[Comparison]:
    """Yield the pairs of all orderings."""
    for seed in SEEDS:
        base, other = (replace(BASE, seed=s) for s in (seed, SEEDS[(seed + 1) % len(SEEDS)]))
        for checkpoint in CHECKPOINTS:
            yield Comparison("epoch", seed, checkpoint, Variant(other), Variant(base, checkpoint))
        for level in NOISE_LEVELS:
            noisy = replace(base, label_noise=level, num_checkpoints=1) if level else base
            yield Comparison("label noise", seed, -level, Variant(other), Variant(noisy))
        for count in NUM_IMAGES:
            fewer = replace(base, num_images=count, num_checkpoints=1) if count < BASE.num_images else base
            yield Comparison("data", seed, count, Variant(other), Variant(fewer))
        for sparsity in SPARSITIES:
            yield Comparison("pruning", seed, -sparsity, Variant(base), Variant(base, sparsity=sparsity))
        same = replace(base, order_seed=100 + seed, num_checkpoints=1)
        yield Comparison("seed", seed, 1.0, Variant(base), Variant(same))
        for third in SEEDS:
            if third != seed:
                yield Comparison("seed", seed, 0.0, Variant(replace(BASE, seed=third)), Variant(same))
        following = SEEDS[(seed + 1) % len(SEEDS)]
        for first, second in itertools.product((0, 1), (0, 1)):
            yield Comparison("half", seed, float(first == second), half_run(seed, first), half_run(following, second))


def half_run(seed: int, half: int) -> Variant:
    """Return the network of a seed that is trained on one half of the images."""
    return Variant(
        replace(
            BASE,
            seed=200 + seed + 10 * half,
            first_image=half * HALF_IMAGES,
            num_images=HALF_IMAGES,
            num_checkpoints=1,
        )
    )


def network(variant: Variant, data: tuple[torch.Tensor, torch.Tensor]) -> nn.Module:
    """Return the network of a variant."""
    model = trained_network(variant.training, *data, variant.checkpoint)
    if variant.sparsity:
        model = copy.deepcopy(model)
        weights = [(m, "weight") for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        prune.global_unstructured(weights, prune.L1Unstructured, amount=variant.sparsity)
        for module, name in weights:
            prune.remove(module, name)
    return model


def similarities(comparison: Comparison, data: Any, loader: DataLoader[Any]) -> dict[str, list[float]]:
    """Return every measure of a pair of networks as a list over layers, where higher means closer.

    The reference is the source and the target in turn; both directions are averaged.
    """
    report = measure(
        network(comparison.reference, data),
        network(comparison.variant, data),
        loader,
        list(LAYERS),
        order=ORDER,
        directions="both",
        noise_floor=False,
        bootstrap=0,
        functional=True,
        similarity=SIMILARITIES,
        progress=False,
    )
    rows = []
    for pair in report.pairs:
        row = {f"explained, orders 0..{k}": sum(pair.shares[: k + 1]) for k in range(ORDER + 1)}
        for k, functional in enumerate(pair.functional):
            row |= {f"functional agreement, orders 0..{k}": functional.agreement}
            row |= {f"functional KL, orders 0..{k}": -functional.kl}
        rows.append(row | {f"{name}": pair.similarity[name] for name in SIMILARITIES})
    half = len(LAYERS)
    return {name: [(rows[i][name] + rows[half + i][name]) / 2 for i in range(half)] for name in rows[0]}


@torch.no_grad()
def pooled_features(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """Return the output of each layer, averaged over the positions: one (N, C) each."""
    pooled: dict[str, list[torch.Tensor]] = {name: [] for name in LAYERS}
    with FeatureTaps(model, LAYERS) as taps:
        for batch in images.split(250):
            model(batch)
            features = taps.collect()
            for name in LAYERS:
                pooled[name].append(features[name].mean((2, 3)))
    return [torch.cat(pooled[name]) for name in LAYERS]


def variants(comparison: Comparison, pooled: Callable[[Variant], list[torch.Tensor]]) -> dict[str, list[float]]:
    """Return the declared variants of our measures as a list over layers, where higher means closer."""
    result: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for features in zip(pooled(comparison.reference), pooled(comparison.variant), strict=True):
        report = measure(
            nn.Sequential(nn.Identity()),
            nn.Sequential(nn.Identity()),
            DataLoader(TensorDataset(torch.stack(features, 1)), batch_size=250),
            "0",
            order=0,
            directions="both",
            bootstrap=0,
            source_transform=lambda x: x[:, 0],
            target_transform=lambda x: x[:, 1],
            progress=False,
        )
        explained = [1 - part.unexplained for part in report.pairs]
        floors = [part.noise_floor for part in report.pairs if part.noise_floor is not None]
        result[POOLED].append(sum(explained) / 2)
        result[POOLED_SMALLER].append(min(explained))
        above = [(share - floor) / (1 - floor) for share, floor in zip(explained, floors, strict=True)]
        result[POOLED_ABOVE_FLOOR].append(sum(above) / 2)
    return result


def score(ordering: str, values: list[float], similarity: list[float]) -> float:
    """Return the agreement of an ordering and a measure, from -1 to 1."""
    if ordering in ("seed", "half"):  # 2 AUC - 1
        close, distant = ([x for x, v in zip(similarity, values, strict=True) if v == flag] for flag in (1.0, 0.0))
        return float(np.mean([np.sign(a - b) for a in close for b in distant]))
    return spearman(values, similarity)


def score_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each measure with its score for every ordering."""
    orderings = list(dict.fromkeys(row["ordering"] for row in rows))
    result = []
    for name in rows[0]["similarities"]:
        line: dict[str, Any] = {"measure": name}
        for ordering in orderings:
            by_seed = []
            for seed in SEEDS:
                group = [row for row in rows if (row["ordering"], row["group"]) == (ordering, seed)]
                values = [row["value"] for row in group]
                by_seed.append(
                    np.mean(
                        [
                            score(ordering, values, [row["similarities"][name][i] for row in group])
                            for i in range(len(LAYERS))
                        ]
                    )
                )
            line[ordering] = mean_and_error(by_seed)
        result.append(line)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="test images of each comparison")
    parser.add_argument("--train-only", action="store_true", help="train the networks and stop")
    parser.add_argument("--name", default="ranking", help="results file")
    args = parser.parse_args()
    data, test = cifar10("train"), cifar10("test", args.images)
    pairs = list(comparisons())
    trainings = list(dict.fromkeys(v.training for pair in pairs for v in (pair.reference, pair.variant)))
    for training in tqdm(trainings, desc="train", unit="network"):
        trained_network(training, *data)
    if args.train_only:
        return
    path, settings = RESULTS / f"{args.name}.json", {"images": args.images, "order": ORDER}
    rows: list[dict[str, Any]] = []
    if path.exists():
        stored = json.loads(path.read_text())
        if stored["settings"] != settings:
            raise SystemExit(f"{path} holds a run with the settings {stored['settings']}; remove it, or choose --name")
        rows = stored["figures"]["rows"]
    finished = {row["key"]: row for row in rows}
    loader = DataLoader(TensorDataset(*test), batch_size=250)
    pooled = functools.cache(lambda variant: pooled_features(network(variant, data), test[0]))
    for pair in tqdm(pairs, desc="compare", unit="pair"):
        if pair.key not in finished:
            row = {"key": pair.key, "ordering": pair.ordering, "group": pair.group, "value": pair.value}
            rows.append(row | {"similarities": similarities(pair, data, loader)})
            finished[pair.key] = rows[-1]
        values = finished[pair.key]["similarities"]
        if not values.keys() >= set(VARIANTS):
            values |= variants(pair, pooled)
            record(args.name, {"rows": rows}, settings=settings)
    scores = score_rows(rows)
    print(table(scores))
    record(args.name, {"table": scores, "rows": rows}, settings=settings)


if __name__ == "__main__":
    main()
