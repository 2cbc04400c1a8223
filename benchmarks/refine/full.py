"""Sections `full` and `transfer` of bench_refine.py: finetuning of all weights from closed-form classifiers.

Few images per class are labeled; the rest of the training images is unlabeled (if all are labeled, they are also used
without labels). Tasks are in tasks.py. Each method takes the same steps of 32 images with crops and flips and frozen
batch-norm statistics, from the best closed-form classifier:

plain              from a ridge classifier, cross-entropy on 32 labeled images per step; every other method uses 16
                   labeled and 16 unlabeled ones
self-distillation  from the same classifier, with its own frozen probabilities on all images
ensemble           from the ridge classifier, with the mean probabilities of three, one on each network
self-training      ours without peers: from `consensus_head` of the network alone, with its probabilities
ours               from `consensus_head` with two peers, with the probabilities of the network's consensus head or the
                   mean of three
ours, labels       from `consensus_head` with two peers, 32 labeled images per step and nothing else
ours, features     as "ours" by `finetune_classifier`, as `ki.refine(method="consensus")` trains: the mean of three, and
                   the part of the features that peers reproduce

Probabilities are computed once, on unaugmented images. The last method computes them, and the peers' features, on the
augmented images.

Ridges, configurations and the temperature are chosen for each seed on the validation images, from equally many
settings for every classifier. Half of these have pseudo-labels with the class prior of the validation images. "as auto
chooses" is the best of the consensus head and the last methods on the validation images, as in `refine`. Learning rate
and weight are chosen on a tuning seed and the validation images, from four settings for every method. So is the choice
between one and three consensus heads. Test images are only reported on.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.stats import bootstrap_error, mean_and_error, pack_bits, unpack_bits
from benchmarks.refine.data import ALL_LABELS, SPLITS, draw_labeled, shuffled_epochs
from benchmarks.refine.tasks import LABELS_ONLY, Task
from knowiso_train.distillation import WeightSchedule
from knowiso_train.refinement._metrics import best_temperature
from knowiso_train.refinement.finetune import RefineFinetuneConfig, finetune_classifier
from knowiso_train.refinement.heads import (
    ConsensusFeatures,
    Head,
    HeadConfig,
    estimate_class_prior,
    pseudo_labels,
    ridge_head,
)
from knowiso_train.refinement.models import classifier_model

TUNING_LABELS, TUNING_SEED = 10, 1000  # settings of ten labels are used for all numbers
HALF_BATCH, CLIP, DECAY = 16, 1.0, 1e-4
# With and without class prior: equally many as HEAD_CONFIGS and LABEL_RIDGES
RIDGES = tuple(10.0 ** (e / 2) for e in range(-8, 9))
LABEL_RIDGES = (0.1, 1.0, 10.0)  # ridges of the classifiers from labels alone
AUTO_METHODS, AUTO_COLUMN = ("ours, labels", "ours, features"), "as auto chooses"
METHODS = ("plain", "self-distillation", "ensemble", "self-training", "ours", *AUTO_METHODS)
SLOW_METHOD, SLOW_LABELS = "ours, features", (10, 5)  # runs three networks in every step
CONSENSUS = "consensus head"
UNTRAINED_METHODS = ("ridge head", "self-training head", CONSENSUS, "three ridge heads", "three consensus heads")


def with_class_prior(configs: Sequence[HeadConfig], labels: Tensor, classes: int) -> list[HeadConfig]:
    """Return each configuration without a class prior and with that of the validation images."""
    class_prior = tuple(estimate_class_prior(labels, classes).tolist())
    return [replace(config, class_prior=prior) for config in configs for prior in (None, class_prior)]


def align_to_class_prior(head: Head, features: Tensor, config: HeadConfig) -> Head:
    """Add a bias for each class that aligns the pseudo-labels on `features` with the class prior."""
    scores = head(features)
    aligned = pseudo_labels(scores, config.inverse_temperature, torch.tensor(config.class_prior))
    # Equal up to a constant for each image, which does not change the prediction
    bias = (aligned.log() - config.inverse_temperature * scores).mean(0)
    return Head(config.inverse_temperature * head.weight, config.inverse_temperature * head.bias + bias, head.targets)


class FinetuneBenchmark:
    """Images, features and networks; holds what does not depend on the labels."""

    def __init__(self, task: Task, configs: Sequence[HeadConfig]) -> None:
        self.task, self.name = task, task.names[0]
        self.x = {name: task.features(name) for name in task.names}
        self.labels: dict[str, Tensor] = self.x[self.name]["labels"]
        self.configs = with_class_prior(configs, self.labels["validation"], task.classes)
        self.shipped = with_class_prior([HeadConfig()], self.labels["validation"], task.classes)[-1]
        train = {name: self.x[name]["train"] for name in task.names}
        self.consensus = {
            name: ConsensusFeatures.from_views([train[name], *(train[other] for other in task.names if other != name)])
            for name in task.names
        }
        self.alone = ConsensusFeatures.from_views([train[self.name]])
        self.images = {split: task.pixels(split) for split in SPLITS}
        self.networks = {name: task.network(name) for name in task.names}

    def heads(self, index: Tensor) -> dict[str, dict[str, Head]]:
        """Return ridge classifiers and consensus heads of every network, and the head without peers.

        Each is the best one on the validation images, with its temperature calibrated there.
        """
        labels, heads = self.labels["train"][index], {}
        for kind in ("ridge", "consensus"):
            heads[kind] = {
                name: self._select(self._candidates(kind, name, index, labels), name) for name in self.task.names
            }
        return heads | {
            "alone": {
                self.name: self._select(self._pseudo_label_heads(self.alone, self.name, index, labels), self.name)
            }
        }

    def _candidates(self, kind: str, name: str, index: Tensor, labels: Tensor) -> list[Head]:
        if kind == "consensus":
            return self._pseudo_label_heads(self.consensus[name], name, index, labels)
        plain = self._ridges(name, index, labels, RIDGES)
        return [*plain, *(align_to_class_prior(head, self.x[name]["train"], self.shipped) for head in plain)]

    def _ridges(self, name: str, index: Tensor, labels: Tensor, ridges: Sequence[float]) -> list[Head]:
        return [ridge_head(self.x[name]["train"][index], labels, self.task.classes, ridge) for ridge in ridges]

    def _pseudo_label_heads(self, consensus: ConsensusFeatures, name: str, index: Tensor, labels: Tensor) -> list[Head]:
        fitted = [consensus.head(index, labels, self.task.classes, config) for config in self.configs]
        return [*self._ridges(name, index, labels, LABEL_RIDGES), *fitted]

    def _select(self, heads: list[Head], name: str) -> Head:
        x, y = self.x[name]["validation"], self.labels["validation"]
        best = max(heads, key=lambda head: int((head(x).argmax(1) == y).sum()))
        return best.scaled(best_temperature(best(x), y))

    def mean_probabilities(self, heads: dict[str, Head], split: str) -> Tensor:
        """Return mean probabilities, (images, classes)."""
        return torch.stack([head(self.x[name][split]).softmax(1) for name, head in heads.items()]).mean(0)

    def train(
        self,
        method: str,
        heads: dict[str, dict[str, Head]],
        index: Tensor,
        seed: int,
        *,
        lr: float,
        weight: float,
        three: bool,
    ) -> nn.Module:
        """Return the network after the steps of the task.

        Batches and crops depend on the seed only.
        """
        if method == "ours, features":
            return self.with_features(heads["consensus"], index, seed, lr=lr, weight=weight)
        start_heads, steps = (
            heads[{"ours": "consensus", "ours, labels": "consensus", "self-training": "alone"}.get(method, "ridge")],
            self.task.steps,
        )
        target_heads = (
            start_heads if method == "ensemble" or (method == "ours" and three) else {self.name: start_heads[self.name]}
        )
        targets, model = self.mean_probabilities(target_heads, "train").float(), self.with_head(start_heads[self.name])
        for module in model.train().modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=DECAY, nesterov=True)
        schedule = WeightSchedule(warmup=steps // 10, total=steps + 1)
        labeled, unlabeled = (
            shuffled_epochs(index, 2 * HALF_BATCH * steps, seed),
            shuffled_epochs(self.others(index), HALF_BATCH * steps, seed + 1),
        )
        generator, num_labeled = (
            torch.Generator().manual_seed(seed),
            2 * HALF_BATCH if method in LABELS_ONLY else HALF_BATCH,
        )
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * schedule(step + 1)
            indices = torch.cat(
                [
                    labeled[num_labeled * step : num_labeled * (step + 1)],
                    unlabeled[HALF_BATCH * step : HALF_BATCH * (step + 1)],
                ]
            )[: 2 * HALF_BATCH]
            logits = model(self.task.augment(self.images["train"][indices], generator))
            loss = F.cross_entropy(
                logits[:num_labeled], self.labels["train"][indices[:num_labeled]]
            ) + weight * F.cross_entropy(logits, targets[indices])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
        return model.eval()

    def others(self, index: Tensor) -> Tensor:
        """Return the indices of training images without labels, or all if all are labeled."""
        unlabeled = torch.ones(len(self.labels["train"]), dtype=torch.bool)
        unlabeled[index] = False
        return (unlabeled if unlabeled.any() else ~unlabeled).nonzero().flatten()

    def with_head(self, head: Head) -> nn.Module:
        """Return a copy of the network with this classifier."""
        model = copy.deepcopy(self.networks[self.name])
        layer = nn.Linear(head.weight.shape[1], self.task.classes)
        with torch.no_grad():
            layer.weight.copy_(head.weight)
            layer.bias.copy_(head.bias)
        setattr(model, self.task.classifier, layer)
        return model

    def with_features(self, heads: dict[str, Head], index: Tensor, seed: int, *, lr: float, weight: float) -> nn.Module:
        """Train with the library's finetuning, on as many batches of the same size."""
        count = HALF_BATCH * (self.task.steps + 1)  # one more batch, from which the shapes are inferred
        labeled_order, unlabeled_order = (
            shuffled_epochs(index, count, seed),
            shuffled_epochs(self.others(index), count, seed + 1),
        )
        generator = torch.Generator().manual_seed(seed)
        labeled = [
            (self.task.augment(self.images["train"][part], generator), self.labels["train"][part])
            for part in labeled_order.split(HALF_BATCH)
        ]
        unlabeled = [
            self.task.augment(self.images["train"][part], generator) for part in unlabeled_order.split(HALF_BATCH)
        ]
        start, peers = (
            self.with_head(heads[self.name]),
            [classifier_model(self.networks[name], name) for name in self.task.names[1:]],
        )
        peer_heads = {
            i: partial(F.linear, weight=heads[p.name].weight.float(), bias=heads[p.name].bias.float())
            for i, p in enumerate(peers)
        }
        settings = RefineFinetuneConfig(
            steps=self.task.steps,
            lr=lr,
            consensus_weight=weight,
            weight_decay=DECAY,
            temperature=1.0,
            layers=self.task.layers,
            max_grad_norm=CLIP,
        )
        return finetune_classifier(
            start, classifier_model(start, self.name), peers, unlabeled, labeled, settings, heads=peer_heads
        )

    @torch.inference_mode()
    def correct(self, model: nn.Module, split: str) -> Tensor:
        """Return which images of a split are classified correctly."""
        predictions = torch.cat([model(self.task.normalize(x)).argmax(1) for x in torch.split(self.images[split], 64)])
        return predictions == self.labels[split]


def compare_finetuning(
    task: Task, seeds: int, configs: Sequence[HeadConfig], rows: list[dict[str, Any]], save: Any
) -> list[dict[str, Any]]:
    """Return a row for the tuning, and one for each number of labels and seed.

    Rows are saved after every training.
    """
    bench: FinetuneBenchmark | None = None
    if not rows:
        rows.append({"labels": TUNING_LABELS, "seed": TUNING_SEED, "tried": {}})
    for k, seed in [(TUNING_LABELS, TUNING_SEED), *((k, s) for k in task.labels for s in range(seeds))]:
        row = next((r for r in rows if r["labels"] == k and r["seed"] == seed), None)
        if row is None:
            rows.append(
                row := {"labels": k, "seed": seed, "accuracy": {}, "right": {}, "validation": {}, "seconds": {}}
            )
        if _complete(task, row):
            continue
        bench = bench or FinetuneBenchmark(task, configs)
        index = draw_labeled(bench.labels["train"], k, seed, task.classes)
        heads = bench.heads(index)
        if seed == TUNING_SEED:
            _tune(bench, heads, index, row, save)
            continue
        _record_untrained(bench, heads, row)
        for method in _trained_methods(task, k):
            if method not in row["accuracy"]:
                began = time.perf_counter()
                settings = {**rows[0]["chosen"][method], "three": rows[0]["three"]}
                model = bench.train(method, heads, index, seed, **settings)
                _record(row, method, bench.correct(model, "test"))
                row["validation"][method] = 100 * float(bench.correct(model, "validation").double().mean())
                row["seconds"][method] = round(time.perf_counter() - began)
                save()
        if task.auto:
            # max returns the first of equal ones, which is the simplest
            best = max((CONSENSUS, *AUTO_METHODS), key=row["validation"].__getitem__)
            row["accuracy"][AUTO_COLUMN], row["right"][AUTO_COLUMN], row["chosen"] = (
                row["accuracy"][best],
                row["right"][best],
                best,
            )
            save()
        print(
            f"{k} labels per class, seed {seed}:",
            {name: round(value, 1) for name, value in row["accuracy"].items()},
            row["seconds"],
            flush=True,
        )
    return rows


def _complete(task: Task, row: dict[str, Any]) -> bool:
    """Return whether a row has the results of all methods."""
    if row["seed"] == TUNING_SEED:
        return set(row.get("chosen", ())) >= set(_trained_methods(task, TUNING_LABELS))
    return set(row["accuracy"]) >= set(_columns(task, row["labels"]))


def _trained_methods(task: Task, labels: int) -> list[str]:
    return [
        method
        for method in METHODS
        if (method != SLOW_METHOD or labels in SLOW_LABELS) and (method != "ours, labels" or task.auto)
    ]


def _columns(task: Task, labels: int) -> list[str]:
    return [*UNTRAINED_METHODS, *_trained_methods(task, labels), *([AUTO_COLUMN] if task.auto else [])]


def _tune(
    bench: FinetuneBenchmark, heads: dict[str, dict[str, Head]], index: Tensor, row: dict[str, Any], save: Any
) -> None:
    y, consensus = bench.labels["validation"], heads["consensus"]
    num_correct = [
        int((bench.mean_probabilities(part, "validation").argmax(1) == y).sum())
        for part in ({bench.name: consensus[bench.name]}, consensus)
    ]
    row["three"] = num_correct[1] > num_correct[0]
    for method in _trained_methods(bench.task, TUNING_LABELS):
        tried = row["tried"].setdefault(method, [])
        for settings in bench.task.grid(method)[len(tried) :]:
            model = bench.train(method, heads, index, TUNING_SEED, **settings, three=row["three"])
            tried.append([100 * float(bench.correct(model, "validation").double().mean()), settings])
            save()
            print("tuning", method, tried[-1], flush=True)
    row["chosen"] = {method: max(tried, key=lambda item: item[0])[1] for method, tried in row["tried"].items()}
    save()


def _record_untrained(bench: FinetuneBenchmark, heads: dict[str, dict[str, Head]], row: dict[str, Any]) -> None:
    ridge, consensus = heads["ridge"], heads["consensus"]
    parts = ({bench.name: ridge[bench.name]}, heads["alone"], {bench.name: consensus[bench.name]}, ridge, consensus)
    for name, part in zip(UNTRAINED_METHODS, parts, strict=True):
        _record(row, name, bench.mean_probabilities(part, "test").argmax(1) == bench.labels["test"])
        row["validation"][name] = 100 * float(
            (bench.mean_probabilities(part, "validation").argmax(1) == bench.labels["validation"]).double().mean()
        )


def _record(row: dict[str, Any], name: str, correct: Tensor) -> None:
    row["accuracy"][name] = 100 * float(correct.double().mean())
    row["right"][name] = pack_bits(correct)


def finetuning_table(task: Task, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean accuracy, and paired differences to three baselines.

    Standard errors are over seeds, and bootstrapped over test images.
    """
    lines = []
    for k in task.labels:
        final_rows = [row for row in rows if row["labels"] == k and row["seed"] != TUNING_SEED and _complete(task, row)]
        if len(final_rows) < 2:
            continue
        correct = {
            name: torch.stack([unpack_bits(row["right"][name], task.num_test_images) for row in final_rows])
            for name in _columns(task, k)
        }
        for name, method_correct in correct.items():
            line: dict[str, Any] = {
                "labels": "all" if k == ALL_LABELS else k,
                "method": name,
                "seeds": len(method_correct),
                "top-1 %": round(100 * float(method_correct.mean()), 2),
            }
            for other in ("plain", "ensemble", "self-training"):
                gap = 100 * (method_correct - correct[other])
                line[f"over {other}"] = mean_and_error(gap.mean(1).tolist(), signed=True)
                line[f"over {other}, over images"] = f"± {bootstrap_error(gap.mean(0)):.2f}"
            lines.append(line)
    return lines
