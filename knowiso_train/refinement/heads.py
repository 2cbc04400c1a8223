"""Linear classifiers from a few labels and from features that several networks share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from knowiso_train.errors import NonFiniteError, OptionError, ShapeError
from knowiso_train.regression.ridge import RidgeSolver, ridge_map
from knowiso_train.utils.validation import PositiveFloat, PositiveInt, validate_fields

PRIOR_INVERSE_TEMPERATURE = 12.0  # inverse temperature of class counts where pseudo-labels are hard
PRIOR_ITERATIONS = 20
MIN_PROBABILITY = 1e-12


@dataclass(frozen=True)
class FeatureScaling:
    """Affine map `(x - mean) / scale` to mean 0 and a mean variance of 1 over the channels.

    One scale for all channels keeps the relative sizes of directions, on which ridge regression depends.

    Attributes:
        mean: (D,), float64.
        scale: Root of the channels' mean variance.
    """

    mean: Tensor
    scale: float

    @classmethod
    def fit(cls, features: Tensor, name: str = "the features") -> FeatureScaling:
        """Fit the map to features (N, D).

        Args:
            features: (N, D).
            name: Name of the features in messages.

        Raises:
            ShapeError: Not (N, D) with at least two images.
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
        """Scale features (N, D), in float64."""
        return (features.double() - self.mean) / self.scale


def isomorphic_parts(views: Sequence[Tensor], ridge: float, max_components: int | None = None) -> list[Tensor]:
    """Map every view to its order-0 isomorphic part: the directions that predict the other views linearly.

    The ridge regression of all other views on view i has coefficients A_i. Its predictions `x A_i` shrink directions
    that no other view shares. Where the other views have more channels in total than view i, `x A_i` is redundant;
    `x B_i` with `B_i B_iᵀ = A_i A_iᵀ` has the same scalar products in D_i columns.

    Args:
        views: (N, D_i) centered features of the same images, two views or more.
        ridge: Ridge of the regressions, relative to the mean diagonal of the Gram matrix.
        max_components: Maximal number of principal components of each part. None: all.

    Returns:
        (D_i, K_i) map of each view, scaled so that the part's rows have a mean squared norm of 1.

    Raises:
        ShapeError: Fewer than two views, or different numbers of images.

    References:
        Liang et al., arXiv 1908.01581 (order-0 components, here in both directions); Kakade & Foster, *Multi-view
        Regression via Canonical Correlation Analysis* (COLT 2007).

    Examples:
        >>> shared, noise = torch.randn(200, 2).double(), torch.randn(2, 200, 3).double()
        >>> views = [torch.cat([shared, private], 1) for private in noise]
        >>> size = isomorphic_parts(views, 1e-3)[0].norm(dim=1)
        >>> bool(size[:2].min() > 3 * size[2:].max())
        True
    """
    if len(views) < 2 or len({len(view) for view in views}) != 1:
        raise ShapeError(
            f"expected two views or more of the same images, got shapes {[tuple(view.shape) for view in views]}"
        )
    maps = []
    for i, view in enumerate(views):
        others = torch.cat([other for j, other in enumerate(views) if j != i], 1)
        coefficients = ridge_map(view, others, ridge)
        # B = V √Λ from the eigendecomposition A Aᵀ = V Λ Vᵀ
        values, vectors = torch.linalg.eigh(coefficients @ coefficients.T)
        part = vectors * values.clamp(min=0).sqrt()
        if max_components is not None and max_components < part.shape[1]:
            projected = view @ part
            # eigh sorts in ascending order: the last columns are the leading principal components
            part = part @ torch.linalg.eigh(projected.T @ projected)[1][:, -max_components:]
        norm = (view @ part).square().sum(1).mean().sqrt()
        maps.append(part / norm.clamp_min(torch.finfo(part.dtype).tiny))
    return maps


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Encode labels (N,) as indicator vectors (N, num_classes), float64."""
    return F.one_hot(labels, num_classes).double()


def pseudo_labels(scores: Tensor, inverse_temperature: float, class_prior: Tensor | None = None) -> Tensor:
    """Compute pseudo-labels `softmax(inverse_temperature · scores + bias)`, hard at an infinite inverse temperature.

    Predictions favor some classes, and classifiers fitted to them favor these more. With a class prior, one bias per
    class brings the mean of the pseudo-labels to the prior (distribution alignment; one half of a Sinkhorn iteration).

    Args:
        scores: (N, C) scores that approximate probabilities.
        inverse_temperature: Sharpness of the pseudo-labels; `inf` gives hard labels (argmax).
        class_prior: (C,) positive frequencies of the classes. None: no bias.

    Returns:
        (N, C), float64.

    References:
        Berthelot et al., *ReMixMatch* (ICLR 2020), for distribution alignment.

    Examples:
        >>> pseudo_labels(torch.tensor([[0.2, 0.4]]), float("inf"))
        tensor([[0., 1.]], dtype=torch.float64)
        >>> scores = torch.tensor([[0.0, 0.4], [0.0, 0.3], [0.0, 0.2], [0.0, 0.1]])
        >>> pseudo_labels(scores, float("inf"), torch.tensor([0.5, 0.5])).argmax(1)
        tensor([1, 1, 0, 0])
    """
    hard = inverse_temperature == float("inf")
    # Class frequencies of hard labels are piecewise constant in the bias, so the bias is found on soft labels
    logits = scores.double() * (PRIOR_INVERSE_TEMPERATURE if hard else inverse_temperature)
    if class_prior is not None and len(scores):
        log_prior = (class_prior.double() / class_prior.sum()).log()
        bias = torch.zeros(scores.shape[1], dtype=torch.float64, device=scores.device)
        for _ in range(PRIOR_ITERATIONS):
            # Fixed point: b ← b + log π − log mean_n softmax(z_n + b)
            bias = bias + log_prior - (logits + bias).softmax(1).mean(0).clamp_min(MIN_PROBABILITY).log()
        logits = logits + bias
    return one_hot(logits.argmax(1), scores.shape[1]) if hard else logits.softmax(1)


def estimate_class_prior(labels: Tensor, num_classes: int) -> Tensor:
    """Estimate class frequencies (C,) from labels, with one added count per class (Laplace smoothing).

    Examples:
        >>> estimate_class_prior(torch.tensor([0, 0, 1]), 3).tolist()
        [0.5, 0.3333333333333333, 0.16666666666666666]
    """
    counts = torch.bincount(labels, minlength=num_classes).double() + 1
    return counts / counts.sum()


@dataclass(frozen=True)
class HeadConfig:
    """Settings of `consensus_head`.

    The defaults were selected on images that no reported figure uses.

    Attributes:
        view_ridge: Ridge of the maps between the networks. Larger values keep only what the peers predict well.
        label_ridge: Ridge of the first classifier, on the labeled images.
        pseudo_label_ridge: Ridge of the classifiers on all images.
        head_ridge: Ridge of the network's own classifier, on all images.
        inverse_temperature: Sharpness of the pseudo-labels; `inf` gives hard labels (argmax).
        class_prior: Class frequencies that pseudo-labels are brought to: one positive number per class, or "uniform".
            A correct prior raises accuracy, a wrong one lowers it. None: the predictions as they are; `refine` also
            tries the frequencies of validation images.
        num_rounds: Number of times that pseudo-labels are computed.
        max_components: Maximal number of components of each network's isomorphic part.

    Raises:
        OptionError: An option out of bounds.
    """

    view_ridge: PositiveFloat = 0.3
    label_ridge: PositiveFloat = 0.1
    pseudo_label_ridge: PositiveFloat = 0.3
    head_ridge: PositiveFloat = 1.0
    inverse_temperature: PositiveFloat = 12.0
    class_prior: tuple[PositiveFloat, ...] | Literal["uniform"] | None = None
    num_rounds: PositiveInt = 3
    max_components: PositiveInt = 256

    def __post_init__(self) -> None:
        validate_fields(self)
        if self.class_prior is not None and not len(self.class_prior):
            raise OptionError("HeadConfig: class_prior must have one positive number per class, got none")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a dictionary."""
        return asdict(self)

    def prior_tensor(self, num_classes: int) -> Tensor | None:
        """Return the class prior as a tensor (C,).

        Raises:
            ShapeError: A prior of another number of classes.
        """
        if self.class_prior is None:
            return None
        frequencies = [1.0] * num_classes if isinstance(self.class_prior, str) else self.class_prior
        if len(frequencies) != num_classes:
            raise ShapeError(f"expected class_prior of {num_classes} classes, got {len(frequencies)}")
        return torch.tensor(frequencies, dtype=torch.float64)


@dataclass(frozen=True)
class Head:
    """A linear classifier on a network's pooled features.

    Attributes:
        weight: (C, D), float64.
        bias: (C,), float64.
        targets: (N, C) regression targets of the fit.
    """

    weight: Tensor
    bias: Tensor
    targets: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Compute scores (N, C) that approximate probabilities, from features (N, D)."""
        return features.double() @ self.weight.T + self.bias

    def scaled(self, temperature: float) -> Head:
        """Return the classifier with its scores divided by a temperature. Predictions do not change."""
        return Head(self.weight / temperature, self.bias / temperature, self.targets)


def ridge_head(features: Tensor, labels: Tensor, num_classes: int, ridge: float = 0.1) -> Head:
    """Fit a classifier to labels by ridge regression of the indicator vectors; the baseline of refinement.

    Args:
        features: (N, D) pooled features.
        labels: (N,).
        num_classes: Number of classes C.
        ridge: Relative ridge.

    Raises:
        ShapeError: Labels that do not fit the features or the classes.

    Examples:
        >>> x = torch.eye(4).repeat(3, 1)
        >>> ridge_head(x, x.argmax(1), 4)(x).argmax(1).equal(x.argmax(1))
        True
    """
    check_labels(features, labels, num_classes)
    scaling = FeatureScaling.fit(features, "the labeled images")
    targets = one_hot(labels, num_classes)
    return _unscale(*RidgeSolver(scaling(features)).solve(targets, ridge), scaling, targets)


def consensus_head(
    labeled: Sequence[Tensor],
    labels: Tensor,
    unlabeled: Sequence[Tensor],
    num_classes: int,
    config: HeadConfig | None = None,
) -> Head:
    """Fit the first network's classifier to pseudo-labels of all networks together.

    The peers are not needed afterwards.

    1. The isomorphic part of every network's features is computed (`isomorphic_parts`).
    2. A ridge classifier on these parts side by side, from the labeled images, gives the other images pseudo-labels.
       Refitted to all images, it gives better ones.
    3. The network's own classifier is the ridge regression of the pseudo-labels on its own features. It is the order-0
       isomorphic part of the ensemble's decision, and costs nothing at inference.

    With one network alone this is self-training.

    Args:
        labeled: (n, D_i) features of the labeled images, first the network to refine, then its peers.
        labels: (n,).
        unlabeled: (N, D_i) features of the other images, in the same order. N may be 0.
        num_classes: Number of classes C.
        config: Settings.

    Raises:
        ShapeError: Features or labels that do not fit each other.
        NonFiniteError: NaN or Inf.

    References:
        Liang et al., arXiv 1908.01581 (isomorphic parts); Blum & Mitchell, *Combining Labeled and Unlabeled Data with
        Co-Training* (COLT 1998).

    Examples:
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
    for i, (with_labels, without) in enumerate(zip(labeled, unlabeled, strict=True)):
        check_labels(with_labels, labels, num_classes)
        if without.ndim != 2 or with_labels.shape[1] != without.shape[1] or len(without) != len(unlabeled[0]):
            raise ShapeError(
                f"network {i}: labeled features {tuple(with_labels.shape)} and unlabeled ones {tuple(without.shape)} "
                "do not fit"
            )
    config = config or HeadConfig()
    views = [torch.cat([a.double(), b.double()]) for a, b in zip(labeled, unlabeled, strict=True)]
    return ConsensusFeatures.from_views(views, config).head(torch.arange(len(labels)), labels, num_classes, config)


class ConsensusFeatures:
    """Features of all images, prepared for `consensus_head` with any number of label sets.

    Args:
        features: (N, D) features of the network to refine.
        joint: (N, M) features of all networks side by side, from which pseudo-labels are made.

    Examples:
        >>> x, labels = torch.randn(60, 4), torch.tensor([0, 1, 0, 1, 0, 1])
        >>> ConsensusFeatures.from_views([x, x + 0.1]).head(torch.arange(6), labels, 2).weight.shape
        torch.Size([2, 4])
    """

    def __init__(self, features: Tensor, joint: Tensor) -> None:
        self.scaling = FeatureScaling.fit(features, "the network")
        self.solver = RidgeSolver(self.scaling(features))
        self.joint = joint.double()
        self._joint_solver: RidgeSolver | None = None

    @classmethod
    def from_views(cls, features: Sequence[Tensor], config: HeadConfig | None = None) -> ConsensusFeatures:
        """Prepare features from those of every network. A single network is its own peer.

        Args:
            features: (N, D_i) features of all images, first the network to refine.
            config: Settings.

        Raises:
            ShapeError: Features of different images.
            NonFiniteError: NaN or Inf.
        """
        config = config or HeadConfig()
        views = [FeatureScaling.fit(rows, f"network {i}")(rows) for i, rows in enumerate(features)]
        if len(views) == 1:
            return cls(features[0], views[0])
        parts = isomorphic_parts(views, config.view_ridge, config.max_components)
        return cls(features[0], torch.cat([view @ part for view, part in zip(views, parts, strict=True)], 1))

    def head(self, index: Tensor, labels: Tensor, num_classes: int, config: HeadConfig | None = None) -> Head:
        """Fit the network's classifier to some labels.

        Args:
            index: (n,) indices of the labeled images among all images.
            labels: (n,).
            num_classes: Number of classes C.
            config: Settings.
        """
        config = config or HeadConfig()
        check_labels(index, labels, num_classes)
        indicators = one_hot(labels, num_classes)
        if len(index) == len(self.joint):
            targets = torch.zeros_like(indicators).index_copy_(0, index, indicators)
        else:
            targets = self._propagate(index, indicators, config)
        return _unscale(*self.solver.solve(targets, config.head_ridge), self.scaling, targets)

    def _propagate(self, index: Tensor, indicators: Tensor, config: HeadConfig) -> Tensor:
        """Extend labels to pseudo-labels (N, C) of all images; the labeled images keep their labels."""
        prior = config.prior_tensor(indicators.shape[1])
        weight, bias = RidgeSolver(self.joint[index]).solve(indicators, config.label_ridge)
        scores = self.joint @ weight + bias
        targets = indicators
        for round_index in range(config.num_rounds):
            if round_index:
                scores = self._solver_of_joint().predict(targets, config.pseudo_label_ridge)
            targets = pseudo_labels(scores, config.inverse_temperature, prior)
            targets[index] = indicators
        return targets

    def _solver_of_joint(self) -> RidgeSolver:
        # One eigendecomposition for all label sets and rounds
        if self._joint_solver is None:
            self._joint_solver = RidgeSolver(self.joint)
        return self._joint_solver


def check_labels(features: Tensor, labels: Tensor, num_classes: int) -> None:
    """Check that labels are one integer in 0 … C − 1 per image.

    Raises:
        ShapeError: They are not.
    """
    if labels.ndim != 1 or len(labels) != len(features) or labels.is_floating_point():
        raise ShapeError(
            f"expected one integer label for each of {len(features)} images, got {labels.dtype} of shape "
            f"{tuple(labels.shape)}"
        )
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < num_classes):
        raise ShapeError(f"labels must lie in 0 … {num_classes - 1}, got {int(labels.min())} … {int(labels.max())}")


def _unscale(weight: Tensor, bias: Tensor, scaling: FeatureScaling, targets: Tensor) -> Head:
    """Express a solution (D, C) on scaled features as a classifier (C, D) on the features themselves."""
    # wᵀ(x − μ)/s + b = (w/s)ᵀx + (b − (w/s)ᵀμ)
    unscaled = weight.T / scaling.scale
    return Head(unscaled, bias - unscaled @ scaling.mean, targets)
