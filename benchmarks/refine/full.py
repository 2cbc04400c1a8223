"""Sections `compare_finetuning` and `transfer` of bench_refine.py: every weight trained on few labeled images, from classifiers in closed form.

Some images per class with labels, the rest of the training images without (tasks in refine_tasks.py; where all have
labels, they are all of them once
more, without). Each way takes the same steps of 32 images,
crops and flips, batch norm's statistics frozen, from the best classifier in closed form:

plain              from a ridge classifier, cross-entropy: 32 labeled images a step; every other way sees 16 of them
and 16 unlabeled ones
self-distillation  from the same classifier, and its own frozen probabilities on all images
ensemble           from the ridge classifier, and the mean probabilities of three of them, one on each network
self-training      from `consensus_head` of the network alone, which guesses the unlabeled images' labels, and its
probabilities: ours without peers
ours               from `consensus_head` with the two peers, and the probabilities of consensus heads on all images, the
network's or three's mean
ours, labels       from `consensus_head` with the two peers, 32 labeled images a step and nothing else
ours, features     as "ours" by `finetune_classifier`, as `ki.refine(method="consensus")` trains: three's mean, and the part of
its features that peers know

Probabilities are those on the clean images, made once; the last way takes them, and the peers' features, from the
images as the network sees them.
Ridges and recipes are chosen for each seed on the validation images, from as many settings for every classifier, and
its temperature too: half of
them with guesses in the classes' proportions among the validation images, the labels' own classifiers among those with
guesses, as in `refine`.
"as auto chooses" trains nothing: of the consensus head and the last ways the best on the validation images, for each
seed, as `refine` takes it.
Learning rate and weight are chosen on a tuning seed and the validation images, from four settings for every way, and so
is who teaches ours.
Test images are only reported on.
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
from knowiso_train.refinement.finetune import RefineFinetuneConfig, finetune_classifier
from knowiso_train.refinement.heads import (
    ConsensusFeatures,
    Head,
    HeadConfig,
    estimate_class_prior,
    pseudo_labels,
    ridge_head,
)
from knowiso_train.refinement.metrics import best_temperature
from knowiso_train.refinement.models import classifier_model

TUNING_LABELS, TUNING_SEED = 10, 1000  # other numbers of labels per class are trained with the settings of ten
HALF_BATCH, CLIP, DECAY = 16, 1.0, 1e-4
# As they are and in proportion: as many as there are recipes and ALONE
RIDGES = tuple(10.0 ** (e / 2) for e in range(-8, 9))
LABEL_RIDGES = (0.1, 1.0, 10.0)  # ridges of the labels' own classifiers, where nothing else of these is chosen
AUTO_METHODS, AUTO_COLUMN = ("ours, labels", "ours, features"), "as auto chooses"
METHODS = ("plain", "self-distillation", "ensemble", "self-training", "ours", *AUTO_METHODS)
SLOW_METHOD, SLOW_LABELS = "ours, features", (10, 5)  # three networks run in every step of it
CONSENSUS = "consensus head"
UNTRAINED_METHODS = ("ridge head", "self-training head", CONSENSUS, "three ridge heads", "three consensus heads")


def with_class_prior(recipes: Sequence[HeadConfig], labels: Tensor, classes: int) -> list[HeadConfig]:
    """Each with guesses as they are, and in the proportions of the validation images."""
    shares = tuple(estimate_class_prior(labels, classes).tolist())
    return [replace(recipe, class_prior=known) for recipe in recipes for known in (None, shares)]


def align_to_class_prior(head: Head, features: Tensor, recipe: HeadConfig) -> Head:
    """The classifier with a bias for each class that brings its guesses on `features` to the recipe's shares."""
    scores = head(features)
    alike = pseudo_labels(scores, recipe.inverse_temperature, torch.tensor(recipe.class_prior))
    # Up to a number for each image, which decides nothing
    bias = (alike.log() - recipe.inverse_temperature * scores).mean(0)
    return Head(recipe.inverse_temperature * head.weight, recipe.inverse_temperature * head.bias + bias, head.targets)


class FinetuneBenchmark:
    """Images, features and the network; what does not depend on the labels is made once."""

    def __init__(self, task: Task, recipes: Sequence[HeadConfig]) -> None:
        self.task, self.own = task, task.names[0]
        self.x = {name: task.features(name) for name in task.names}
        self.labels: dict[str, Tensor] = self.x[self.own]["labels"]
        self.recipes = with_class_prior(recipes, self.labels["validation"], task.classes)
        self.shipped = with_class_prior([HeadConfig()], self.labels["validation"], task.classes)[-1]
        train = {name: self.x[name]["train"] for name in task.names}
        self.consensus = {
            name: ConsensusFeatures.from_views([train[name], *(train[other] for other in task.names if other != name)])
            for name in task.names
        }
        self.alone = ConsensusFeatures.from_views([train[self.own]])
        self.images = {split: task.pixels(split) for split in SPLITS}
        self.networks = {name: task.network(name) for name in task.names}

    def heads(self, index: Tensor) -> dict[str, dict[str, Head]]:
        """Ridge classifiers and consensus heads of every network, and the head without peers: the best on the validation images, calibrated there."""
        labels, found = self.labels["train"][index], {}
        for kind in ("ridge", "consensus"):
            found[kind] = {name: self._best(self._tried(kind, name, index, labels), name) for name in self.task.names}
        return found | {"alone": {self.own: self._best(self._guessing(self.alone, self.own, index, labels), self.own)}}

    def _tried(self, kind: str, name: str, index: Tensor, labels: Tensor) -> list[Head]:
        if kind == "consensus":
            return self._guessing(self.consensus[name], name, index, labels)
        plain = self._ridges(name, index, labels, RIDGES)
        return [*plain, *(align_to_class_prior(head, self.x[name]["train"], self.shipped) for head in plain)]

    def _ridges(self, name: str, index: Tensor, labels: Tensor, ridges: Sequence[float]) -> list[Head]:
        return [ridge_head(self.x[name]["train"][index], labels, self.task.classes, ridge) for ridge in ridges]

    def _guessing(self, consensus: ConsensusFeatures, name: str, index: Tensor, labels: Tensor) -> list[Head]:
        fitted = [consensus.head(index, labels, self.task.classes, recipe) for recipe in self.recipes]
        return [*self._ridges(name, index, labels, LABEL_RIDGES), *fitted]

    def _best(self, heads: list[Head], name: str) -> Head:
        x, y = self.x[name]["validation"], self.labels["validation"]
        chosen = max(heads, key=lambda head: int((head(x).argmax(1) == y).sum()))
        return chosen.scaled(best_temperature(chosen(x), y))

    def told(self, heads: dict[str, Head], split: str) -> Tensor:
        """Mean probabilities (images, classes)."""
        return torch.stack([head(self.x[name][split]).softmax(1) for name, head in heads.items()]).mean(0)

    def trained(
        self,
        way: str,
        heads: dict[str, dict[str, Head]],
        index: Tensor,
        seed: int,
        *,
        lr: float,
        weight: float,
        three: bool,
    ) -> nn.Module:
        """The network after the task's steps; batches and crops depend on the seed alone."""
        if way == "ours, features":
            return self.with_features(heads["consensus"], index, seed, lr=lr, weight=weight)
        own, steps = (
            heads[{"ours": "consensus", "ours, labels": "consensus", "self-training": "alone"}.get(way, "ridge")],
            self.task.steps,
        )
        taught = own if way == "ensemble" or (way == "ours" and three) else {self.own: own[self.own]}
        targets, model = self.told(taught, "train").float(), self.with_head(own[self.own])
        for module in model.train().modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=DECAY, nesterov=True)
        schedule = WeightSchedule(warmup=steps // 10, total=steps + 1)
        known, others = (
            shuffled_epochs(index, 2 * HALF_BATCH * steps, seed),
            shuffled_epochs(self.others(index), HALF_BATCH * steps, seed + 1),
        )
        generator, few = torch.Generator().manual_seed(seed), 2 * HALF_BATCH if way in LABELS_ONLY else HALF_BATCH
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * schedule(step + 1)
            which = torch.cat(
                [known[few * step : few * (step + 1)], others[HALF_BATCH * step : HALF_BATCH * (step + 1)]]
            )[: 2 * HALF_BATCH]
            logits = model(self.task.changed(self.images["train"][which], generator))
            loss = F.cross_entropy(logits[:few], self.labels["train"][which[:few]]) + weight * F.cross_entropy(
                logits, targets[which]
            )
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
        return model.eval()

    def others(self, index: Tensor) -> Tensor:
        """Training images without labels, where those at `index` have them; all where all have."""
        rest = torch.ones(len(self.labels["train"]), dtype=torch.bool)
        rest[index] = False
        return (rest if rest.any() else ~rest).nonzero().flatten()

    def with_head(self, head: Head) -> nn.Module:
        """A copy of the network with this classifier."""
        model = copy.deepcopy(self.networks[self.own])
        layer = nn.Linear(head.weight.shape[1], self.task.classes)
        with torch.no_grad():
            layer.weight.copy_(head.weight)
            layer.bias.copy_(head.bias)
        setattr(model, self.task.classifier, layer)
        return model

    def with_features(self, heads: dict[str, Head], index: Tensor, seed: int, *, lr: float, weight: float) -> nn.Module:
        """The library's own training, on as many batches of as many images."""
        count = HALF_BATCH * (self.task.steps + 1)  # fine_tune looks at one batch more, to learn the shapes
        known, others = shuffled_epochs(index, count, seed), shuffled_epochs(self.others(index), count, seed + 1)
        generator = torch.Generator().manual_seed(seed)
        few = [
            (self.task.changed(self.images["train"][part], generator), self.labels["train"][part])
            for part in known.split(HALF_BATCH)
        ]
        many = [self.task.changed(self.images["train"][part], generator) for part in others.split(HALF_BATCH)]
        start, peers = (
            self.with_head(heads[self.own]),
            [classifier_model(self.networks[name], name) for name in self.task.names[1:]],
        )
        say = {
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
        return finetune_classifier(start, classifier_model(start, self.own), peers, many, few, settings, heads=say)

    @torch.inference_mode()
    def right(self, model: nn.Module, split: str) -> Tensor:
        """Which images of a split it gets right."""
        guessed = torch.cat([model(self.task.normalized(x)).argmax(1) for x in torch.split(self.images[split], 64)])
        return guessed == self.labels[split]


def compare_finetuning(
    task: Task, seeds: int, recipes: Sequence[HeadConfig], kept: list[dict[str, Any]], save: Any
) -> list[dict[str, Any]]:
    """A row for the tuning, and one for each number of labels and seed; kept after every training."""
    bench: FinetuneBenchmark | None = None
    if not kept:
        kept.append({"labels": TUNING_LABELS, "seed": TUNING_SEED, "tried": {}})
    for k, seed in [(TUNING_LABELS, TUNING_SEED), *((k, s) for k in task.labels for s in range(seeds))]:
        row = next((r for r in kept if r["labels"] == k and r["seed"] == seed), None)
        if row is None:
            kept.append(
                row := {"labels": k, "seed": seed, "accuracy": {}, "right": {}, "validation": {}, "seconds": {}}
            )
        if _complete(task, row):
            continue
        bench = bench or FinetuneBenchmark(task, recipes)
        index = draw_labeled(bench.labels["train"], k, seed, task.classes)
        heads = bench.heads(index)
        if seed == TUNING_SEED:
            _tune(bench, heads, index, row, save)
            continue
        _record_untrained(bench, heads, row)
        for way in _trained_methods(task, k):
            if way not in row["accuracy"]:
                began = time.perf_counter()
                settings = {**kept[0]["chosen"][way], "three": kept[0]["three"]}
                done = bench.trained(way, heads, index, seed, **settings)
                _record(row, way, bench.right(done, "test"))
                row["validation"][way] = 100 * float(bench.right(done, "validation").double().mean())
                row["seconds"][way] = round(time.perf_counter() - began)
                save()
        if task.auto:
            # Of equal ones the first, which is the simplest
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
    return kept


def _complete(task: Task, row: dict[str, Any]) -> bool:
    """A way that is added later is tuned and judged then."""
    if row["seed"] == TUNING_SEED:
        return set(row.get("chosen", ())) >= set(_trained_methods(task, TUNING_LABELS))
    return set(row["accuracy"]) >= set(_columns(task, row["labels"]))


def _trained_methods(task: Task, labels: int) -> list[str]:
    return [
        way for way in METHODS if (way != SLOW_METHOD or labels in SLOW_LABELS) and (way != "ours, labels" or task.auto)
    ]


def _columns(task: Task, labels: int) -> list[str]:
    return [*UNTRAINED_METHODS, *_trained_methods(task, labels), *([AUTO_COLUMN] if task.auto else [])]


def _tune(
    bench: FinetuneBenchmark, heads: dict[str, dict[str, Head]], index: Tensor, row: dict[str, Any], save: Any
) -> None:
    y, consensus = bench.labels["validation"], heads["consensus"]
    sure = [
        int((bench.told(part, "validation").argmax(1) == y).sum())
        for part in ({bench.own: consensus[bench.own]}, consensus)
    ]
    row["three"] = sure[1] > sure[0]
    for way in _trained_methods(bench.task, TUNING_LABELS):
        tried = row["tried"].setdefault(way, [])
        for settings in bench.task.grid(way)[len(tried) :]:
            done = bench.trained(way, heads, index, TUNING_SEED, **settings, three=row["three"])
            tried.append([100 * float(bench.right(done, "validation").double().mean()), settings])
            save()
            print("tuning", way, tried[-1], flush=True)
    row["chosen"] = {way: max(tried, key=lambda item: item[0])[1] for way, tried in row["tried"].items()}
    save()


def _record_untrained(bench: FinetuneBenchmark, heads: dict[str, dict[str, Head]], row: dict[str, Any]) -> None:
    ridge, consensus = heads["ridge"], heads["consensus"]
    parts = ({bench.own: ridge[bench.own]}, heads["alone"], {bench.own: consensus[bench.own]}, ridge, consensus)
    for name, part in zip(UNTRAINED_METHODS, parts, strict=True):
        _record(row, name, bench.told(part, "test").argmax(1) == bench.labels["test"])
        row["validation"][name] = 100 * float(
            (bench.told(part, "validation").argmax(1) == bench.labels["validation"]).double().mean()
        )


def _record(row: dict[str, Any], name: str, right: Tensor) -> None:
    row["accuracy"][name] = 100 * float(right.double().mean())
    row["right"][name] = pack_bits(right)


def finetuning_table(task: Task, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean accuracy, and paired differences to three of the rivals: mean ± standard error over seeds, and over test images drawn again."""
    found = []
    for k in task.labels:
        judged = [row for row in rows if row["labels"] == k and row["seed"] != TUNING_SEED and _complete(task, row)]
        if len(judged) < 2:
            continue
        right = {
            name: torch.stack([unpack_bits(row["right"][name], task.tested) for row in judged])
            for name in _columns(task, k)
        }
        for name, own in right.items():
            line: dict[str, Any] = {
                "labels": "all" if k == ALL_LABELS else k,
                "method": name,
                "seeds": len(own),
                "top-1 %": round(100 * float(own.mean()), 2),
            }
            for other in ("plain", "ensemble", "self-training"):
                gap = 100 * (own - right[other])
                line[f"over {other}"] = mean_and_error(gap.mean(1).tolist(), signed=True)
                line[f"over {other}, over images"] = f"± {bootstrap_error(gap.mean(0)):.2f}"
            found.append(line)
    return found
