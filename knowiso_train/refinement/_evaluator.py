"""Evaluation of candidates on pooled features, as rows of the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from knowiso_train.features.calls import find_logits
from knowiso_train.features.state import device_of, preserve_state
from knowiso_train.refinement._candidates import DEFAULT_INVERSE_TEMPERATURE, Candidate, better_classifier
from knowiso_train.refinement._metrics import Score, best_temperature, classification_score
from knowiso_train.refinement.heads import ridge_head
from knowiso_train.refinement.models import (
    ClassifierModel,
    PooledFeatures,
    Transform,
    extract_pooled_features,
)
from knowiso_train.refinement.peers import explained_share, split_masks
from knowiso_train.refinement.report import Row, RowRole
from knowiso_train.utils.batch import get_inputs, labels_of

PEER_HEAD_RIDGE = 1.0  # of the peers' classifiers in the report

PooledLogits = Callable[[PooledFeatures], Tensor]


@dataclass(frozen=True)
class FeatureSets:
    """Pooled features of all networks on each set of images.

    Attributes:
        unlabeled: Images of the loader.
        unlabeled_only: Those of them that are not among the labeled images.
        labeled: Images with labels to fit to.
        validation: Images with labels to choose and calibrate on.
        test: Images with labels for the report.
    """

    unlabeled: PooledFeatures
    unlabeled_only: PooledFeatures
    labeled: PooledFeatures | None
    validation: PooledFeatures | None
    test: PooledFeatures | None

    @classmethod
    def extract(
        cls,
        models: Sequence[ClassifierModel],
        loader: Iterable[Any],
        labeled: Iterable[Any] | None,
        validation: Iterable[Any] | None,
        test: Iterable[Any] | None,
        max_images: int | None,
        progress: bool,
    ) -> FeatureSets:
        """Extract the features, each image once; the arguments are those of `refine`.

        Raises:
            DataError: No images, or no labels where they are needed.
            ShapeError: Labels that the network has no output for.
        """
        unlabeled = extract_pooled_features(
            models, loader, labels=False, max_images=max_images, progress=progress, what="unlabeled"
        )

        def with_labels(images: Iterable[Any] | None, what: str) -> PooledFeatures | None:
            if images is None:
                return None
            pooled = extract_pooled_features(models, images, labels=True, progress=progress, what=what)
            pooled.check_classes(models[0].num_classes, what)
            return pooled

        sets = [with_labels(x, w) for x, w in ((labeled, "labeled"), (validation, "validation"), (test, "test"))]
        return cls(unlabeled, unlabeled if sets[0] is None else unlabeled.exclude(sets[0]), *sets)

    def overlap_notes(self) -> list[str]:
        """Return a note for the user where labeled images are among the validation images."""
        if self.labeled is None or self.validation is None:
            return []
        count = len(self.validation) - len(self.validation.exclude(self.labeled))
        if not count:
            return []
        return [
            f"{count} of {len(self.validation)} validation images are among the labeled images that classifiers are "
            "fitted to, so the choice is biased and its score too high; pass other images in validation="
        ]

    def counts(self) -> dict[str, int]:
        """Return the number of images of each set."""
        names = ("unlabeled", "labeled", "validation", "test")
        return {name: 0 if getattr(self, name) is None else len(getattr(self, name)) for name in names}


class CandidateEvaluator:
    """Scores of everything that is compared, collected as rows of the report.

    Args:
        models: First the network to refine, then its peers.
        images: Pooled features of all of them.

    Attributes:
        rows: Rows in order; the first is the network before the refinement.
    """

    def __init__(self, models: Sequence[ClassifierModel], images: FeatureSets) -> None:
        self.models, self.images = models, images
        self.rows: list[Row] = [self._score_row(models[0].name, "before", partial(_logits_of, models[0].logits, 0))]

    def add_candidates(self, candidates: Sequence[Candidate]) -> None:
        """Add a row for each candidate, except the present classifier, which has the first row."""
        for candidate in candidates:
            if candidate.name != "original":
                logits = partial(_logits_of, candidate.logits, 0)
                self.rows.append(self._score_row(candidate.name, "candidate", logits, candidate.note))

    def add_model(
        self,
        name: str,
        role: RowRole,
        module: nn.Module,
        validation: Iterable[Any] | None,
        test: Iterable[Any] | None,
    ) -> float:
        """Add a row for a network with features of its own.

        Args:
            name: Name of the row.
            role: Role of the row.
            module: Network in eval mode, with the inputs of the network to refine.
            validation: Batches with labels, or None.
            test: Batches with labels, or None.

        Returns:
            Accuracy on the validation images; minus infinity without them.
        """
        transform = self.models[0].transform
        on_validation, on_test = (
            None if images is None else _score_model(module, images, what, transform)
            for images, what in ((validation, "validation"), (test, "test"))
        )
        self.rows.append(Row(name, role, on_validation, on_test))
        return -math.inf if on_validation is None else on_validation.accuracy

    def add_result(self, name: str) -> None:
        """Add the row of the result: that of the chosen candidate, under the name of the network."""
        self.rows.append(replace(self.row(name), name=self.models[0].name, role="after", note=name))

    def add_peers(self, peers: Sequence[int]) -> None:
        """Add rows for peers, and for the ensemble of the network and these peers.

        Every network takes a classifier from the labeled images, or its own where that is better.

        Args:
            peers: Indices of the peers.
        """
        heads = {i: head for i in (0, *peers) if (head := self._baseline_head(i)) is not None}
        for i in peers:
            if i in heads:
                self.rows.append(self._score_row(self.models[i].name, "peer", partial(_logits_of, heads[i], i)))
        if len(heads) > 1:
            note = f"{len(heads)} networks at inference"
            ensemble = partial(_ensemble_logits, heads)
            self.rows.append(self._score_row("all networks together", "ensemble", ensemble, note))

    def validation_score(self, candidate: Candidate) -> Score | None:
        """Score a candidate on the validation images. None: no such images."""
        return _score_pooled(self.images.validation, partial(_logits_of, candidate.logits, 0))

    def validation_accuracy(self, candidate: Candidate) -> float:
        """Return a candidate's accuracy on the validation images; minus infinity without them."""
        score = self.validation_score(candidate)
        return -math.inf if score is None else score.accuracy

    def best(self, candidates: Sequence[Candidate]) -> Candidate:
        """Return the candidate with the highest accuracy on the validation images; of equal ones the first."""
        return max(candidates, key=self.validation_accuracy)

    def row(self, name: str) -> Row:
        """Return the row of this name, or else the first row: the network before the refinement."""
        return next((row for row in self.rows if row.name == name), self.rows[0])

    def _baseline_head(self, network: int) -> Callable[[Tensor], Tensor] | None:
        """Return the logits of a network's own classifier or of one from the labels, whichever is better."""
        labeled, validation = self.images.labeled, self.images.validation
        model, num_classes = self.models[network], self.models[0].num_classes
        if labeled is None:
            return model.logits if model.has_compatible_head(num_classes) else None
        head = ridge_head(labeled.features[network], labeled.require_labels(), num_classes, PEER_HEAD_RIDGE)
        temperature = 1 / DEFAULT_INVERSE_TEMPERATURE
        if validation is not None:
            temperature = best_temperature(head(validation.features[network]), validation.require_labels())
        scaled = head.scaled(temperature)
        candidate = Candidate("", scaled.weight, scaled.bias)
        if model.has_compatible_head(num_classes):
            candidate = better_classifier(model, network, candidate, labeled, validation, PEER_HEAD_RIDGE)
        return candidate.logits

    def _score_row(self, name: str, role: RowRole, logits: PooledLogits, note: str = "") -> Row:
        images = self.images
        return Row(name, role, _score_pooled(images.validation, logits), _score_pooled(images.test, logits), note)


def explained_by_peers(pooled: PooledFeatures, peers: Sequence[int], seed: int) -> float:
    """Compute the held-out R² of the network's pooled features, predicted from those of all peers together.

    Args:
        pooled: Features of the network and its peers.
        peers: Indices of the peers.
        seed: Seed of the split.
    """
    return explained_share(torch.cat(pooled.select(peers), 1), pooled.features[0], split_masks(len(pooled), seed))


def _logits_of(logits: Callable[[Tensor], Tensor], network: int, pooled: PooledFeatures) -> Tensor:
    return logits(pooled.features[network])


def _ensemble_logits(heads: dict[int, Callable[[Tensor], Tensor]], pooled: PooledFeatures) -> Tensor:
    """Compute the logarithm of the mean probability of several networks."""
    probabilities = torch.stack([head(pooled.features[i]).softmax(1) for i, head in heads.items()])
    return probabilities.mean(0).clamp_min(1e-12).log()


def _score_pooled(pooled: PooledFeatures | None, logits: PooledLogits) -> Score | None:
    return None if pooled is None else classification_score(logits(pooled), pooled.require_labels())


@torch.no_grad()
def _score_model(module: nn.Module, loader: Iterable[Any], what: str, transform: Transform | None) -> Score:
    logits, labels = [], []
    with preserve_state(module):
        for batch in loader:
            images = get_inputs(batch).to(device_of(module) or "cpu")
            logits.append(find_logits(module(images if transform is None else transform(images))).cpu())
            labels.append(labels_of(batch, what).cpu())
    return classification_score(torch.cat(logits), torch.cat(labels))
