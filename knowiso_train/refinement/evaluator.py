"""Evaluation of candidates on cached features."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from knowiso_train.errors import ShapeError
from knowiso_train.features.state import device_of, preserve_state
from knowiso_train.refinement.candidates import DEFAULT_INVERSE_TEMPERATURE, Candidate, better_classifier
from knowiso_train.refinement.heads import ridge_head
from knowiso_train.refinement.metrics import Score, best_temperature, classification_score
from knowiso_train.refinement.models import ClassifierModel, PooledFeatures, extract_pooled_features
from knowiso_train.refinement.peers import explained_share, split_masks
from knowiso_train.refinement.report import Row
from knowiso_train.utils.batch import get_inputs, labels_of

PEER_HEAD_RIDGE = 1.0  # of the peers' classifiers in the report


@dataclass(frozen=True)
class FeatureSets:
    """Pooled features of all networks on each set of images; `others` are the unlabeled ones that are not among the labeled."""

    unlabeled: PooledFeatures
    others: PooledFeatures
    labeled: PooledFeatures | None
    validation: PooledFeatures | None
    test: PooledFeatures | None

    @classmethod
    def read(
        cls,
        networks: Sequence[ClassifierModel],
        loader: Iterable[Any],
        labeled: Iterable[Any] | None,
        validation: Iterable[Any] | None,
        test: Iterable[Any] | None,
        max_images: int | None,
        progress: bool,
    ) -> FeatureSets:
        """Each image once.

        Raises:
            DataError: no images, or no labels where they are needed.
            ShapeError: labels that the network has no output for.
        """
        unlabeled = extract_pooled_features(
            networks, loader, labels=False, max_images=max_images, progress=progress, what="unlabeled"
        )
        more = []
        for given, what in ((labeled, "labeled"), (validation, "validation"), (test, "test")):
            found = (
                None
                if given is None
                else extract_pooled_features(networks, given, labels=True, progress=progress, what=what)
            )
            if found is not None and found.labels is not None and int(found.labels.max()) >= networks[0].classes:
                raise ShapeError(
                    f"{what} images have labels up to {int(found.labels.max())}, the network tells {networks[0].classes} classes apart; "
                    "give it a classifier for these classes first (timm: model.reset_classifier(classes))"
                )
            more.append(found)
        return cls(unlabeled, unlabeled if more[0] is None else unlabeled.exclude(more[0]), *more)

    def counts(self) -> dict[str, int]:
        """How many there are of each."""
        sets = {
            "unlabeled": self.unlabeled,
            "labeled": self.labeled,
            "validation": self.validation,
            "test": self.test,
        }
        return {name: 0 if found is None else len(found) for name, found in sets.items()}


class CandidateEvaluator:
    """Figures of everything that was tried.

    Args:
        networks: first the one that is refined.
        images: seen by all of them.
    """

    def __init__(self, networks: Sequence[ClassifierModel], images: FeatureSets) -> None:
        self.networks, self.images = networks, images
        self.rows: list[Row] = [self._row(networks[0].name, "before", partial(_of, networks[0].logits, 0))]

    def candidates(self, found: Sequence[Candidate]) -> None:
        """One row for each, with the original left to its own row."""
        for candidate in found:
            if candidate.name != "original":
                self.rows.append(
                    self._row(candidate.name, "candidate", partial(_of, candidate.logits, 0), candidate.note)
                )

    def validation(self, candidate: Candidate) -> Score | None:
        """Figures on the validation images."""
        seen = self.images.validation
        return (
            None
            if seen is None or seen.labels is None
            else classification_score(candidate.logits(seen.features[0]), seen.labels)
        )

    def accuracy(self, candidate: Candidate) -> float:
        """On the validation images; the least there is where there are none."""
        found = self.validation(candidate)
        return -math.inf if found is None else found.accuracy

    def best(self, found: Sequence[Candidate]) -> Candidate:
        """The highest on the validation images; of equal ones the first, which is the simplest."""
        return max(found, key=self.accuracy)

    def row(self, name: str) -> Row:
        """Of this name, or else the first: the network before."""
        return next((row for row in self.rows if row.name == name), self.rows[0])

    def whole(
        self, name: str, role: str, model: nn.Module, validation: Iterable[Any] | None, test: Iterable[Any] | None
    ) -> float:
        """A row for a network that has other features than the original; its accuracy on the validation images."""
        transform = self.networks[0].transform
        chosen, judged = (
            None if x is None else _run(model, x, what, transform)
            for x, what in ((validation, "validation"), (test, "test"))
        )
        self.rows.append(Row(name, role, chosen, judged))
        return -math.inf if chosen is None else chosen.accuracy

    def after(self, name: str) -> None:
        """The row of what was chosen, once more, as the result."""
        self.rows.append(replace(self.row(name), name=self.networks[0].name, role="after", note=name))

    def peers(self, useful: Sequence[int]) -> None:
        """Peers and the ensemble of all networks, with classifiers from the same labels, or their own where they tell the same classes apart."""
        heads = {i: head for i in (0, *useful) if (head := self._plain_head(i)) is not None}
        for i in useful:
            if i in heads:
                self.rows.append(self._row(self.networks[i].name, "peer", partial(_of, heads[i], i)))
        if len(heads) > 1:

            def together(seen: PooledFeatures) -> Tensor:
                return (
                    torch.stack([head(seen.features[i]).softmax(1) for i, head in heads.items()])
                    .mean(0)
                    .clamp_min(1e-12)
                    .log()
                )

            self.rows.append(
                self._row("all networks together", "ensemble", together, f"{len(heads)} networks at inference")
            )

    def _plain_head(self, i: int) -> Callable[[Tensor], Tensor] | None:
        """A network's own classifier or one from the labels, whichever is better; None where there is neither."""
        few, net, classes = self.images.labeled, self.networks[i], self.networks[0].classes
        if few is None or few.labels is None:
            return net.logits if net.has_compatible_head(classes) else None
        head, seen = ridge_head(few.features[i], few.labels, classes, PEER_HEAD_RIDGE), self.images.validation
        fitted = None if seen is None or seen.labels is None else best_temperature(head(seen.features[i]), seen.labels)
        head = head.scaled(fitted or 1 / DEFAULT_INVERSE_TEMPERATURE)
        made = Candidate("", head.weight, head.bias)
        return (
            better_classifier(net, i, made, few, seen, PEER_HEAD_RIDGE) if net.has_compatible_head(classes) else made
        ).logits

    def _row(self, name: str, role: str, logits: Callable[[PooledFeatures], Tensor], note: str = "") -> Row:
        scores = [
            None if seen is None or seen.labels is None else classification_score(logits(seen), seen.labels)
            for seen in (self.images.validation, self.images.test)
        ]
        return Row(name, role, scores[0], scores[1], note)


def explained_by_peers(seen: PooledFeatures, useful: Sequence[int], seed: int) -> float:
    """Share of the network's pooled features that the useful peers explain together, on held-out images."""
    return explained_share(torch.cat(seen.select(useful), 1), seen.features[0], split_masks(len(seen), seed))


def _of(logits: Callable[[Tensor], Tensor], i: int, seen: PooledFeatures) -> Tensor:
    return logits(seen.features[i])


@torch.no_grad()
def _run(model: nn.Module, loader: Iterable[Any], what: str, transform: Callable[[Any], Any] | None) -> Score:
    logits, labels = [], []
    with preserve_state(model):
        for batch in loader:
            images = get_inputs(batch).to(device_of(model) or "cpu")
            logits.append(model(images if transform is None else transform(images)).cpu())
            labels.append(labels_of(batch, what).cpu())
    return classification_score(torch.cat(logits), torch.cat(labels))
