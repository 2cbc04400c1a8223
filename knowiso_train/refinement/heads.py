"""Classifier heads from a few labels and shared features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from knowiso_train.errors import NonFiniteError, OptionError, ShapeError
from knowiso_train.regression.ridge import RidgeSolver, ridge_map

PRIOR_INVERSE_TEMPERATURE = (
    12.0  # inverse_temperature at which proportions are counted where guesses are all or nothing
)
PRIOR_ITERATIONS = 20
MIN_PROBABILITY = 1e-12


@dataclass(frozen=True)
class FeatureScaling:
    """`(x - mean) / scale`: mean 0 and a mean variance of 1 over the channels; one scale for all, so directions keep their relative sizes."""

    mean: Tensor
    scale: float

    @classmethod
    def fit(cls, features: Tensor, name: str = "the features") -> FeatureScaling:
        """Of rows (N, D).

        Raises:
            ShapeError: not (N, D) with at least two rows.
            NonFiniteError: NaN or Inf.
        """
        if features.ndim != 2 or len(features) < 2:
            raise ShapeError(
                f"{name}: expected (images, channels) with two images or more, got {tuple(features.shape)}"
            )
        rows = features.double()
        if not bool(rows.isfinite().all()):
            raise NonFiniteError(f"{name}: NaN or Inf in the features; check the images and the weights")
        mean = rows.mean(0)
        scale = float((rows - mean).square().mean().sqrt())
        return cls(mean, scale if scale > 0 else 1.0)

    def __call__(self, features: Tensor) -> Tensor:
        """Rows (N, D) in float64."""
        return (features.double() - self.mean) / self.scale


def isomorphic_parts(views: Sequence[Tensor], ridge: float, width: int | None = None) -> list[Tensor]:
    """Of every view the part from which the others can be told at order 0, as features of its own: (D_i, w) maps, one for each view.

    The regression of all other views on view i has the coefficients A_i; the part is `x A_i`, and the map returned is
    B_i with `B_i B_iᵀ = A_i A_iᵀ`:
    all scalar products of `x A_i`, in no more columns than view i has. What no other view knows is shrunk; what they
    agree on stays.

    Args:
        views: rows (N, D_i), centered, two views or more.
        ridge: relative, of the regressions.
        width: keep this many principal components of each part; None keeps all.

    Raises:
        ShapeError: fewer than two views, or other numbers of images.

    Source: order-0 components of arXiv 1908.01581, in both directions; multi-view regression, Kakade & Foster (COLT
        2007).

    Example:
        >>> shared, noise = torch.randn(200, 2).double(), torch.randn(2, 200, 3).double()
        >>> views = [torch.cat([shared, own], 1) for own in noise]  # two shared channels, three private ones
        >>> size = isomorphic_parts(views, 1e-3)[0].norm(dim=1)
        >>> bool(size[:2].min() > 3 * size[2:].max())
        True
    """
    if len(views) < 2 or len({len(view) for view in views}) != 1:
        raise ShapeError(
            f"expected two views or more of the same images, got shapes {[tuple(view.shape) for view in views]}"
        )
    found = []
    for i, view in enumerate(views):
        others = torch.cat([other for j, other in enumerate(views) if j != i], 1)
        coefficients = ridge_map(view, others, ridge)
        values, vectors = torch.linalg.eigh(coefficients @ coefficients.T)
        part = vectors * values.clamp(min=0).sqrt()
        if width is not None and width < part.shape[1]:
            rows = view @ part
            part = part @ torch.linalg.eigh(rows.T @ rows)[1][:, -width:]
        size = (view @ part).square().sum(1).mean().sqrt()
        found.append(part / size.clamp_min(torch.finfo(part.dtype).tiny))
    return found


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """(N,) → (N, classes), float64."""
    return F.one_hot(labels, classes).double()


def pseudo_labels(scores: Tensor, inverse_temperature: float, shares: Tensor | None = None) -> Tensor:
    """Scores that approximate probabilities, made decided: `softmax(inverse_temperature · scores)`, or the first guess where inverse_temperature is infinite.

    Guesses favor some classes, and classifiers fitted to them favor them more. With `shares`, a bias for each class
    brings the guesses to these
    proportions (distribution alignment, Berthelot et al. 2020; as one half of Sinkhorn's iteration, the sums of the
    images being one).

    Args:
        scores: (N, C).
        inverse_temperature: of the guesses.
        shares: (C,) > 0, of the classes among the images.

    Example:
        >>> pseudo_labels(torch.tensor([[0.2, 0.4]]), float("inf"))
        tensor([[0., 1.]], dtype=torch.float64)
        >>> scores = torch.tensor([[0.0, 0.4], [0.0, 0.3], [0.0, 0.2], [0.0, 0.1]])
        >>> pseudo_labels(scores, float("inf"), torch.tensor([0.5, 0.5])).argmax(1)
        tensor([1, 1, 0, 0])
    """
    hard = inverse_temperature == float("inf")
    decided = scores.double() * (PRIOR_INVERSE_TEMPERATURE if hard else inverse_temperature)
    if shares is not None and len(scores):
        wanted, bias = (
            (shares.double() / shares.sum()).log(),
            torch.zeros(scores.shape[1], dtype=torch.float64, device=scores.device),
        )
        for _ in range(PRIOR_ITERATIONS):
            bias = bias + wanted - (decided + bias).softmax(1).mean(0).clamp_min(MIN_PROBABILITY).log()
        decided = decided + bias
    return one_hot(decided.argmax(1), scores.shape[1]) if hard else decided.softmax(1)


def estimate_class_prior(labels: Tensor, classes: int) -> Tensor:
    """(C,) among some labels, each class counted once more than it was seen.

    Example:
        >>> estimate_class_prior(torch.tensor([0, 0, 1]), 3).tolist()
        [0.5, 0.3333333333333333, 0.16666666666666666]
    """
    counts = torch.bincount(labels, minlength=classes).double() + 1
    return counts / counts.sum()


@dataclass(frozen=True)
class HeadConfig:
    """Settings of `consensus_head`; the defaults were chosen on other images than any that figures are reported on.

    Attributes:
        view_ridge: of the order-0 maps between the networks, relative; larger keeps only what peers know well.
        label_ridge: of the first classifier, on the labeled images.
        pseudo_label_ridge: of the classifiers on all images.
        head_ridge: of the network's own classifier, on all images.
        inverse_temperature: how decided the pseudo-labels are; infinite takes the first guess.
        class_prior: of the classes among the images, where they are known, or "uniform": pseudo-labels are brought to these
            proportions, which is worth much.
            Wrong ones do harm: None leaves the guesses. Few labels, drawn class by class, say nothing of them; `refine`
                takes those of validation
            images.
        num_rounds: pseudo-labels are made this often.
        max_components: most components kept of each network's part.

    Raises:
        OptionError: a value without meaning.
    """

    view_ridge: float = 0.3
    label_ridge: float = 0.1
    pseudo_label_ridge: float = 0.3
    head_ridge: float = 1.0
    inverse_temperature: float = 12.0
    class_prior: tuple[float, ...] | str | None = None
    num_rounds: int = 3
    max_components: int = 256

    def __post_init__(self) -> None:
        for name in ("view_ridge", "label_ridge", "pseudo_label_ridge", "head_ridge", "inverse_temperature"):
            if not getattr(self, name) > 0:
                raise OptionError(f"{name} must be positive, got {getattr(self, name)!r}")
        if isinstance(self.class_prior, str) and self.class_prior != "uniform":
            raise OptionError(
                f'class_prior must be the classes\' proportions, "uniform" or None, got {self.class_prior!r}'
            )
        if (
            not isinstance(self.class_prior, str)
            and self.class_prior is not None
            and not (len(self.class_prior) and all(share > 0 for share in self.class_prior))
        ):
            raise OptionError(f"class_prior must be a positive number for each class, got {self.class_prior!r}")
        for name in ("num_rounds", "max_components"):
            if (
                isinstance(getattr(self, name), bool)
                or not isinstance(getattr(self, name), int)
                or getattr(self, name) < 1
            ):
                raise OptionError(f"{name} must be an integer of at least 1, got {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Head:
    """A linear classifier on a network's pooled features.

    Attributes:
        weight: (classes, channels), float64.
        bias: (classes,), float64.
        targets: (images, classes), what it was fitted to.
    """

    weight: Tensor
    bias: Tensor
    targets: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Scores (N, classes) that approximate probabilities."""
        return features.double() @ self.weight.T + self.bias

    def scaled(self, temperature: float) -> Head:
        """Scores divided by a temperature, as logits: the guess stays, the confidence changes."""
        return Head(self.weight / temperature, self.bias / temperature, self.targets)


def ridge_head(features: Tensor, labels: Tensor, classes: int, ridge: float = 0.1) -> Head:
    """Ridge regression of the classes on a network's features: what refinement has to beat.

    Args:
        features: (N, D), pooled.
        labels: (N,).
        classes: C.
        ridge: relative.

    Raises:
        ShapeError: labels that do not fit features or classes.

    Example:
        >>> x = torch.eye(4).repeat(3, 1)
        >>> ridge_head(x, x.argmax(1), 4)(x).argmax(1).equal(x.argmax(1))
        True
    """
    check_labels(features, labels, classes)
    scaling = FeatureScaling.fit(features, "the labeled images")
    targets = one_hot(labels, classes)
    return _unscaled(*RidgeSolver(scaling(features)).solve(targets, ridge), scaling, targets)


def consensus_head(
    labeled: Sequence[Tensor],
    labels: Tensor,
    unlabeled: Sequence[Tensor],
    classes: int,
    recipe: HeadConfig | None = None,
) -> Head:
    """The classifier of the first network, fitted to what all of them together make of all images. The peers are not needed afterwards.

    1. Of every network's features, the isomorphic part: what tells the other networks' features at order 0
    (`isomorphic_parts`).
    2. A ridge classifier on these parts side by side, from the labeled images, gives the others pseudo-labels; fitted
    to all, it gives better ones.
    3. The first network's own classifier is the ridge regression of them on its own features: the order-0 isomorphic
    part of the ensemble's decision.
       Linear in its features, it costs nothing at inference.

    With one network there are no peers to agree with, and this is self-training.

    Args:
        labeled: features (n, D_i) of the labeled images, first the network that is refined, then its peers.
        labels: (n,).
        unlabeled: features (N, D_i) of the others, in the same order; N may be 0.
        classes: C.
        recipe: settings.

    Raises:
        ShapeError: features or labels that do not fit each other.
        NonFiniteError: NaN or Inf.

    Source: arXiv 1908.01581 for the isomorphic part; co-training (Blum & Mitchell 1998), multi-view regression (Kakade
        & Foster 2007).

    Example:
        >>> labels = torch.arange(300) % 2
        >>> networks = [torch.cat([labels[:, None] * 4.0, 2 * torch.randn(300, 6)], 1) for _ in range(3)]
        >>> head = consensus_head([x[:8] for x in networks], labels[:8], [x[8:] for x in networks], 2)
        >>> bool((head(networks[0]).argmax(1) == labels).float().mean() > 0.8)
        True
    """
    if not labeled or len(labeled) != len(unlabeled):
        raise ShapeError(
            f"expected labeled and unlabeled features of the same networks, got {len(labeled)} and {len(unlabeled)}"
        )
    for i, (few, many) in enumerate(zip(labeled, unlabeled, strict=True)):
        check_labels(few, labels, classes)
        if many.ndim != 2 or few.shape[1] != many.shape[1] or len(many) != len(unlabeled[0]):
            raise ShapeError(
                f"network {i}: labeled features {tuple(few.shape)} and unlabeled ones {tuple(many.shape)} do not fit"
            )
    recipe = recipe or HeadConfig()
    every = [torch.cat([few.double(), many.double()]) for few, many in zip(labeled, unlabeled, strict=True)]
    return ConsensusFeatures.from_views(every, recipe).head(torch.arange(len(labels)), labels, classes, recipe)


class ConsensusFeatures:
    """The images of `consensus_head`, prepared once for any number of sets of labels.

    Args:
        own: (N, D) features of the network that is refined.
        together: (N, M) features from which pseudo-labels are made.

    Example:
        >>> x = torch.randn(60, 4)
        >>> ConsensusFeatures.from_views([x, x + 0.1]).head(torch.arange(6), torch.tensor([0, 1, 0, 1, 0, 1]), 2).weight.shape
        torch.Size([2, 4])
    """

    def __init__(self, own: Tensor, together: Tensor) -> None:
        self.scaling = FeatureScaling.fit(own, "the network")
        self.own = RidgeSolver(self.scaling(own))
        self.together = together.double()
        self._smoother: RidgeSolver | None = None

    @classmethod
    def from_views(cls, features: Sequence[Tensor], recipe: HeadConfig | None = None) -> ConsensusFeatures:
        """From features (N, D_i) of all images, first the network that is refined; with one network alone it is its own peer.

        Raises:
            ShapeError: features of different images.
            NonFiniteError: NaN or Inf.
        """
        recipe = recipe or HeadConfig()
        views = [FeatureScaling.fit(rows, f"network {i}")(rows) for i, rows in enumerate(features)]
        if len(views) == 1:
            return cls(features[0], views[0])
        parts = isomorphic_parts(views, recipe.view_ridge, recipe.max_components)
        return cls(features[0], torch.cat([view @ part for view, part in zip(views, parts, strict=True)], 1))

    def head(self, index: Tensor, labels: Tensor, classes: int, recipe: HeadConfig | None = None) -> Head:
        """The network's classifier, from the labels (n,) of the images at `index` (n,)."""
        recipe = recipe or HeadConfig()
        check_labels(index, labels, classes)
        known = one_hot(labels, classes)
        targets = known
        if len(index) < len(self.together):
            weight, bias = RidgeSolver(self.together[index]).solve(known, recipe.label_ridge)
            scores, shares = self.together @ weight + bias, _shares(recipe, classes)
            for left in reversed(range(recipe.num_rounds)):
                targets = pseudo_labels(scores, recipe.inverse_temperature, shares)
                targets[index] = known
                if left:
                    scores = self._on_all().predict(targets, recipe.pseudo_label_ridge)
        else:
            targets = torch.zeros_like(known).index_copy_(0, index, known)
        return _unscaled(*self.own.solve(targets, recipe.head_ridge), self.scaling, targets)

    def _on_all(self) -> RidgeSolver:
        if self._smoother is None:
            self._smoother = RidgeSolver(self.together)
        return self._smoother


def _shares(recipe: HeadConfig, classes: int) -> Tensor | None:
    if recipe.class_prior is None:
        return None
    shares = [1.0] * classes if isinstance(recipe.class_prior, str) else recipe.class_prior
    if len(shares) != classes:
        raise ShapeError(f"expected class_prior of {classes} classes, got {len(shares)}")
    return torch.tensor(shares, dtype=torch.float64)


def _unscaled(weight: Tensor, bias: Tensor, scaling: FeatureScaling, targets: Tensor) -> Head:
    """From standardized features (D, C) to the network's own (C, D)."""
    own = weight.T / scaling.scale
    return Head(own, bias - own @ scaling.mean, targets)


def check_labels(features: Tensor, labels: Tensor, classes: int) -> None:
    if labels.ndim != 1 or len(labels) != len(features) or labels.is_floating_point():
        raise ShapeError(
            f"expected one integer label for each of {len(features)} images, got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
        raise ShapeError(f"labels must lie in 0 … {classes - 1}, got {int(labels.min())} … {int(labels.max())}")
