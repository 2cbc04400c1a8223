"""Linear CKA, Procrustes and R²: known answers, equality with stored features, small samples, limits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from knowiso_train import Report, measure
from knowiso_train.errors import CapacityError, KnowisoWarning, OptionError, ShapeError
from knowiso_train.measurement import linear_cka, procrustes_similarity, regression_r2
from knowiso_train.measurement.similarity import (
    MAX_SIMILARITY_CHANNELS,
    SIMILARITY_NAMES,
    SimilarityMoments,
    _Covariances,
    _covariances,
    _r2,
)
from knowiso_train.utils.hashing import split_by_hash
from tests.measurement.test_measure import network

Matrix = NDArray[np.float64]


def rotation(size: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))[0]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hsic1(k: Matrix, other: Matrix) -> float:
    """Return Song's unbiased estimator from kernels (n, n)."""
    n = len(k)
    k, other = k - np.diag(np.diag(k)), other - np.diag(np.diag(other))
    product = np.trace(k @ other) + k.sum() * other.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ other).sum()
    return float(product / (n * (n - 3)))


def centered_products(x: Matrix, y: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    x, y = x - x.mean(0), y - y.mean(0)
    return x.T @ x, x.T @ y, y.T @ y


def crossed(fit: tuple[Matrix, Matrix], report: tuple[Matrix, Matrix]) -> dict[str, float]:
    """Return the similarities of stored features by NumPy's own decompositions."""
    (xx, xy, yy), (xx2, xy2, yy2) = centered_products(*fit), centered_products(*report)
    u, _, vh = np.linalg.svd(xy, full_matrices=False)
    mean_x, mean_y = fit[0].mean(0), fit[1].mean(0)
    weight = np.linalg.lstsq(fit[0] - mean_x, fit[1] - mean_y, rcond=None)[0]
    residual = report[1] - report[0] @ weight
    return {
        "cka": (xy * xy2).sum() / np.sqrt((xx * xx2).sum() * (yy * yy2).sum()),
        "procrustes": ((u @ vh) * xy2).sum() / np.sqrt(np.trace(xx2) * np.trace(yy2)),
        "r2": 1 - ((residual - residual.mean(0)) ** 2).sum() / np.trace(yy2),
    }


def test_matrices_equal_independent_computations() -> None:
    x, y = noise(30, 12), noise(30, 12) @ noise(12, 7, seed=1) + noise(30, 7, seed=2)
    a, b = x.double().numpy(), y.double().numpy()
    k, other = a @ a.T, b @ b.T
    assert linear_cka(x, y) == pytest.approx(hsic1(k, other) / np.sqrt(hsic1(k, k) * hsic1(other, other)))
    center = np.eye(30) - 1 / 30
    biased = np.trace(k @ center @ other @ center)
    biased /= np.sqrt(np.trace(k @ center @ k @ center) * np.trace(other @ center @ other @ center))
    assert linear_cka(x, y, debiased=False) == pytest.approx(biased)
    xx, xy, yy = centered_products(a, b)
    assert procrustes_similarity(x, y) == pytest.approx(
        np.linalg.norm(xy, "nuc") / np.sqrt(np.trace(xx) * np.trace(yy))
    )
    residual = (b - b.mean(0)) - (a - a.mean(0)) @ np.linalg.lstsq(a - a.mean(0), b - b.mean(0), rcond=None)[0]
    assert regression_r2(x, y) == pytest.approx(1 - (residual**2).sum() / np.trace(yy))
    other = noise(9, 12, seed=3), noise(9, 7, seed=4)
    held_out = crossed((a, b), (other[0].double().numpy(), other[1].double().numpy()))
    assert procrustes_similarity(x, y, held_out=other) == pytest.approx(held_out["procrustes"])
    assert regression_r2(x, y, held_out=other) == pytest.approx(held_out["r2"])


def test_matrices_of_other_shapes_are_refused_and_constants_are_undefined() -> None:
    for similarity in (linear_cka, procrustes_similarity, regression_r2):
        with pytest.raises(ShapeError, match="same samples"):
            similarity(noise(5, 2), noise(6, 2))
        assert np.isnan(similarity(noise(5, 2), torch.ones(5, 2)))
    with pytest.raises(ShapeError, match="at least 4 samples"):
        linear_cka(noise(3, 2), noise(3, 2))


def test_a_rotation_and_a_scale_are_similarity_one_and_only_regression_undoes_a_shear() -> None:
    x = noise(60, 6, 4, 4)
    shear = rotation(6) @ torch.diag(torch.tensor([1.0, 1, 1, 5, 5, 5])) @ rotation(6, 1)
    for matrix, exact in ((5 * rotation(6), SIMILARITY_NAMES), (shear, ("r2", "pooled_r2"))):
        y = torch.einsum("nchw,cd->ndhw", x, matrix) + 3
        moments = SimilarityMoments(SIMILARITY_NAMES, 6, 6)
        moments.update(x[:40], y[:40], report=False)
        moments.update(x[40:], y[40:], report=True)
        for name, value in moments.result().items():
            assert (value == pytest.approx(1, abs=1e-5)) == (name in exact), (name, value)


def stored_features(model: nn.Module, images: Tensor, grid: int) -> Matrix:
    """Return the outputs of the first layer as (N, C, grid²), pooled to a grid."""
    with torch.no_grad():
        return F.adaptive_avg_pool2d(model[0](images), grid).flatten(2).double().numpy()  # type: ignore[index]


def test_streamed_similarities_equal_those_of_stored_features() -> None:
    images, source, target = noise(120, 3, 8, 8), network(1), network(2, 5)
    source[0] = nn.Conv2d(3, 6, 3, padding=1)
    target[0] = nn.Conv2d(3, 5, 3, stride=2, padding=1)
    report = measure(
        source, target, images.split(32), "0", order=0, ridge=0.0, split=(0.8, 0.0, 0.2), similarity=SIMILARITY_NAMES,
        noise_floor=False, progress=False,
    )  # fmt: skip
    part = split_by_hash(np.arange(120), (0.8, 0.0, 0.2), 0) == 2
    x, y = stored_features(source, images, 4), stored_features(target, images, 4)
    for prefix, samples in (
        ("", lambda f: f.transpose(0, 2, 1).reshape(-1, f.shape[1])),
        ("pooled_", lambda f: f.mean(2)),
    ):
        sets = [(samples(x[chosen]), samples(y[chosen])) for chosen in (~part, part)]
        for name, value in crossed(*sets).items():
            assert report["0"].similarity[prefix + name] == pytest.approx(value, abs=1e-5), prefix + name
    # The share of order 0 without a ridge is the same regression
    assert report["0"].similarity["r2"] == pytest.approx(report["0"].shares[0], abs=1e-6)


def smooth_maps(images: int, channels: int, seed: int) -> Tensor:
    """Return maps whose positions depend on each other within an image."""
    return F.interpolate(noise(images, channels, 2, 2, seed=seed), size=(8, 8), mode="bilinear")


def rows(feature: Tensor) -> Tensor:
    return feature.movedim(1, 3).flatten(0, 2)


def test_independent_features_have_no_similarity_in_small_samples() -> None:
    crossed_means, in_sample = [], []
    for seed in range(40):
        x, y = smooth_maps(24, 12, 2 * seed), smooth_maps(24, 12, 2 * seed + 1)
        moments = SimilarityMoments(("cka", "procrustes", "r2"), 12, 12)
        moments.update(x[:18], y[:18], report=False)
        moments.update(x[18:], y[18:], report=True)
        crossed_means.append(list(moments.result().values()))
        in_sample.append([f(rows(x), rows(y)) for f in (linear_cka, procrustes_similarity, regression_r2)])
    cka, procrustes, r2 = np.mean(crossed_means, 0)
    assert abs(cka) < 0.02
    assert abs(procrustes) < 0.03
    assert r2 < 0  # a map of noise does harm on other images
    # Estimators that take positions as independent, debiased or not, call the same features similar
    assert (np.mean(in_sample, 0) > [0.1, 0.3, 0.1]).all()


def test_the_expected_cka_does_not_depend_on_the_number_of_samples() -> None:
    a, b = noise(4, 40), noise(4, 40, seed=1)
    # x = z A + e and y = z B + f with independent noise e and f of variance 1
    cross = float((a.T @ b).square().sum())
    of_x, of_y = (float((m.T @ m + torch.eye(40)).square().sum()) for m in (a, b))
    expected = cross / np.sqrt(of_x * of_y)
    debiased, biased, streamed = [], [], []
    for seed in range(30):
        z = noise(24, 4, seed=10 + seed)
        x, y = z @ a + noise(24, 40, seed=100 + seed), z @ b + noise(24, 40, seed=200 + seed)
        debiased.append(linear_cka(x, y))
        biased.append(linear_cka(x, y, debiased=False))
        moments = SimilarityMoments(("cka",), 40, 40)
        for part, report in ((slice(0, 16), False), (slice(16, 24), True)):
            moments.update(x[part, :, None, None], y[part, :, None, None], report=report)
        streamed.append(moments.result()["cka"])
    assert np.mean(debiased) == pytest.approx(expected, abs=0.03)
    assert np.mean(streamed) == pytest.approx(expected, abs=0.03)
    assert np.mean(biased) > expected + 0.05


def test_similarities_are_columns_and_part_of_the_file() -> None:
    images = noise(80, 3, 8, 8)
    report = measure(network(1), network(2), [images], "0", order=0, similarity=True, progress=False)
    assert list(report["0"].similarity) == ["cka", "procrustes", "r2"]
    assert report.settings["similarity"] == ["cka", "procrustes", "r2"]
    restored = Report.from_json(report.to_json())
    assert restored == report
    for text in (str(restored), str(restored["0"]), restored._repr_html_()):
        assert "Procrustes" in text
        assert f"{report['0'].similarity['cka']:.3f}" in text
    plain = report.to_dict()
    del plain["pairs"][0]["similarity"]  # as in files of earlier versions
    assert Report.from_dict(plain)["0"].similarity == {}
    one = measure(network(1), network(2), [images], "0", order=0, similarity="r2", progress=False)
    assert "R²" in str(one)
    assert "CKA  " not in str(one)


def test_least_squares_on_few_samples_is_noted() -> None:
    images = noise(80, 3, 8, 8)
    options = {"order": 0, "noise_floor": False, "progress": False, "bootstrap": 0, "similarity": ["r2", "pooled_r2"]}
    with pytest.warns(KnowisoWarning, match=r"pooled_r2: only \d+ samples for 16 channels"):
        report = measure(network(1, 16), network(2, 16), [images], "0", ridge=1e-3, **options)  # type: ignore[arg-type]
    (note,) = [note for note in report["0"].warnings if "r2" in note]
    assert note.startswith("pooled_r2")  # positions are enough


def test_unknown_similarities_and_wide_features_are_refused() -> None:
    images = noise(20, 3, 8, 8)
    for wrong in ("svcca", ["cka", "cka"], 1):
        with pytest.raises(OptionError, match="similarity"):
            measure(network(1), network(2), [images], "0", order=0, similarity=wrong, progress=False)
    with pytest.raises(
        CapacityError, match=rf"up to {MAX_SIMILARITY_CHANNELS} channels, got {MAX_SIMILARITY_CHANNELS + 1}"
    ):
        SimilarityMoments(("cka",), 3, MAX_SIMILARITY_CHANNELS + 1)


@pytest.mark.parametrize("sign", [-1, 1])
def test_r2_does_not_invert_eigenvalues_that_are_rounding(sign: int) -> None:
    """Products of float32 features of low rank have errors of 1e-7 in directions without variance."""
    x = noise(200, 6).double() @ rotation(12).double()[:6]
    y = x @ noise(12, 4, seed=1).double()
    null = rotation(12).double()[7]
    exact = _covariances(x, y)
    error = 1e-7 * float(exact.moments.xx.diagonal().max())
    shift = torch.outer(null, null)

    def rounded(tiny: float, precision: float) -> _Covariances:
        moments = replace(
            exact.moments, xx=exact.moments.xx + tiny * shift, xy=exact.moments.xy + error * null[:, None]
        )
        return replace(exact, moments=moments, precision=precision)

    single, double = (torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64))
    found = [_r2(rounded(1e-6 * error, precision), rounded(sign * error, precision)) for precision in (single, double)]
    assert found[0] == pytest.approx(1, abs=1e-6)
    assert found[0] <= 1
    # The precision of float64 inverts the error; the share is at most 1 in any case
    assert found[1] < 0.9 if sign > 0 else found[1] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_precision_of_the_moments_is_that_of_the_features(dtype: torch.dtype) -> None:
    moments = SimilarityMoments(("r2",), 3, 2)
    moments.update(noise(8, 3, 2, 2).to(dtype), noise(8, 2, 2, 2, seed=1).to(dtype), report=False)
    assert moments.precision == torch.finfo(dtype).eps
