"""Candidate classifiers of a refinement, each in closed form."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from knowiso_train.errors import OptionError
from knowiso_train.features.wrappers import unwrap_model
from knowiso_train.refinement._metrics import best_temperature, consensus_vs_labels_cv, own_vs_labels_cv
from knowiso_train.refinement.folding import fit_peer_projection, fold_input_map
from knowiso_train.refinement.heads import ConsensusFeatures, Head, HeadConfig, estimate_class_prior, ridge_head
from knowiso_train.refinement.models import ClassifierModel, PooledFeatures

HEAD_RIDGES = (1.0, 3.0, 10.0)
LABEL_RIDGES = (0.1, 1.0, 10.0)
# Factor from scores to logits without validation images, on which the temperature could be fitted
DEFAULT_INVERSE_TEMPERATURE = 10.0


@dataclass(frozen=True)
class Candidate:
    """A classifier for the network's pooled features.

    Attributes:
        name: Name in the report.
        weight: (C, D), float64.
        bias: (C,), float64.
        note: Remark for the report.
        from_labels_only: True for a classifier that is fitted to the labels alone.
        head_config: Settings of a consensus head. None: another kind of classifier.
    """

    name: str
    weight: Tensor
    bias: Tensor
    note: str = ""
    from_labels_only: bool = False
    head_config: HeadConfig | None = None

    def logits(self, features: Tensor) -> Tensor:
        """Compute logits (N, C) from features (N, D)."""
        return features.double() @ self.weight.T + self.bias

    def num_correct(self, pooled: PooledFeatures, network: int = 0) -> int:
        """Count the images that the classifier assigns to their class.

        Args:
            pooled: Labeled images.
            network: Index of the network whose features the classifier takes.
        """
        return int((self.logits(pooled.features[network]).argmax(1) == pooled.require_labels()).sum())

    def layer(self) -> nn.Linear:
        """Return the classifier as a frozen float32 layer."""
        # On "meta" and without initialization: the random state is not advanced
        layer = nn.Linear(self.weight.shape[1], self.weight.shape[0], device="meta").to_empty(device="cpu")
        layer.requires_grad_(False)
        layer.weight.copy_(self.weight)
        layer.bias.copy_(self.bias)
        return layer


def original_classifier(model: ClassifierModel) -> Candidate:
    """Return the network's present classifier as a candidate."""
    layer = model.classifier
    weight = layer.weight.detach().cpu().double()
    bias = torch.zeros(len(weight), dtype=torch.float64) if layer.bias is None else layer.bias.detach().cpu().double()
    return Candidate("original", weight, bias)


def better_classifier(
    model: ClassifierModel,
    network: int,
    new: Candidate,
    labeled: PooledFeatures,
    validation: PooledFeatures | None,
    ridge: float,
    seed: int = 0,
) -> Candidate:
    """Choose between a network's present classifier and a new one.

    With validation images the higher accuracy there decides. Without them the present classifier is chosen where it is
    significantly better than a ridge classifier in cross-validation on the labeled images.

    Args:
        model: Network, with a classifier of the same classes.
        network: Index of its features.
        new: New classifier.
        labeled: Images that the new classifier is fitted to.
        validation: Images to choose on, or None.
        ridge: Ridge of the classifier that represents the new one in cross-validation.
        seed: Seed of the folds.
    """
    present = original_classifier(model)
    if validation is not None:
        return present if present.num_correct(validation, network) > new.num_correct(validation, network) else new
    features, labels = labeled.features[network], labeled.require_labels()
    cv = own_vs_labels_cv(present.logits(features), features, labels, model.num_classes, ridge, seed)
    return present if cv.significantly_better else new


def fold_candidates(
    model: ClassifierModel,
    unlabeled: PooledFeatures,
    peers: Sequence[int],
    names: Sequence[str],
    ridges: Sequence[float | Literal["search"]],
    seed: int,
) -> list[Candidate]:
    """Fold the map from the network to its peers and back into the classifier, for each ridge. No labels.

    Args:
        model: Network to refine.
        unlabeled: Features of all networks.
        peers: Indices of the peers.
        names: Names of the peers.
        ridges: Ridges of the map.
        seed: Seed of the ridge search.
    """
    original, candidates = original_classifier(model), []
    for ridge in ridges:
        projection = fit_peer_projection(unlabeled.features[0], unlabeled.select(peers), ridge=ridge, seed=seed)
        layer = copy.deepcopy(model.classifier).cpu().double()
        fold_input_map(layer, model.head, projection.matrix, projection.shift)
        bias = original.bias if layer.bias is None else layer.bias.detach()
        note = f"ridges {projection.ridges[0]:g} and {projection.ridges[1]:g}"
        candidates.append(Candidate(f"fold, {' + '.join(names)}, ridge {ridge}", layer.weight.detach(), bias, note))
    return candidates


def label_candidates(
    model: ClassifierModel, labeled: PooledFeatures, validation: PooledFeatures | None
) -> list[Candidate]:
    """Fit ridge classifiers to the labeled images alone: the baseline without peers and without unlabeled images."""
    features, labels = labeled.features[0], labeled.require_labels()
    candidates = []
    for ridge in LABEL_RIDGES if validation is not None else LABEL_RIDGES[:1]:
        head = ridge_head(features, labels, model.num_classes, ridge)
        candidate = _calibrate(f"labels only, ridge {ridge:g}", head, validation)
        candidates.append(replace(candidate, from_labels_only=True))
    return candidates


def consensus_candidates(
    model: ClassifierModel,
    labeled: PooledFeatures,
    unlabeled: PooledFeatures,
    groups: Sequence[Sequence[int]],
    names: Sequence[str],
    config: HeadConfig,
    validation: PooledFeatures | None,
    seed: int = 0,
) -> tuple[list[Candidate], list[str]]:
    """Fit the consensus head with each group of peers.

    Without validation images, a group whose consensus is significantly worse than the labels alone in cross-validation
    is followed by the classifier of the labels alone.

    Args:
        model: Network to refine.
        labeled: Labeled images.
        unlabeled: Images without labels.
        groups: Indices of each group's peers. An empty group: self-training.
        names: Names of all networks.
        config: Settings of the head.
        validation: Images to choose settings on, or None.
        seed: Seed of the folds.

    Returns:
        Candidates, and notes for the user.
    """
    labels, index = labeled.require_labels(), torch.arange(len(labeled))
    candidates: list[Candidate] = []
    notes: list[str] = []
    for group in groups:
        consensus = ConsensusFeatures.from_views(_joined(labeled, unlabeled, [0, *group]), config)
        title = f"consensus head, {' + '.join(names[i] for i in group)}" if group else "self-training, no peer"
        for variant, description in _head_variants(config, model.num_classes, validation):
            head = consensus.head(index, labels, model.num_classes, variant)
            candidate = _calibrate(f"{title}, {description}", head, validation)
            candidates.append(replace(candidate, head_config=variant))
        if validation is None:
            features = labeled.features[0]
            cv = consensus_vs_labels_cv(consensus, features, index, labels, model.num_classes, config, seed)
            if cv.significantly_worse:
                loss = (
                    f"pseudo-labels cost {-cv.gain:.1f} ± {cv.std_error:.1f} points in cross-validation on the labeled "
                    "images"
                )
                notes.append(f"{title}: {loss}; the labels alone are used. More labels or better peers would help")
                candidates += [replace(candidate, note=loss) for candidate in label_candidates(model, labeled, None)]
    return candidates, notes


def heads_of_peers(
    models: Sequence[ClassifierModel],
    labeled: PooledFeatures,
    unlabeled: PooledFeatures,
    peers: Sequence[int],
    config: HeadConfig,
    validation: PooledFeatures | None,
    from_labels_only: bool,
) -> dict[int, nn.Linear]:
    """Fit a classifier of the network's classes to every useful peer, as a teacher.

    A peer's present classifier is kept where it has these classes and is better.

    Args:
        models: First the network to refine, then its peers.
        labeled: Labeled images.
        unlabeled: Images without labels.
        peers: Indices of the useful peers.
        config: Settings of the head.
        validation: Images to choose and calibrate on, or None.
        from_labels_only: Fit to the labels alone, not to the consensus.

    Returns:
        By position in `peers`, a float32 layer on the CPU.
    """
    labels, num_classes = labeled.require_labels(), models[0].num_classes
    layers: dict[int, nn.Linear] = {}
    for position, i in enumerate(peers):
        if from_labels_only:
            head = ridge_head(labeled.features[i], labels, num_classes, config.label_ridge)
        else:
            # The consensus of the same networks, with this peer as the network to refine
            members = [i, 0, *(j for j in peers if j != i)]
            consensus = ConsensusFeatures.from_views(_joined(labeled, unlabeled, members), config)
            head = consensus.head(torch.arange(len(labeled)), labels, num_classes, config)
        of_peer = None if validation is None else PooledFeatures(validation.select([i]), validation.labels)
        candidate = _calibrate("", head, of_peer)
        if models[i].has_compatible_head(num_classes):
            candidate = better_classifier(models[i], i, candidate, labeled, validation, config.label_ridge)
        layers[position] = candidate.layer()
    return layers


def replace_classifier(module: nn.Module, head: str, candidate: Candidate) -> nn.Module:
    """Return a copy of the network with another classifier, in the network's own dtype and on its device.

    Args:
        module: Network. It is not modified.
        head: Name of its classifier.
        candidate: New classifier.

    Raises:
        OptionError: Not a Linear, or one without the bias that the candidate needs.
    """
    changed = copy.deepcopy(unwrap_model(module))
    layer = changed.get_submodule(head)
    if not isinstance(layer, nn.Linear):
        raise OptionError(f"layer {head!r} is a {type(layer).__name__}; expected a Linear")
    bias: nn.Parameter | None = layer.bias
    if bias is None and bool(candidate.bias.any()):
        raise OptionError(
            f"the classifier {head!r} has no bias, but its refinement needs one; give the network a classifier with a "
            "bias"
        )
    with torch.no_grad():
        layer.weight.copy_(candidate.weight)
        if bias is not None:
            bias.copy_(candidate.bias)
    return changed.eval()


def _head_variants(
    config: HeadConfig, num_classes: int, validation: PooledFeatures | None
) -> list[tuple[HeadConfig, str]]:
    """List the settings to compare on validation images, with descriptions: ridges, and the prior of their classes."""
    if validation is None:
        return [(config, f"ridge {config.head_ridge:g}")]
    prior = tuple(estimate_class_prior(validation.require_labels(), num_classes).tolist())
    variants = []
    for ridge in sorted({config.head_ridge, *HEAD_RIDGES}):
        variants.append((replace(config, head_ridge=ridge), f"ridge {ridge:g}"))
        if config.class_prior is None:
            variants.append((replace(config, head_ridge=ridge, class_prior=prior), f"class prior, ridge {ridge:g}"))
    return variants


def _joined(labeled: PooledFeatures, unlabeled: PooledFeatures, networks: Sequence[int]) -> list[Tensor]:
    """Concatenate labeled and unlabeled features of some networks, the labeled images first."""
    pairs = zip(labeled.select(networks), unlabeled.select(networks), strict=True)
    return [torch.cat([with_labels, without]) for with_labels, without in pairs]


def _calibrate(name: str, head: Head, validation: PooledFeatures | None) -> Candidate:
    """Turn scores into logits, by the best temperature on the validation images or a default one."""
    if validation is None:
        scaled = head.scaled(1 / DEFAULT_INVERSE_TEMPERATURE)
        return Candidate(name, scaled.weight, scaled.bias, "temperature not fitted")
    temperature = best_temperature(head(validation.features[0]), validation.require_labels())
    scaled = head.scaled(temperature)
    return Candidate(name, scaled.weight, scaled.bias)
