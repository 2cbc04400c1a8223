"""Sets of closed-form candidates, one source per method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from knowiso_train.refinement._candidates import (
    Candidate,
    better_classifier,
    consensus_candidates,
    fold_candidates,
    label_candidates,
    original_classifier,
)
from knowiso_train.refinement._evaluator import FeatureSets
from knowiso_train.refinement.heads import HeadConfig
from knowiso_train.refinement.models import ClassifierModel

MIN_SKILL = 0.25  # accuracy on the scale from chance (0) to perfect (1), above which a classifier counts as trained
AUTO_FOLD_RIDGES = (0.1, 1.0)  # that "auto" tries besides `ridge`


@dataclass(frozen=True)
class CandidateSet:
    """Candidates of a method, simplest first.

    Attributes:
        candidates: Candidates to evaluate and to choose from.
        default: Choice without validation images.
        notes: Remarks for the user.
    """

    candidates: Sequence[Candidate]
    default: Candidate
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class CandidateSearch:
    """Inputs of the closed-form candidates.

    Attributes:
        models: First the network to refine, then its peers.
        useful: Indices of the useful peers.
        images: Pooled features of all networks.
        ridge: Ridge of the fold.
        head_config: Settings of the consensus head.
        seed: Seed of splits and folds.
    """

    models: Sequence[ClassifierModel]
    useful: Sequence[int]
    images: FeatureSets
    ridge: float | Literal["search"]
    head_config: HeadConfig
    seed: int

    @property
    def model(self) -> ClassifierModel:
        """Network to refine."""
        return self.models[0]

    @property
    def original(self) -> Candidate:
        """Present classifier of the network."""
        return original_classifier(self.model)

    def folds(self, ridges: Sequence[float | Literal["search"]]) -> list[Candidate]:
        """Fold the useful peers into the classifier, for each ridge; none without useful peers."""
        if not self.useful:
            return []
        names = [self.models[i].name for i in self.useful]
        return fold_candidates(self.model, self.images.unlabeled, self.useful, names, ridges, self.seed)

    def heads(self, groups: Sequence[Sequence[int]]) -> tuple[list[Candidate], list[str]]:
        """Fit classifiers to the labels alone and to the consensus of each group; none without labeled images.

        Args:
            groups: Indices of each group's peers. An empty group: self-training.

        Returns:
            Candidates, and notes for the user.
        """
        labeled, validation = self.images.labeled, self.images.validation
        if labeled is None:
            return [], []
        names = [model.name for model in self.models]
        candidates = [] if validation is None else label_candidates(self.model, labeled, validation)
        consensus, notes = consensus_candidates(
            self.model, labeled, self.images.unlabeled_only, groups, names, self.head_config, validation, self.seed
        )
        return candidates + consensus, _missing_class_notes(self.model, labeled.require_labels().tolist()) + notes

    def original_is_better(self, candidates: Sequence[Candidate]) -> bool:
        """Return whether the present classifier is better than the best of some candidates from labels."""
        labeled, validation = self.images.labeled, self.images.validation
        if labeled is None:
            return True
        best = candidates[-1] if validation is None else max(candidates, key=lambda c: c.num_correct(validation))
        ridge = self.head_config.label_ridge
        return better_classifier(self.model, 0, best, labeled, validation, ridge).name == self.original.name

    def original_is_trained(self) -> bool:
        """Return whether the present classifier is clearly above chance on the validation images."""
        validation = self.images.validation
        if validation is None:
            return False
        chance = 1 / self.model.num_classes
        return self.original.num_correct(validation) > len(validation) * (chance + MIN_SKILL * (1 - chance))


def closed_form_candidates(method: str, search: CandidateSearch) -> CandidateSet:
    """Compute the closed-form candidates of a method.

    Args:
        method: "fold", "head", "consensus" or "auto".
        search: Inputs.
    """
    return CANDIDATE_SOURCES[method](search)


def _fold_source(search: CandidateSearch) -> CandidateSet:
    candidates = search.folds([search.ridge]) or [search.original]
    return CandidateSet(candidates, candidates[-1])


def _head_source(search: CandidateSearch) -> CandidateSet:
    candidates, notes = search.heads([search.useful])
    if search.original_is_better(candidates):
        notes.append(
            "the network's own classifier, trained with it, seems to be better than the new ones; methods 'fold' and "
            "'auto' keep it"
        )
    return CandidateSet(candidates, candidates[-1], notes)


def _consensus_source(search: CandidateSearch) -> CandidateSet:
    # Fine-tuning starts from the best classifier, so the present one is a candidate here
    original = search.original
    candidates, notes = search.heads([search.useful])
    if not candidates:
        return CandidateSet([original], original)
    default = original if search.original_is_better(candidates) else candidates[-1]
    return CandidateSet([original, *candidates], default, notes)


def _auto_source(search: CandidateSearch) -> CandidateSet:
    original, useful = search.original, search.useful
    candidates = [original]
    # Without labels the fold is all there is; with labels it competes only where the classifier has these classes
    if search.images.labeled is None or search.original_is_trained():
        candidates += search.folds(list(dict.fromkeys([search.ridge, *AUTO_FOLD_RIDGES])))
    single_peers = [[i] for i in useful] if len(useful) > 1 else []
    heads, notes = search.heads([[], *single_peers, *([useful] if useful else [])])
    candidates += heads
    if search.model.has_bias:
        return CandidateSet(candidates, candidates[-1], notes)
    possible = [candidate for candidate in candidates if not bool(candidate.bias.any())]
    if len(possible) < len(candidates):
        notes.append(
            f"{search.model.name}: the classifier {search.model.head!r} has no bias, so candidates that need one are "
            "not tried; give the network one with a bias"
        )
    return CandidateSet(possible, possible[-1], notes)


CANDIDATE_SOURCES: dict[str, Callable[[CandidateSearch], CandidateSet]] = {
    "fold": _fold_source,
    "head": _head_source,
    "consensus": _consensus_source,
    "auto": _auto_source,
}


def _missing_class_notes(model: ClassifierModel, labels: Sequence[int]) -> list[str]:
    missing = sorted(set(range(model.num_classes)) - set(labels))
    if not missing:
        return []
    names = f"{', '.join(map(str, missing[:5]))}{', …' if len(missing) > 5 else ''}"
    return [
        f"{len(missing)} of {model.num_classes} classes have no labeled image ({names}): classifiers from the labels "
        "never predict these"
    ]
