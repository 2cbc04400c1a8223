"""The images that a refinement sees, the candidates it tries, and the figures of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from knowiso_train.errors import ShapeError
from knowiso_train.features import device_of, inputs_of, undisturbed
from knowiso_train.refinement.candidates import CONFIDENCE, Candidate, better_of
from knowiso_train.refinement.evaluation import Score, best_temperature, score
from knowiso_train.refinement.head import ridge_head
from knowiso_train.refinement.networks import Network, Seen, labels_of, see
from knowiso_train.refinement.result import Row
from knowiso_train.refinement.worth import explained_share, parts

PLAIN_RIDGE = 1.0  # of the peers' classifiers in the report


@dataclass(frozen=True)
class Images:
    """Pooled features of all networks on each set of images; `others` are the unlabelled ones that are not among the labelled."""

    unlabelled: Seen
    others: Seen
    labelled: Seen | None
    validation: Seen | None
    test: Seen | None

    @classmethod
    def read(
        cls,
        networks: Sequence[Network],
        loader: Iterable[Any],
        labelled: Iterable[Any] | None,
        validation: Iterable[Any] | None,
        test: Iterable[Any] | None,
        max_images: int | None,
        progress: bool,
    ) -> Images:
        """Each image once.

        Raises:
            DataError: no images, or no labels where they are needed.
            ShapeError: labels that the network has no output for.
        """
        unlabelled = see(networks, loader, labels=False, max_images=max_images, progress=progress, what="unlabelled")
        more = []
        for given, what in ((labelled, "labelled"), (validation, "validation"), (test, "test")):
            found = None if given is None else see(networks, given, labels=True, progress=progress, what=what)
            if found is not None and found.labels is not None and int(found.labels.max()) >= networks[0].classes:
                raise ShapeError(
                    f"{what} images have labels up to {int(found.labels.max())}, the network tells {networks[0].classes} classes apart; "
                    "give it a classifier for these classes first (timm: model.reset_classifier(classes))"
                )
            more.append(found)
        return cls(unlabelled, unlabelled if more[0] is None else unlabelled.without(more[0]), *more)

    def counts(self) -> dict[str, int]:
        """How many there are of each."""
        sets = {"unlabelled": self.unlabelled, "labelled": self.labelled, "validation": self.validation, "test": self.test}
        return {name: 0 if found is None else len(found) for name, found in sets.items()}


class Board:
    """Figures of everything that was tried.

    Args:
        networks: first the one that is refined.
        images: seen by all of them.
    """

    def __init__(self, networks: Sequence[Network], images: Images) -> None:
        self.networks, self.images = networks, images
        self.rows: list[Row] = [self._row(networks[0].name, "before", partial(_of, networks[0].logits, 0))]

    def candidates(self, found: Sequence[Candidate]) -> None:
        """One row for each, with the original left to its own row."""
        for candidate in found:
            if candidate.name != "original":
                self.rows.append(self._row(candidate.name, "candidate", partial(_of, candidate.logits, 0), candidate.note))

    def validation(self, candidate: Candidate) -> Score | None:
        """Figures on the validation images."""
        seen = self.images.validation
        return None if seen is None or seen.labels is None else score(candidate.logits(seen.features[0]), seen.labels)

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

    def whole(self, name: str, role: str, model: nn.Module, validation: Iterable[Any] | None, test: Iterable[Any] | None) -> float:
        """A row for a network that has other features than the original; its accuracy on the validation images."""
        transform = self.networks[0].transform
        chosen, judged = (None if x is None else _run(model, x, what, transform) for x, what in ((validation, "validation"), (test, "test")))
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

            def together(seen: Seen) -> Tensor:
                return torch.stack([head(seen.features[i]).softmax(1) for i, head in heads.items()]).mean(0).clamp_min(1e-12).log()

            self.rows.append(self._row("all networks together", "ensemble", together, f"{len(heads)} networks at inference"))

    def _plain_head(self, i: int) -> Callable[[Tensor], Tensor] | None:
        """A network's own classifier or one from the labels, whichever is better; None where there is neither."""
        few, net, classes = self.images.labelled, self.networks[i], self.networks[0].classes
        if few is None or few.labels is None:
            return net.logits if net.speaks(classes) else None
        head, seen = ridge_head(few.features[i], few.labels, classes, PLAIN_RIDGE), self.images.validation
        fitted = None if seen is None or seen.labels is None else best_temperature(head(seen.features[i]), seen.labels)
        head = head.scaled(fitted or 1 / CONFIDENCE)
        made = Candidate("", head.weight, head.bias)
        return (better_of(net, i, made, few, seen, PLAIN_RIDGE) if net.speaks(classes) else made).logits

    def _row(self, name: str, role: str, logits: Callable[[Seen], Tensor], note: str = "") -> Row:
        scores = [
            None if seen is None or seen.labels is None else score(logits(seen), seen.labels) for seen in (self.images.validation, self.images.test)
        ]
        return Row(name, role, scores[0], scores[1], note)


def shared(seen: Seen, useful: Sequence[int], seed: int) -> float:
    """Share of the network's pooled features that the useful peers explain together, on held-out images."""
    return explained_share(torch.cat(seen.of(useful), 1), seen.features[0], parts(len(seen), seed))


def _of(logits: Callable[[Tensor], Tensor], i: int, seen: Seen) -> Tensor:
    return logits(seen.features[i])


@torch.no_grad()
def _run(model: nn.Module, loader: Iterable[Any], what: str, transform: Callable[[Any], Any] | None) -> Score:
    logits, labels = [], []
    with undisturbed(model):
        for batch in loader:
            images = inputs_of(batch).to(device_of(model) or "cpu")
            logits.append(model(images if transform is None else transform(images)).cpu())
            labels.append(labels_of(batch, what))
    return score(torch.cat(logits), torch.cat(labels))
