"""Candidate heads of a refinement."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from knowiso_train.errors import OptionError
from knowiso_train.features.modules import unwrap_model
from knowiso_train.refinement.folding import fit_peer_projection, fold_input_map
from knowiso_train.refinement.heads import ConsensusFeatures, Head, HeadConfig, estimate_class_prior, ridge_head
from knowiso_train.refinement.metrics import best_temperature, consensus_vs_labels_cv, own_vs_labels_cv
from knowiso_train.refinement.models import ClassifierModel, PooledFeatures

HEAD_RIDGES = (1.0, 3.0, 10.0)
VIEW_RIDGES = (0.1, 1.0, 10.0)
# Logits are this times the scores where there are no validation images to calibrate on
DEFAULT_INVERSE_TEMPERATURE = 10.0


@dataclass(frozen=True)
class Candidate:
    """A classifier for the network's pooled features: (classes, channels) and (classes,), float64; `alone` if of the labels alone,
    `recipe` if of a consensus."""

    name: str
    weight: Tensor
    bias: Tensor
    note: str = ""
    alone: bool = False
    recipe: HeadConfig | None = None

    def logits(self, features: Tensor) -> Tensor:
        """(N, D) → (N, classes)."""
        return features.double() @ self.weight.T + self.bias

    def layer(self) -> nn.Linear:
        """As a module: float32, frozen."""
        found = (
            nn.Linear(self.weight.shape[1], self.weight.shape[0], device="meta")
            .to_empty(device="cpu")
            .requires_grad_(False)
        )
        found.weight.copy_(self.weight)
        found.bias.copy_(self.bias)
        return found


def original_classifier(own: ClassifierModel) -> Candidate:
    """The classifier as it is."""
    layer = own.classifier
    weight = layer.weight.detach().cpu().double()
    bias = torch.zeros(len(weight), dtype=torch.float64) if layer.bias is None else layer.bias.detach().cpu().double()
    return Candidate("original", weight, bias)


def better_classifier(
    net: ClassifierModel,
    place: int,
    made: Candidate,
    labeled: PooledFeatures,
    validation: PooledFeatures | None,
    ridge: float,
    seed: int = 0,
) -> Candidate:
    """A network's own classifier where it is better than `made`: on the validation images, or clearly so on labeled images left out in turn.

    Args:
        net: whose classifier tells the same classes apart.
        place: of its features among those that were seen.
        made: a new classifier for it.
        labeled: what `made` was fitted to.
        validation: to choose on, or None.
        ridge: of the labels' own classifier, which stands for `made` on images that are left out.
        seed: of these.
    """
    own = original_classifier(net)
    if validation is not None and validation.labels is not None:
        right = [
            int((part.logits(validation.features[place]).argmax(1) == validation.labels).sum()) for part in (own, made)
        ]
        return own if right[0] > right[1] else made
    features, labels = labeled.features[place], _labels(labeled)
    return (
        own
        if own_vs_labels_cv(own.logits(features), features, labels, net.classes, ridge, seed).significantly_better
        else made
    )


def fold_candidates(
    own: ClassifierModel,
    unlabeled: PooledFeatures,
    useful: Sequence[int],
    names: Sequence[str],
    ridges: Sequence[float | str],
    seed: int,
) -> list[Candidate]:
    """The classifier with own → peers → own absorbed, for each ridge; no labels."""
    first, found = original_classifier(own), []
    for ridge in ridges:
        made = fit_peer_projection(unlabeled.features[0], unlabeled.select(useful), ridge=ridge, seed=seed)
        layer = copy.deepcopy(own.classifier).cpu().double()
        fold_input_map(layer, own.head, made.matrix, made.shift)
        bias = first.bias if layer.bias is None else layer.bias.detach()
        note = f"ridges {made.ridges[0]:g} and {made.ridges[1]:g}"
        found.append(Candidate(f"fold, {' + '.join(names)}, ridge {ridge}", layer.weight.detach(), bias, note))
    return found


def label_candidates(
    own: ClassifierModel, labeled: PooledFeatures, validation: PooledFeatures | None
) -> list[Candidate]:
    """Ridge classifiers from the labeled images alone: what the labels give without peers or unlabeled images."""
    features, labels = labeled.features[0], _labels(labeled)
    heads = [
        (ridge, ridge_head(features, labels, own.classes, ridge))
        for ridge in (VIEW_RIDGES if validation is not None else VIEW_RIDGES[:1])
    ]
    return [
        replace(_calibrated(f"labels only, ridge {ridge:g}", head, validation), alone=True) for ridge, head in heads
    ]


def consensus_candidates(
    own: ClassifierModel,
    labeled: PooledFeatures,
    unlabeled: PooledFeatures,
    groups: Sequence[Sequence[int]],
    names: Sequence[str],
    recipe: HeadConfig,
    validation: PooledFeatures | None,
    seed: int = 0,
) -> tuple[list[Candidate], list[str]]:
    """The closed form of `consensus_head` for each group of peers; an empty group is self-training. And what the user should know.

    Without validation images the last one is the labels' own classifier where guesses do worse than it on labeled
    images left out in turn.
    """
    labels, index = _labels(labeled), torch.arange(len(labeled))
    found: list[Candidate] = []
    notes: list[str] = []
    for group in groups:
        members = [0, *group]
        every = [
            torch.cat([few, many]) for few, many in zip(labeled.select(members), unlabeled.select(members), strict=True)
        ]
        consensus = ConsensusFeatures.from_views(every, recipe)
        called = f"consensus head, {' + '.join(names[i] for i in group)}" if group else "self-training, no peer"
        for tried, said in _tried(recipe, own.classes, validation):
            head = consensus.head(index, labels, own.classes, tried)
            found.append(replace(_calibrated(f"{called}, {said}", head, validation), recipe=tried))
        if validation is None:
            judged = consensus_vs_labels_cv(consensus, labeled.features[0], index, labels, own.classes, recipe, seed)
            if judged.significantly_worse:
                said = f"guesses on unlabeled images cost {-judged.gain:.1f} ± {judged.error:.1f} points on labeled images left out"
                notes.append(f"{called}: {said}; the labels alone are used. More labels or better peers would help")
                found += [replace(candidate, note=said) for candidate in label_candidates(own, labeled, None)]
    return found, notes


def _tried(recipe: HeadConfig, classes: int, validation: PooledFeatures | None) -> list[tuple[HeadConfig, str]]:
    """The recipe, and where validation images can choose, other ridges, and guesses in the proportions of their classes."""
    if validation is None or validation.labels is None:
        return [(recipe, f"ridge {recipe.head_ridge:g}")]
    found = []
    for ridge in sorted({recipe.head_ridge, *HEAD_RIDGES}):
        found.append((replace(recipe, head_ridge=ridge), f"ridge {ridge:g}"))
        if recipe.class_prior is None:
            shares = tuple(estimate_class_prior(validation.labels, classes).tolist())
            found.append((replace(recipe, head_ridge=ridge, class_prior=shares), f"in proportion, ridge {ridge:g}"))
    return found


def heads_of_peers(
    networks: Sequence[ClassifierModel],
    labeled: PooledFeatures,
    unlabeled: PooledFeatures,
    useful: Sequence[int],
    recipe: HeadConfig,
    validation: PooledFeatures | None,
    alone: bool,
) -> dict[int, nn.Linear]:
    """For each useful peer, by its place among them, what the same consensus makes its classifier, or what the labels alone make it, or its own
    where that is better; float32, on the CPU.
    """
    found: dict[int, nn.Linear] = {}
    for place, i in enumerate(useful):
        members = [i, 0, *(j for j in useful if j != i)]
        labels, classes = _labels(labeled), networks[0].classes
        if alone:
            head = ridge_head(labeled.features[i], labels, classes, recipe.label_ridge)
        else:
            every = [
                torch.cat([few, many])
                for few, many in zip(labeled.select(members), unlabeled.select(members), strict=True)
            ]
            head = ConsensusFeatures.from_views(every, recipe).head(torch.arange(len(labeled)), labels, classes, recipe)
        made = _calibrated(
            "", head, None if validation is None else PooledFeatures(validation.select([i]), validation.labels)
        )
        if networks[i].has_compatible_head(classes):
            made = better_classifier(networks[i], i, made, labeled, validation, recipe.label_ridge)
        found[place] = made.layer()
    return found


def replace_classifier(model: nn.Module, head: str, candidate: Candidate) -> nn.Module:
    """A copy of the network with this classifier, in the network's own dtype and on its device.

    Raises:
        OptionError: a classifier without bias that would need one.
    """
    changed = copy.deepcopy(unwrap_model(model))
    layer = changed.get_submodule(head)
    if not isinstance(layer, nn.Linear):
        raise OptionError(f"layer {head!r} is a {type(layer).__name__}; expected a Linear")
    bias: nn.Parameter | None = layer.bias
    if bias is None and bool(candidate.bias.any()):
        raise OptionError(
            f"the classifier {head!r} has no bias, but its refinement needs one; give the network a classifier with a bias"
        )
    with torch.no_grad():
        layer.weight.copy_(candidate.weight)
        if bias is not None:
            bias.copy_(candidate.bias)
    return changed.eval()


def _labels(seen: PooledFeatures) -> Tensor:
    if seen.labels is None:
        raise OptionError("expected labeled images: pass labeled=")
    return seen.labels


def _calibrated(name: str, head: Head, validation: PooledFeatures | None) -> Candidate:
    """Scores as logits: their temperature is the best on the validation images, or a plain one."""
    if validation is None or validation.labels is None:
        scaled = head.scaled(1 / DEFAULT_INVERSE_TEMPERATURE)
        return Candidate(name, scaled.weight, scaled.bias, "temperature not fitted")
    temperature = best_temperature(head(validation.features[0]), validation.labels)
    scaled = head.scaled(temperature)
    return Candidate(name, scaled.weight, scaled.bias)
