"""Similarity measures that are in common use: linear CKA, orthogonal Procrustes and linear regression.

All are computed from second moments of centered features. In-sample values are biased upwards in small samples:
independent features of d channels and n samples have an R² of d / n. `SimilarityMoments` therefore crosses two disjoint
sets of images. It returns about 0 for independent features, also where positions of one image are dependent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from knowiso_train.errors import CapacityError, OptionError, ShapeError
from knowiso_train.regression.moments import Moments, StreamingMoments
from knowiso_train.regression.ridge import MAX_SEARCH_FEATURES, Spectrum
from knowiso_train.utils.distributed import ProcessGroup

SimilarityName = Literal["cka", "procrustes", "r2", "pooled_cka", "pooled_procrustes", "pooled_r2"]

SIMILARITY_NAMES: tuple[SimilarityName, ...] = get_args(SimilarityName)
DEFAULT_SIMILARITIES: tuple[SimilarityName, ...] = ("cka", "procrustes", "r2")
MAX_SIMILARITY_CHANNELS = MAX_SEARCH_FEATURES  # of either feature; the moments of both take 1 GiB a set of images
MIN_DEBIASED_SAMPLES = 4
MIN_SAMPLES_PER_CHANNEL = 5  # of the least-squares map; with fewer its R² on other images is noted as too low
POOLED_PREFIX = "pooled_"


def linear_cka(x: Tensor, y: Tensor, *, debiased: bool = True) -> float:
    """Return the linear centered kernel alignment of two feature matrices.

    Biased, it is `‖X̃ᵀỸ‖² / (‖X̃ᵀX̃‖ ‖ỸᵀỸ‖)` of the centered features X̃ and Ỹ. Debiased, each squared norm is replaced by
    the unbiased estimator HSIC₁ of the Hilbert-Schmidt independence criterion. It assumes independent samples.

    References:
        Kornblith et al. (2019), arXiv 1905.00414; Song et al. (2012), *Feature selection via dependence maximization*,
        eq. 4; Nguyen et al. (2021), arXiv 2010.15327.

    Args:
        x: (n, d).
        y: (n, c).
        debiased: Correct the bias of small samples. The value can then be slightly negative or above 1.

    Returns:
        NaN for constant features.

    Raises:
        ShapeError: Not two matrices with equally many samples, or fewer than 4 samples.

    Examples:
        >>> x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
        >>> rotation = torch.linalg.qr(torch.randn(8, 8))[0]
        >>> round(linear_cka(x, 3 * x @ rotation), 4)
        1.0
    """
    x, y = _centered(x, y)
    if len(x) < MIN_DEBIASED_SAMPLES:
        raise ShapeError(f"expected at least {MIN_DEBIASED_SAMPLES} samples, got {len(x)}")
    if not debiased:
        return _ratio((x.T @ y).square().sum(), (x.T @ x).square().sum(), (y.T @ y).square().sum())
    return _ratio(_hsic(x, y), _hsic(x, x), _hsic(y, y))


def procrustes_similarity(x: Tensor, y: Tensor, *, held_out: tuple[Tensor, Tensor] | None = None) -> float:
    """Return the correlation of two feature matrices after the best rotation and scaling of one of them.

    In-sample it is `‖X̃ᵀỸ‖_* / (‖X̃‖ ‖Ỹ‖)` of the centered features, with the nuclear norm. The Procrustes distance of
    features of unit norm is `2 - 2 s` for the similarity s. In-sample values are biased upwards in small samples.

    References:
        Schönemann (1966), *A generalized solution of the orthogonal Procrustes problem*; Ding et al. (2021), arXiv
        2108.01661.

    Args:
        x: (n, d).
        y: (n, c).
        held_out: Features (m, d) and (m, c) of other samples, at which the rotation is evaluated. Default: the fitted
            samples.

    Returns:
        NaN for constant features.

    Raises:
        ShapeError: Not two matrices with equally many samples.

    Examples:
        >>> x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
        >>> rotation = torch.linalg.qr(torch.randn(8, 8))[0]
        >>> round(procrustes_similarity(x, 3 * x @ rotation), 4)
        1.0
    """
    fit = _covariances(x, y)
    return _procrustes(fit, fit if held_out is None else _covariances(*held_out))


def regression_r2(x: Tensor, y: Tensor, *, held_out: tuple[Tensor, Tensor] | None = None) -> float:
    """Return R², the share of the variance of y that least squares on x explains.

    Of all least-squares maps the one of minimum norm is taken. In-sample values are biased upwards in small samples, by
    about d / n.

    References:
        Kornblith et al. (2019), arXiv 1905.00414, section 4.2.

    Args:
        x: (n, d).
        y: (n, c).
        held_out: Features (m, d) and (m, c) of other samples, at which the regression is evaluated. Default: the fitted
            samples.

    Returns:
        NaN for a constant target.

    Raises:
        ShapeError: Not two matrices with equally many samples.

    Examples:
        >>> x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
        >>> round(regression_r2(x, x @ torch.randn(8, 3)), 4)
        1.0
    """
    fit = _covariances(x, y)
    return _r2(fit, fit if held_out is None else _covariances(*held_out))


class SimilarityMoments:
    """Similarity of two streamed features in bounded memory, from moments of two disjoint sets of images.

    With S⁽¹⁾ of the images that fit and S⁽²⁾ of those that report:

    - "cka": `⟨S⁽¹⁾_xy, S⁽²⁾_xy⟩ / √(⟨S⁽¹⁾_xx, S⁽²⁾_xx⟩ ⟨S⁽¹⁾_yy, S⁽²⁾_yy⟩)`. The errors of both sets are independent,
      so no squared error biases the products (as in the crossnobis estimator of Walther et al., 2016).
    - "procrustes": The rotation of S⁽¹⁾_xy, evaluated on S⁽²⁾.
    - "r2": The least-squares map of S⁽¹⁾, evaluated on S⁽²⁾.

    Samples are positions, or images for names with "pooled_", whose features are averaged over the positions.

    Args:
        names: Names of the similarities to compute.
        source_channels: C_A.
        target_channels: C_B.
        device: Device of the sums.
        label: Layers, for error messages.

    Raises:
        CapacityError: More than `MAX_SIMILARITY_CHANNELS` channels.

    Examples:
        >>> moments, x = SimilarityMoments(("cka",), 3, 3), torch.randn(40, 3, 2, 2)
        >>> moments.update(x[:30], x[:30], report=False)
        >>> moments.update(x[30:], x[30:], report=True)
        >>> round(moments.result()["cka"], 4)
        1.0
    """

    def __init__(
        self,
        names: Sequence[SimilarityName],
        source_channels: int,
        target_channels: int,
        device: torch.device | str = "cpu",
        label: str = "features",
    ) -> None:
        widest = max(source_channels, target_channels)
        if widest > MAX_SIMILARITY_CHANNELS:
            raise CapacityError(
                f"{label}: similarity= takes features of up to {MAX_SIMILARITY_CHANNELS} channels, got {widest}. "
                "Measure this layer without similarity=, or pair a pooled layer"
            )
        self.names, self.source_channels = tuple(names), source_channels
        self.precision: float = torch.finfo(torch.float64).eps
        # Moments of the joint feature (x, y), of the images that fit and of those that report, by kind of sample
        self._moments = {
            pooled: [StreamingMoments(source_channels + target_channels, 1, 1, device) for _ in range(2)]
            for pooled in sorted({name.startswith(POOLED_PREFIX) for name in names})
        }

    @staticmethod
    def estimate_bytes(names: Sequence[SimilarityName], source_channels: int, target_channels: int) -> int:
        """Return the bytes of the moments, in float64.

        Examples:
            >>> SimilarityMoments.estimate_bytes(("cka", "pooled_cka"), 3, 1)
            512
        """
        kinds = {name.startswith(POOLED_PREFIX) for name in names}
        return 2 * 8 * len(kinds) * (source_channels + target_channels) ** 2

    def update(self, x: Tensor, y: Tensor, *, report: bool, pooled: tuple[Tensor, Tensor] | None = None) -> None:
        """Add images.

        Args:
            x: Source, (N, C_A, H, W).
            y: Target, (N, C_B, H, W).
            report: Set of the images.
            pooled: Features (M, C_A, 1, 1) and (M, C_B, 1, 1) of the M images, where the positions of x and y are not
                grouped by image. Default: means over positions.
        """
        if torch.promote_types(x.dtype, y.dtype) != torch.float64:
            self.precision = torch.finfo(torch.float32).eps  # of the products of a batch
        for is_pooled, sets in self._moments.items():
            features: Sequence[Tensor] = (x, y)
            if is_pooled:
                features = pooled or [feature.mean((2, 3), keepdim=True) for feature in (x, y)]
            joint = torch.cat(list(features), 1)
            sets[report].update(joint, joint[:, :1])

    def all_reduce(self, group: ProcessGroup) -> None:
        """Merge the moments of all processes."""
        self.precision = max(group.gather(self.precision))
        for sets in self._moments.values():
            for moments in sets:
                moments.all_reduce(group)

    @property
    def notes(self) -> list[str]:
        """Similarities that few samples make too low, for the warnings of a report."""
        counts = {pooled: int(sets[False].value.count) for pooled, sets in self._moments.items()}
        return [
            f"{name}: only {counts[pooled]} samples for {self.source_channels} channels, so that least squares without "
            "a ridge is too low on other images"
            for name, pooled in (("r2", False), ("pooled_r2", True))
            if name in self.names and counts[pooled] < MIN_SAMPLES_PER_CHANNEL * self.source_channels
        ]

    def result(self) -> dict[str, float]:
        """Return the similarities by name; NaN for constant features."""
        covariances = {
            pooled: [_blocks(moments.value, self.source_channels, self.precision) for moments in sets]
            for pooled, sets in self._moments.items()
        }
        measures = {"cka": _cross_cka, "procrustes": _procrustes, "r2": _r2}
        return {
            name: measures[name.removeprefix(POOLED_PREFIX)](*covariances[name.startswith(POOLED_PREFIX)])
            for name in self.names
        }


def similarity_names(option: bool | SimilarityName | Sequence[SimilarityName]) -> tuple[SimilarityName, ...]:
    """Return the names that an option stands for.

    Raises:
        OptionError: A name twice.

    Examples:
        >>> similarity_names(True), similarity_names("cka"), similarity_names(False)
        (('cka', 'procrustes', 'r2'), ('cka',), ())
    """
    if isinstance(option, bool):
        return DEFAULT_SIMILARITIES if option else ()
    names = (option,) if isinstance(option, str) else tuple(option)
    if len(set(names)) < len(names):
        raise OptionError(f"expected each similarity once, got {list(names)}")
    return names


@dataclass(frozen=True)
class _Covariances:
    """Sums of products of centered features.

    Attributes:
        moments: Moments with the source as features and the target as targets.
        yy: Products of the target.
        precision: Relative rounding error of the products.
    """

    moments: Moments
    yy: Tensor
    precision: float = torch.finfo(torch.float64).eps


def _blocks(joint: Moments, source_channels: int, precision: float) -> _Covariances:
    """Split the moments of a joint feature (x, y)."""
    x, y = slice(0, source_channels), slice(source_channels, None)
    yy = joint.xx[y, y]
    return _Covariances(
        Moments(joint.count, joint.mean_x[x], joint.mean_x[y], joint.xx[x, x], joint.xx[x, y], yy.diagonal()),
        yy,
        precision,
    )


def _covariances(x: Tensor, y: Tensor) -> _Covariances:
    x, y = _centered(x, y)
    count = torch.tensor(float(len(x)), dtype=torch.float64, device=x.device)
    yy = y.T @ y
    moments = Moments(count, torch.zeros_like(x[0]), torch.zeros_like(y[0]), x.T @ x, x.T @ y, yy.diagonal())
    return _Covariances(moments, yy)


def _centered(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) == 0:
        raise ShapeError(
            f"expected two feature matrices (n, d) and (n, c) of the same samples, got {tuple(x.shape)} and "
            f"{tuple(y.shape)}; flatten positions into samples or features first"
        )
    return tuple(feature.double() - feature.double().mean(0) for feature in (x, y))  # type: ignore[return-value]


def _hsic(x: Tensor, y: Tensor) -> Tensor:
    """Return n(n - 3) HSIC₁ of centered features, in O(n d c).

    For centered features the rows of the kernels K = XXᵀ and L = YYᵀ sum to 0, so that Song's three terms, which leave
    out the diagonals, become ‖XᵀY‖² - n/(n - 2) Σ K_ii L_ii + tr K tr L / ((n - 1)(n - 2)).
    """
    n = len(x)
    of_x, of_y = x.square().sum(1), y.square().sum(1)
    return (x.T @ y).square().sum() - n / (n - 2) * (of_x @ of_y) + of_x.sum() * of_y.sum() / ((n - 1) * (n - 2))


def _cross_cka(fit: _Covariances, report: _Covariances) -> float:
    a, b = fit.moments, report.moments
    return _ratio((a.xy * b.xy).sum(), (a.xx * b.xx).sum(), (fit.yy * report.yy).sum())


def _procrustes(fit: _Covariances, report: _Covariances) -> float:
    u, values, vh = torch.linalg.svd(fit.moments.xy, full_matrices=False)
    # Directions of rounding have no determined rotation
    rank = int((values > values[:1] * max(fit.moments.xy.shape) * torch.finfo(values.dtype).eps).sum())
    rotation = u[:, :rank] @ vh[:rank]
    moments = report.moments
    return _ratio((rotation * moments.xy).sum(), moments.xx.trace(), moments.yy.sum())


def _r2(fit: _Covariances, report: _Covariances) -> float:
    # Least squares of minimum norm, without directions whose variance is rounding
    spectrum, moments = Spectrum.of(fit.moments), report.moments
    weight = spectrum.vectors @ spectrum.coefficients(spectrum.rotate(fit.moments.xy), 0.0, fit.precision)
    # Σ‖ỹ - Wᵀx̃‖² of the report images about their own means, as for the unexplained share
    residual = moments.yy.sum() - 2 * (weight * moments.xy).sum() + (weight * (moments.xx @ weight)).sum()
    residual, total = residual.clamp(min=0), moments.yy.sum()
    return float(1 - residual / total) if total > 0 else float("nan")


def _ratio(product: Tensor, of_x: Tensor, of_y: Tensor) -> float:
    """Return `product / √(of_x · of_y)`, NaN where a divisor is not positive."""
    return float(product / of_x.sqrt() / of_y.sqrt()) if of_x > 0 and of_y > 0 else float("nan")
