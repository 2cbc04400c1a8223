"""A classifier in closed form from few labels, unlabelled images, and what peers make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from knowiso_train.errors import OptionError, ShapeError
from knowiso_train.refinement.smoother import Smoother, one_hot, sharpened
from knowiso_train.refinement.views import Scaling, isomorphic_parts


@dataclass(frozen=True)
class HeadRecipe:
    """Settings of `consensus_head`; the defaults were chosen on other images than any that figures are reported on.

    Attributes:
        part_ridge: of the order-0 maps between the networks, relative; larger keeps only what peers know well.
        few_ridge: of the first classifier, on the labelled images.
        pool_ridge: of the classifiers on all images.
        head_ridge: of the network's own classifier, on all images.
        sharpness: how decided the pseudo-labels are; infinite takes the first guess.
        shares: of the classes among the images, where they are known, or "even": pseudo-labels are brought to these proportions, which is worth much.
            Wrong ones do harm: None leaves the guesses. Few labels, drawn class by class, say nothing of them; `refine` takes those of validation
            images.
        rounds: pseudo-labels are made this often.
        width: most components kept of each network's part.

    Raises:
        OptionError: a value without meaning.
    """

    part_ridge: float = 0.3
    few_ridge: float = 0.1
    pool_ridge: float = 0.3
    head_ridge: float = 1.0
    sharpness: float = 12.0
    shares: tuple[float, ...] | str | None = None
    rounds: int = 3
    width: int = 256

    def __post_init__(self) -> None:
        for name in ("part_ridge", "few_ridge", "pool_ridge", "head_ridge", "sharpness"):
            if not getattr(self, name) > 0:
                raise OptionError(f"{name} must be positive, got {getattr(self, name)!r}")
        if isinstance(self.shares, str) and self.shares != "even":
            raise OptionError(f'shares must be the classes\' proportions, "even" or None, got {self.shares!r}')
        if not isinstance(self.shares, str) and self.shares is not None and not (len(self.shares) and all(share > 0 for share in self.shares)):
            raise OptionError(f"shares must be a positive number for each class, got {self.shares!r}")
        for name in ("rounds", "width"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise OptionError(f"{name} must be an integer of at least 1, got {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: "inf" if value == float("inf") else value for name, value in asdict(self).items()}


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
    scaling = Scaling.of(features, "the labelled images")
    targets = one_hot(labels, classes)
    return _unscaled(*Smoother(scaling(features)).solve(targets, ridge), scaling, targets)


def consensus_head(labelled: Sequence[Tensor], labels: Tensor, unlabelled: Sequence[Tensor], classes: int, recipe: HeadRecipe | None = None) -> Head:
    """The classifier of the first network, fitted to what all of them together make of all images. The peers are not needed afterwards.

    1. Of every network's features, the isomorphic part: what tells the other networks' features at order 0 (`isomorphic_parts`).
    2. A ridge classifier on these parts side by side, from the labelled images, gives the others pseudo-labels; fitted to all, it gives better ones.
    3. The first network's own classifier is the ridge regression of them on its own features: the order-0 isomorphic part of the ensemble's decision.
       Linear in its features, it costs nothing at inference.

    With one network there are no peers to agree with, and this is self-training.

    Args:
        labelled: features (n, D_i) of the labelled images, first the network that is refined, then its peers.
        labels: (n,).
        unlabelled: features (N, D_i) of the others, in the same order; N may be 0.
        classes: C.
        recipe: settings.

    Raises:
        ShapeError: features or labels that do not fit each other.
        NonFiniteError: NaN or Inf.

    Source: arXiv 1908.01581 for the isomorphic part; co-training (Blum & Mitchell 1998), multi-view regression (Kakade & Foster 2007).

    Example:
        >>> labels = torch.arange(300) % 2
        >>> networks = [torch.cat([labels[:, None] * 4.0, 2 * torch.randn(300, 6)], 1) for _ in range(3)]
        >>> head = consensus_head([x[:8] for x in networks], labels[:8], [x[8:] for x in networks], 2)
        >>> bool((head(networks[0]).argmax(1) == labels).float().mean() > 0.8)
        True
    """
    if not labelled or len(labelled) != len(unlabelled):
        raise ShapeError(f"expected labelled and unlabelled features of the same networks, got {len(labelled)} and {len(unlabelled)}")
    for i, (few, many) in enumerate(zip(labelled, unlabelled, strict=True)):
        check_labels(few, labels, classes)
        if many.ndim != 2 or few.shape[1] != many.shape[1] or len(many) != len(unlabelled[0]):
            raise ShapeError(f"network {i}: labelled features {tuple(few.shape)} and unlabelled ones {tuple(many.shape)} do not fit")
    recipe = recipe or HeadRecipe()
    every = [torch.cat([few.double(), many.double()]) for few, many in zip(labelled, unlabelled, strict=True)]
    return Consensus.of(every, recipe).head(torch.arange(len(labels)), labels, classes, recipe)


class Consensus:
    """The images of `consensus_head`, prepared once for any number of sets of labels.

    Args:
        own: (N, D) features of the network that is refined.
        together: (N, M) features from which pseudo-labels are made.

    Example:
        >>> x = torch.randn(60, 4)
        >>> Consensus.of([x, x + 0.1]).head(torch.arange(6), torch.tensor([0, 1, 0, 1, 0, 1]), 2).weight.shape
        torch.Size([2, 4])
    """

    def __init__(self, own: Tensor, together: Tensor) -> None:
        self.scaling = Scaling.of(own, "the network")
        self.own = Smoother(self.scaling(own))
        self.together = together.double()
        self._smoother: Smoother | None = None

    @classmethod
    def of(cls, features: Sequence[Tensor], recipe: HeadRecipe | None = None) -> Consensus:
        """From features (N, D_i) of all images, first the network that is refined; with one network alone it is its own peer.

        Raises:
            ShapeError: features of different images.
            NonFiniteError: NaN or Inf.
        """
        recipe = recipe or HeadRecipe()
        views = [Scaling.of(rows, f"network {i}")(rows) for i, rows in enumerate(features)]
        if len(views) == 1:
            return cls(features[0], views[0])
        parts = isomorphic_parts(views, recipe.part_ridge, recipe.width)
        return cls(features[0], torch.cat([view @ part for view, part in zip(views, parts, strict=True)], 1))

    def head(self, index: Tensor, labels: Tensor, classes: int, recipe: HeadRecipe | None = None) -> Head:
        """The network's classifier, from the labels (n,) of the images at `index` (n,)."""
        recipe = recipe or HeadRecipe()
        check_labels(index, labels, classes)
        known = one_hot(labels, classes)
        targets = known
        if len(index) < len(self.together):
            weight, bias = Smoother(self.together[index]).solve(known, recipe.few_ridge)
            scores, shares = self.together @ weight + bias, _shares(recipe, classes)
            for left in reversed(range(recipe.rounds)):
                targets = sharpened(scores, recipe.sharpness, shares)
                targets[index] = known
                if left:
                    scores = self._on_all().fitted(targets, recipe.pool_ridge)
        else:
            targets = torch.zeros_like(known).index_copy_(0, index, known)
        return _unscaled(*self.own.solve(targets, recipe.head_ridge), self.scaling, targets)

    def _on_all(self) -> Smoother:
        if self._smoother is None:
            self._smoother = Smoother(self.together)
        return self._smoother


def _shares(recipe: HeadRecipe, classes: int) -> Tensor | None:
    if recipe.shares is None:
        return None
    shares = [1.0] * classes if isinstance(recipe.shares, str) else recipe.shares
    if len(shares) != classes:
        raise ShapeError(f"expected shares of {classes} classes, got {len(shares)}")
    return torch.tensor(shares, dtype=torch.float64)


def _unscaled(weight: Tensor, bias: Tensor, scaling: Scaling, targets: Tensor) -> Head:
    """From standardised features (D, C) to the network's own (C, D)."""
    own = weight.T / scaling.scale
    return Head(own, bias - own @ scaling.mean, targets)


def check_labels(features: Tensor, labels: Tensor, classes: int) -> None:
    if labels.ndim != 1 or len(labels) != len(features) or labels.is_floating_point():
        raise ShapeError(f"expected one integer label for each of {len(features)} images, got {labels.dtype} of shape {tuple(labels.shape)}")
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
        raise ShapeError(f"labels must lie in 0 … {classes - 1}, got {int(labels.min())} … {int(labels.max())}")
