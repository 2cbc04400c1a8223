"""Refinement by peers on real checkpoints: gains of one network from others that are not used at inference.

    python -m benchmarks.refine.bench_refine                        # all sections, hours; resumes
    python -m benchmarks.refine.bench_refine --sections peers head  # some sections

peers: label-free scores of lite1, lite2 and useless networks as peers of lite0.
head:  `clothing10`, 3 to 50 labels per class and all labels. lite0 has ImageNet weights, 160 px and a new closed-form
    classifier; the rest of the 3,068 training images is unlabeled. Hyperparameters of every method are chosen for each
    seed on the 341 validation images, those of the controls from more settings. "as shipped" tunes nothing, but takes
    the class prior from there, as `refine` does. The defaults were chosen on 800 training images before any test image
    was used, the inverse temperature later on the validation images.
harm:  useless peers through `refine`, alone and with a good one: they must be detected and cost nothing.
cifar, cifar-100: finetuning of a small network on few labels, see cifar.py.
full:  finetuning of lite0 on few labels of `clothing10`, from closed-form classifiers, see full.py.
transfer: the same for a ResNet-20 between CIFAR-100 and CIFAR-10, in both directions.
paper: the published composite, two networks at inference, in its own regime: few images, no augmentation.

Test images are only reported on. Differences are paired over seeds (mean ± standard error). "over images" is a
bootstrap over the test images.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.results import RESULTS, record, table
from benchmarks.common.stats import bootstrap_error, mean_and_error, pack_bits, unpack_bits
from benchmarks.refine.cifar import CIFAR_TASKS, cifar_table, compare_on_cifar
from benchmarks.refine.data import ALL_LABELS, NUM_CLASSES, draw_labeled, features
from benchmarks.refine.full import align_to_class_prior, compare_finetuning, finetuning_table, with_class_prior
from benchmarks.refine.negative_controls import (
    compare_composites,
    compare_useless_peers,
    composites_table,
    useless_peers_table,
)
from benchmarks.refine.tasks import CIFAR10, CIFAR10_PLAIN, CIFAR100, CLOTHES
from knowiso_train.refinement.heads import ConsensusFeatures, FeatureScaling, Head, HeadConfig, ridge_head
from knowiso_train.refinement.peers import score_peer
from knowiso_train.regression.ridge import ridge_map

LABELS = (3, 5, 10, 20, 50)
REPORTED_LABELS = (3, 5, 10, 20)  # the differences are averaged over these
CLASS_PRIOR_SUFFIX = ", in proportion"  # class prior of the validation images, in the recorded names
RIDGES = tuple(10.0**e for e in range(-3, 3))
HEAD_CONFIGS = [
    HeadConfig(label_ridge=few, inverse_temperature=sharp, num_rounds=rounds, head_ridge=ridge)
    for few in (0.1, 1.0)
    for sharp in (12.0, math.inf)
    for rounds in (1, 3)
    for ridge in (1.0, 3.0)
]
USELESS_PEERS = (
    "untrained lite1",
    "untrained lite1, its statistics set",
    "ResNet-20 of CIFAR-10",
    "ResNet-10 of digits",
    "noise",
)
TEST_IMAGES = 372
TASKS = {
    "full": CLOTHES,
    "transfer": CIFAR10,
    "transfer, as it is": CIFAR10_PLAIN,
    "transfer to CIFAR-100": CIFAR100,
}
SECTIONS = ["peers", "head", "harm", *CIFAR_TASKS, *TASKS, "paper"]


def score_peers() -> list[dict[str, Any]]:
    """Score good and useless peers without labels."""
    lite0_features, rows = features("lite0")["train"], []
    order = torch.randperm(len(lite0_features), generator=torch.Generator().manual_seed(0))
    for name in ("lite1", "lite2", *USELESS_PEERS):
        score = score_peer(lite0_features[order], features(name)["train"][order], name)
        rows.append(
            {
                "peer": name,
                "explains": score.r2_of_model,
                "is explained": score.r2_of_peer,
                "noise floor": score.noise_floor,
            }
        )
        rows[-1]["useful"] = score.useful
        print(rows[-1], flush=True)
    return rows


class Methods:
    """Candidates of every method for a set of labels; holds what does not depend on the labels."""

    def __init__(self) -> None:
        self.data = {name: features(name) for name in ("lite0", "lite1", "lite2", "lite0, mirrored", USELESS_PEERS[1])}
        x = {name: part["train"] for name, part in self.data.items()}
        own, mirrored = x["lite0"], x["lite0, mirrored"]
        view = FeatureScaling.fit(own)(own)
        other = FeatureScaling.fit(mirrored)(mirrored)
        projected = [self._unit_power(view @ ridge_map(view, y, r)) for y in (view, other) for r in (1.0, 3.0, 10.0)]
        self.single = [ConsensusFeatures(own, rows) for rows in (view, *projected)]
        self.projections = self._projections(own, mirrored, x["lite1"])
        self.groups = {
            "lite1": ["lite1"],
            "lite2": ["lite2"],
            "lite1, lite2": ["lite1", "lite2"],
            "untrained, not left out": [USELESS_PEERS[1]],
        }
        self.ours = {
            name: [
                ConsensusFeatures.from_views([own, *(x[p] for p in names)], HeadConfig(view_ridge=r))
                for r in (0.3, 1.0)
            ]
            for name, names in self.groups.items()
        }
        self.labels = features("lite0")["labels"]
        self.configs = with_class_prior(HEAD_CONFIGS, self.labels["validation"], NUM_CLASSES)
        self.shipped = with_class_prior([HeadConfig()], self.labels["validation"], NUM_CLASSES)[-1]

    @staticmethod
    def _unit_power(rows: Tensor) -> Tensor:
        return rows / rows.square().mean().sqrt()

    def _projections(self, own: Tensor, mirrored: Tensor, peer: Tensor) -> dict[str, list[Any]]:
        """Return, for linear methods, scalings and matrices from raw features to the classifier's input."""
        scaling = FeatureScaling.fit(own)
        view, other, first = scaling(own), FeatureScaling.fit(mirrored)(mirrored), FeatureScaling.fit(peer)(peer)
        maps = {
            "raw features": [torch.eye(view.shape[1], dtype=torch.float64)],
            "own → own, own → mirrored": [ridge_map(view, y, r) for y in (view, other) for r in (1.0, 3.0, 10.0)],
            "own → lite1 → own": [ridge_map(view, first, r) @ ridge_map(first, view, r) for r in (0.3, 1.0, 3.0)],
            "own → lite1": [ridge_map(view, first, r) for r in (0.3, 1.0, 3.0)],
        }
        return {name: [(scaling, matrix) for matrix in matrices] for name, matrices in maps.items()}

    def linear(self, index: Tensor, labels: Tensor) -> dict[str, list[dict[str, Tensor]]]:
        """Return scores, (images, classes), of all settings of the methods without pseudo-labels."""
        scores_by_method: dict[str, list[dict[str, Tensor]]] = {}
        own = self.data["lite0"]
        for name, maps in self.projections.items():
            rows = [{s: scaling(own[s]) @ matrix for s in ("train", "validation", "test")} for scaling, matrix in maps]
            scores_by_method[name] = [scores for part in rows for scores in self._ridges(part, index, labels)]
            if name == "raw features":
                scores_by_method[f"{name}{CLASS_PRIOR_SUFFIX}"] = [
                    scores for part in rows for scores in self._ridges(part, index, labels, self.shipped)
                ]
        for name, names in {
            "two networks side by side": ["lite0", "lite1"],
            "three networks side by side": ["lite0", "lite1", "lite2"],
        }.items():
            part = {
                s: torch.cat([FeatureScaling.fit(self.data[n]["train"])(self.data[n][s]) for n in names], 1)
                for s in ("train", "validation", "test")
            }
            scores_by_method[name] = self._ridges(part, index, labels)
            scores_by_method[f"{name}{CLASS_PRIOR_SUFFIX}"] = self._ridges(part, index, labels, self.shipped)
        return scores_by_method

    def pseudo_labeled(self, index: Tensor, labels: Tensor) -> dict[str, list[dict[str, Tensor]]]:
        """Return scores of all settings of the methods with pseudo-labels."""
        scores_by_method = {
            "self-training, no peer": [
                self._scores(c.head(index, labels, NUM_CLASSES, r)) for c in self.single for r in self.configs
            ]
        }
        scores_by_method["self-training as shipped"] = [
            self._scores(self.single[0].head(index, labels, NUM_CLASSES, self.shipped))
        ]
        for name, consensus in self.ours.items():
            scores_by_method[f"ours, {name}"] = [
                self._scores(c.head(index, labels, NUM_CLASSES, r)) for c in consensus for r in self.configs
            ]
            scores_by_method[f"ours as shipped, {name}"] = [
                self._scores(consensus[0].head(index, labels, NUM_CLASSES, self.shipped))
            ]
        return scores_by_method

    def _scores(self, head: Head) -> dict[str, Tensor]:
        return {split: head(self.data["lite0"][split]) for split in ("validation", "test")}

    @staticmethod
    def _ridges(
        part: dict[str, Tensor], index: Tensor, labels: Tensor, config: HeadConfig | None = None
    ) -> list[dict[str, Tensor]]:
        """Return the scores of ridge classifiers.

        With a configuration, a bias for each class aligns the predictions on all training images with its class prior.
        """
        scores = []
        for ridge in RIDGES:
            classifier = ridge_head(part["train"][index], labels, NUM_CLASSES, ridge)
            if config is not None:
                classifier = align_to_class_prior(classifier, part["train"], config)
            scores.append({split: classifier(part[split]) for split in ("validation", "test")})
        return scores


def compare_heads(seeds: int, rows: list[dict[str, Any]], save: Any) -> list[dict[str, Any]]:
    """Return one row for each number of labels and seed.

    A row holds the accuracy of every method and the test images that it classified correctly.
    """
    points = [*((k, s) for s in range(seeds) for k in LABELS), (ALL_LABELS, 0)]  # once, because nothing is drawn
    methods: Methods | None = None
    for k, seed in points:
        row = next((row for row in rows if (row["labels"], row["seed"]) == (k, seed)), None)
        if row is None:
            rows.append(
                row := {"labels": k, "seed": seed, "accuracy": {}, "validation": {}, "right": {}, "settings": {}}
            )
        # Methods that were added later are run for old rows too
        for part, name in (
            ("linear", f"raw features{CLASS_PRIOR_SUFFIX}"),
            ("pseudo_labeled", "self-training, no peer"),
        ):
            if name in row["accuracy"]:
                continue
            methods = methods or Methods()
            index = draw_labeled(methods.labels["train"], k, seed)
            for method, tried in getattr(methods, part)(index, methods.labels["train"][index]).items():
                on_validation = [
                    float((t["validation"].argmax(1) == methods.labels["validation"]).double().mean()) for t in tried
                ]
                best = max(range(len(tried)), key=on_validation.__getitem__)
                correct = tried[best]["test"].argmax(1) == methods.labels["test"]
                row["accuracy"][method] = 100 * float(correct.double().mean())
                row["validation"][method] = 100 * on_validation[best]
                row["right"][method] = pack_bits(correct)
                row["settings"][method] = len(tried)
            save()
            print(
                f"{k} labels per class, seed {seed}:", {n: round(a, 1) for n, a in row["accuracy"].items()}, flush=True
            )
    return rows


def head_table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean accuracy by number of labels, and mean differences over REPORTED_LABELS.

    Differences are to raw features and to the best control without a peer.
    """
    names = list(rows[0]["accuracy"])
    seeds = sorted(
        {
            row["seed"]
            for row in rows
            if all(any(o["seed"] == row["seed"] and o["labels"] == k for o in rows) for k in LABELS)
        }
    )
    by_key = {(row["labels"], row["seed"]): row for row in rows}
    controls = [
        f"raw features{CLASS_PRIOR_SUFFIX}",
        "own → own, own → mirrored",
        "self-training, no peer",
        "self-training as shipped",
    ]
    means = {
        n: torch.tensor([[by_key[k, s]["accuracy"][n] for k in REPORTED_LABELS] for s in seeds]).mean(1) for n in names
    }
    control = max(controls, key=lambda n: float(means[n].mean()))
    lines = []
    for name in names:
        line: dict[str, Any] = {"method": name, "settings tried": rows[0]["settings"][name]}
        line |= {
            f"{k} labels": round(float(torch.tensor([by_key[k, s]["accuracy"][name] for s in seeds]).mean()), 1)
            for k in LABELS
        }
        line["all labels"] = round(by_key[ALL_LABELS, 0]["accuracy"][name], 1)
        for title, other in (("over raw", "raw features"), ("over control", control)):
            line[title] = mean_and_error((means[name] - means[other]).tolist(), signed=True)
            line[f"{title}, over images"] = f"± {bootstrap_error(difference_per_image(by_key, seeds, name, other)):.2f}"
        lines.append(line)
    return lines


def difference_per_image(
    by_key: dict[tuple[int, int], dict[str, Any]], seeds: list[int], name: str, other: str
) -> Tensor:
    """Return the difference of two methods in points, (images,), averaged over labels and seeds."""

    def correct_fraction(method: str) -> Tensor:
        return torch.stack(
            [unpack_bits(by_key[k, s]["right"][method], TEST_IMAGES) for k in REPORTED_LABELS for s in seeds]
        ).mean(0)

    return 100 * (correct_fraction(name) - correct_fraction(other))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", default=SECTIONS, choices=SECTIONS)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--seeds-trained", type=int, default=5, help="seeds of the sections that train, and of harm")
    parser.add_argument("--name", default="bench_refine", help="results file")
    args = parser.parse_args()
    path: Path = RESULTS / f"{args.name}.json"
    figures: dict[str, Any] = json.loads(path.read_text())["figures"] if path.exists() else {}

    def save() -> None:
        record(args.name, figures)

    if "peers" in args.sections:
        figures["peers"] = figures.get("peers") or score_peers()
        print(table(figures["peers"]))
    if "head" in args.sections:
        figures["head"] = compare_heads(args.seeds, figures.setdefault("head", []), save)
        figures["head table"] = head_table(figures["head"])
        print(table(figures["head table"]))
    if "harm" in args.sections:
        figures["harm"] = compare_useless_peers(args.seeds_trained, USELESS_PEERS, figures.setdefault("harm", []), save)
        figures["harm table"] = useless_peers_table(figures["harm"])
        print(table(figures["harm table"]))
    for name in (section for section in CIFAR_TASKS if section in args.sections):
        figures[name] = compare_on_cifar(CIFAR_TASKS[name], args.seeds_trained, figures.setdefault(name, []), save)
        figures[f"{name} table"] = cifar_table(CIFAR_TASKS[name], figures[name])
        print(table(figures[f"{name} table"]))
    for name in (section for section in TASKS if section in args.sections):
        figures[name] = compare_finetuning(
            TASKS[name], args.seeds_trained, HEAD_CONFIGS, figures.setdefault(name, []), save
        )
        figures[f"{name} table"] = finetuning_table(TASKS[name], figures[name])
        print(table(figures[f"{name} table"]))
    if "paper" in args.sections:
        figures["paper"] = compare_composites(args.seeds_trained, figures.setdefault("paper", []), save)
        figures["paper table"] = composites_table(figures["paper"])
        print(table(figures["paper table"]))
    save()


if __name__ == "__main__":
    main()
