"""Closed-form candidates that each method compares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from knowiso_train.errors import OptionError
from knowiso_train.refinement.candidates import (
    Candidate,
    better_classifier,
    consensus_candidates,
    fold_candidates,
    label_candidates,
    original_classifier,
)
from knowiso_train.refinement.evaluator import FeatureSets
from knowiso_train.refinement.heads import HeadConfig
from knowiso_train.refinement.models import ClassifierModel, PooledFeatures
from knowiso_train.utils.batch import check_loader

MIN_SKILL = 0.25  # of the way from chance to perfect: a classifier that is better was trained for these classes


def closed_forms(
    method: str,
    networks: Sequence[ClassifierModel],
    useful: Sequence[int],
    images: FeatureSets,
    ridge: float | str,
    recipe: HeadConfig,
    seed: int,
) -> tuple[list[Candidate], list[str]]:
    """What there is to choose from without training, simplest first; the last one is the method's own where nothing can be chosen on. And what the
    user should know.
    """
    own, names = networks[0], [net.name for net in networks]
    first, notes = original_classifier(own), list[str]()
    found, few, seen = [first], images.labeled, images.validation
    called = [names[i] for i in useful]
    if useful and (method == "fold" or (method == "auto" and (few is None or _trained(first, seen)))):
        ridges = [ridge] if method == "fold" else list(dict.fromkeys([ridge, 0.1, 1.0]))
        found += fold_candidates(own, images.unlabeled, useful, called, ridges, seed)
    if few is not None and few.labels is not None and method in ("auto", "head", "consensus"):
        missing = sorted(set(range(own.classes)) - set(few.labels.tolist()))
        if missing:
            some = f"{', '.join(map(str, missing[:5]))}{', …' if len(missing) > 5 else ''}"
            notes.append(
                f"{len(missing)} of {own.classes} classes have no labeled image ({some}): classifiers from the labels never guess these"
            )
        groups: list[Sequence[int]] = [useful] if useful else [()]
        if seen is not None:
            found += label_candidates(own, few, seen)
        if method == "auto":
            alone = [[i] for i in useful] if len(useful) > 1 else []
            groups = [(), *alone, *([useful] if useful else [])]
        consensus, misled = consensus_candidates(own, few, images.others, groups, names, recipe, seen, seed)
        found, notes = found + consensus, notes + misled
        if method != "auto":  # which has the original among what it chooses from
            made = found[-1] if seen is None else max(found[1:], key=lambda part: _right(part, seen))
            kept = better_classifier(own, 0, made, few, seen, recipe.label_ridge).name == first.name
            if kept and method == "head":
                notes.append(
                    "the network's own classifier, trained with it, seems to be better than the new ones; methods 'fold' and 'auto' keep it"
                )
            if method == "consensus":  # which starts from the best
                return (found if seen is not None else [*found[1:], first] if kept else found[1:]), notes
    if method == "auto":
        possible = _possible(own, found)
        if len(possible) < len(found):
            notes.append(
                f"{own.name}: the classifier {own.head!r} has no bias, so what needs one is not tried; give the network one with a bias"
            )
        return possible, notes
    return (found if len(found) == 1 else found[1:]), notes


def _possible(own: ClassifierModel, found: Sequence[Candidate]) -> list[Candidate]:
    """Without those that need a bias where the classifier has none."""
    bias: nn.Parameter | None = own.classifier.bias
    return [part for part in found if bias is not None or not bool(part.bias.any())]


def _right(candidate: Candidate, seen: PooledFeatures) -> int:
    """Images that it gets right."""
    return 0 if seen.labels is None else int((candidate.logits(seen.features[0]).argmax(1) == seen.labels).sum())


def _trained(first: Candidate, seen: PooledFeatures | None) -> bool:
    """Whether the network's own classifier knows these classes."""
    if seen is None:
        return False
    chance = 1 / len(first.weight)
    return _right(first, seen) > len(seen) * (chance + MIN_SKILL * (1 - chance))


def check_needs(method: str, own: ClassifierModel, layer: str | None, **given: Any) -> None:
    """Whether a method has what it needs; `given` are the labeled, validation and test images.

    Raises:
        OptionError: it has not.
        InputTypeError: images that can be read only once.
    """
    labeled, validation = given["labeled"], given["validation"]
    if method == "auto" and validation is None:
        raise OptionError(
            'method="auto" chooses on labeled images that nothing was fitted to: pass validation=, or choose a method yourself'
        )
    if method in ("head", "paper") and labeled is None:
        raise OptionError(f"method={method!r} needs a few labeled images: pass labeled=")
    for name, images in given.items():
        if images is not None:
            check_loader(images, name)
    bias: nn.Parameter | None = own.classifier.bias
    if bias is None and (method in ("head", "fold") or (method == "consensus" and labeled is not None)):
        raise OptionError(
            f"the classifier {own.head!r} of {own.name} has no bias, but its refinement needs one; give the network one with a bias"
        )
    if method == "paper" and layer is None:
        raise OptionError('method="paper" needs layer=, the layer of the network that is rebuilt from the peer')
