"""Warnings of pairs that have no effect, and of students whose features collapse."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from knowiso_train.errors import KnowisoWarning
from knowiso_train.features.modules import LayerPair

# Fractions of the first variance and of the first rank above 1 below which a feature has collapsed; the rank of healthy
# features fell to 0.14 of the first in the early steps of ResNet-8 on CIFAR-10
MIN_VARIANCE_FRACTION, MIN_RANK_FRACTION = 1e-2, 0.03
# Consecutive refreshes with a collapsed feature before the warning, since single batches may be unusual
COLLAPSED_REFRESHES = 3
# Positions of a batch that are measured: fewer estimate no rank, more cost time
MIN_POSITIONS, MAX_POSITIONS = 16, 4096


class CollapseDetector:
    """Comparison of the student's features in training with those at the first solve, by layer.

    Examples:
        >>> detector, features = CollapseDetector(), torch.randn(8, 6, 4, 4)
        >>> detector.check("layer2", features)
        >>> detector.check("layer2", features[:, :1].expand(-1, 6, -1, -1))  # one direction; warns after 3 calls
        >>> detector.num_collapsed
        {'layer2': 1}
    """

    def __init__(self) -> None:
        self.first: dict[str, tuple[float, float]] = {}
        self.num_collapsed: dict[str, int] = {}
        self.warned: set[str] = set()

    def check(self, layer: str, feature: Tensor) -> None:
        """Warn once if the feature (N, C, H, W) of a layer has collapsed in consecutive calls; reads its device."""
        if layer in self.warned:
            return
        variance, rank = variance_and_rank(feature)
        if not (math.isfinite(variance) and math.isfinite(rank)):
            return
        first_variance, first_rank = self.first.setdefault(layer, (variance, rank))
        collapsed = variance < MIN_VARIANCE_FRACTION * first_variance or rank - 1 < MIN_RANK_FRACTION * (first_rank - 1)
        self.num_collapsed[layer] = self.num_collapsed.get(layer, 0) + 1 if collapsed else 0
        if self.num_collapsed[layer] < COLLAPSED_REFRESHES:
            return
        self.warned.add(layer)
        warnings.warn(
            f"{layer}: the student's features have collapsed since the loss began: variance {variance:.3g} after "
            f"{first_variance:.3g}, effective rank {rank:.3g} after {first_rank:.3g}. Lower weight= or ratio= of the "
            "loss, or the learning rate",
            KnowisoWarning,
            stacklevel=2,
        )


@torch.no_grad()
def variance_and_rank(feature: Tensor) -> tuple[float, float]:
    """Return the mean channel variance of a feature (N, C, H, W), and the effective rank of its correlations.

    The effective rank is `C² / ‖R‖²` with the correlation matrix R of the C channels that vary: the participation
    ratio `(Σ λ)² / Σ λ²` of its eigenvalues, which no channel of large variance dominates. NaN for too few positions.

    Examples:
        >>> one = torch.randn(64, 1, 2, 2)
        >>> round(variance_and_rank(one.expand(-1, 5, -1, -1))[1], 3)
        1.0
    """
    rows = feature.detach().movedim(1, -1).flatten(0, -2)
    if len(rows) < MIN_POSITIONS:
        return math.nan, math.nan
    rows = rows[:: math.ceil(len(rows) / MAX_POSITIONS)].float()
    rows = rows - rows.mean(0)
    variances = rows.square().mean(0)
    # Columns of unit norm; a channel without variance stays 0 and is not counted
    directions = rows / (len(rows) * variances.clamp(min=torch.finfo(variances.dtype).tiny)).sqrt()
    with torch.autocast(feature.device.type, enabled=False):
        correlations = directions.T @ directions
    rank = correlations.diagonal().sum().square() / correlations.square().sum()
    mean_variance, effective_rank = torch.stack([variances.mean(), rank]).tolist()
    # Without any channel that varies the rank is 0 / 0
    return mean_variance, effective_rank if mean_variance else 1.0


MAX_UNSOLVED_CALLS = 200


class InactivityDetector:
    """Warnings of pairs without effect: in eval mode, behind frozen layers, or with too few samples; once per pair.

    Examples:
        >>> detector, pair = InactivityDetector(), LayerPair("layer2", "layer3")
        >>> detector.check(pair, training=True, solved=False, has_gradient=True, calls=5)
        >>> detector.warned
        set()
    """

    def __init__(self) -> None:
        self.warned: set[tuple[LayerPair, str]] = set()

    def check(self, pair: LayerPair, *, training: bool, solved: bool, has_gradient: bool, calls: int) -> None:
        """Warn if the loss of a pair has no effect in a call with gradient.

        Args:
            pair: Layer pair.
            training: Whether the loss is in training mode.
            solved: Whether the map of the pair is solved.
            has_gradient: Whether the student's feature carries a gradient.
            calls: Calls in training mode so far.
        """
        name = f"{pair.source} → {pair.target}"
        if not training and not solved:
            self._warn(
                (pair, "eval mode"),
                f"{name}: the loss is 0, since it is in eval mode and its map was not solved before. "
                "Call iso.train(), also after eval() of a module that contains the loss",
            )
        elif not has_gradient:
            self._warn(
                (pair, "frozen"),
                f"{name}: the loss is a constant, since no weight up to the student's layer {pair.source!r} is "
                "trained. Leave the pair out, or pair a later layer",
            )
        elif not solved and calls >= MAX_UNSOLVED_CALLS:
            self._warn(
                (pair, "samples"),
                f"{name}: the loss is still 0 after {calls} calls, since the batches hold too few samples for its map. "
                "Use larger batches, a layer with fewer channels or more positions, or a longer window",
            )

    def _warn(self, key: tuple[LayerPair, str], message: str) -> None:
        if key not in self.warned:
            self.warned.add(key)
            warnings.warn(message, KnowisoWarning, stacklevel=2)
