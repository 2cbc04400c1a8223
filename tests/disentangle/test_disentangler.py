"""Public class: shapes, save and load, errors."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from knowiso_train import Disentangler
from knowiso_train.disentangle import _closed_form_fit as closed_form_fit
from knowiso_train.disentangle._closed_form import MAX_SOURCE_DEVIATIONS, ClosedFormMaps
from knowiso_train.disentangle.config import DisentangleConfig
from knowiso_train.errors import FormatError, InputTypeError, NonFiniteError, OptionError, ShapeError
from knowiso_train.measurement import measure
from knowiso_train.regression import batch_moments
from knowiso_train.regression.ridge import RIDGE_GRID, Spectrum, solve_ridge
from knowiso_train.utils.hashing import split_by_hash
from knowiso_train.utils.serialization import read_tensors, write_tensors

FAST = {"epochs": 2}


@pytest.mark.parametrize(
    ("options", "source", "target"),
    [
        ({"order": 2, "kernel_size": 3, "solver_options": FAST}, (40, 5, 6, 6), (40, 3, 6, 6)),
        ({"order": 1, "solver_options": FAST}, (200, 5), (200, 3)),
        ({"order": 0, "source_channels": 2}, (40, 5, 6, 6), (40, 3, 3, 3)),
        ({"order": 1, "solver": "paper", "solver_options": FAST}, (40, 5, 6, 6), (40, 5, 6, 6)),
        ({"order": 1, "solver": "paper", "solver_options": FAST}, (40, 5), (40, 3)),
    ],
)
def test_split_is_exact_and_survives_save_and_load(
    options: dict[str, object], source: tuple[int, ...], target: tuple[int, ...], tmp_path: Path
) -> None:
    x, y = torch.randn(source), torch.randn(target)
    maps = Disentangler(**options).fit(x, y)  # type: ignore[arg-type]
    components, residual = maps.split(x, y)
    assert len(components) == options["order"] + 1  # type: ignore[operator]
    assert all(part.shape == y.shape for part in (*components, residual))
    torch.testing.assert_close(torch.stack([*components, residual]).sum(0), y)
    maps.save(tmp_path / "maps")
    assert sorted(p.name for p in (tmp_path / "maps").iterdir()) == ["disentangler.safetensors"]
    again = Disentangler.load(tmp_path / "maps")
    assert again.config == maps.config
    for a, b in zip(again.split(x, y)[0], components, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
    assert not any(p.requires_grad for p in again.parameters())


def test_same_seed_same_maps() -> None:
    x, y = torch.randn(60, 4, 5, 5), torch.randn(60, 3, 5, 5)
    states = [Disentangler(order=1, seed=s, solver_options=FAST).fit(x, y).state_dict() for s in (0, 0, 1)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert any(not torch.equal(states[0][k], states[2][k]) for k in states[0])


@pytest.mark.parametrize("order", [0, 1])
def test_half_precision_features_are_split_in_the_precision_of_the_maps(order: int) -> None:
    x, y = torch.randn(64, 3, 4, 4).bfloat16(), torch.randn(64, 2, 4, 4).bfloat16()
    fitted = Disentangler(order=order, ridge=1e-3).fit(x, y)
    for half, full in zip(fitted.split(x, y)[0], fitted.split(x.float(), y.float())[0], strict=True):
        assert torch.equal(half, full)
    assert torch.equal(fitted(x), fitted(x.float()))
    assert torch.equal(fitted.components(x)[-1], fitted.components(x.float())[-1])


def test_arrays_raise() -> None:
    with pytest.raises(InputTypeError, match=r"expected a feature as a tensor, got ndarray; torch.as_tensor converts"):
        Disentangler(order=0).fit(np.zeros((8, 3)), torch.zeros(8, 2))  # type: ignore[arg-type]


def test_global_random_state_is_left_alone() -> None:
    x, y = torch.randn(60, 4, 5, 5), torch.randn(60, 3, 5, 5)
    before = torch.get_rng_state()
    Disentangler(order=1, solver_options=FAST).fit(x, y)
    assert torch.equal(before, torch.get_rng_state())


def test_projection_gives_an_upper_bound() -> None:
    x = torch.randn(500, 8, 2, 2, dtype=torch.float64)
    y = x[:, :3] + 0.1 * torch.randn(500, 3, 2, 2, dtype=torch.float64)
    left = [
        Disentangler(order=0, ridge=0.0, source_channels=c).fit(x, y, select=0).split(x, y)[1].var()
        for c in (None, 6, 3)
    ]
    assert left[0] < left[1] < left[2]


def test_ridge_search_picks_the_best_of_its_grid() -> None:
    x, y = torch.randn(60, 30, 1, 1, dtype=torch.float64), torch.randn(60, 2, 1, 1, dtype=torch.float64)
    y += 0.3 * x[:, :2]
    held = torch.randn(500, 30, 1, 1, dtype=torch.float64)
    truth = 0.3 * held[:, :2] + torch.randn(500, 2, 1, 1, dtype=torch.float64)
    fit, select = batch_moments(x, y), batch_moments(held, truth)

    def error(ridge: float) -> float:
        m = solve_ridge(fit, ridge)
        return float((truth[:, :, 0, 0] - held[:, :, 0, 0] @ m.weight - m.bias).var(0).sum())

    chosen = solve_ridge(fit, "search", select)
    assert error(chosen.ridge) == pytest.approx(min(error(r) for r in RIDGE_GRID), rel=1e-3)
    assert chosen.ridge >= 0.1  # 60 rows, 30 regressors: strong shrinkage is right


def test_ridge_equals_the_normal_equations() -> None:
    x, y = torch.randn(50, 4, 1, 1, dtype=torch.float64), torch.randn(50, 2, 1, 1, dtype=torch.float64)
    a = x[:, :, 0, 0] - x[:, :, 0, 0].mean(0)
    s = a.T @ a
    expected = torch.linalg.solve(s + 0.3 * s.trace() / 4 * torch.eye(4, dtype=torch.float64), a.T @ y[:, :, 0, 0])
    torch.testing.assert_close(solve_ridge(batch_moments(x, y), 0.3).weight, expected)


def test_without_ridge_dependent_sources_get_the_minimum_norm_map() -> None:
    x = torch.randn(50, 3, 1, 1, dtype=torch.float64)
    twice = torch.cat([x, x], 1)
    y = x[:, :1]
    weight = solve_ridge(batch_moments(twice, y), 0.0).weight[:, 0]
    torch.testing.assert_close(weight, torch.tensor([0.5, 0, 0, 0.5, 0, 0], dtype=torch.float64), atol=1e-8, rtol=0)


def test_invalid_options_and_features_raise() -> None:
    x, y = torch.randn(20, 4, 5, 5), torch.randn(20, 3, 5, 5)
    with pytest.raises(OptionError, match="order must be an integer"):
        Disentangler(order=-1)
    with pytest.raises(OptionError, match="kernel_size must be odd"):
        Disentangler(kernel_size=2)
    with pytest.raises(OptionError, match="solver must be 'closed_form' or 'paper'"):
        Disentangler(solver="magic")
    with pytest.raises(OptionError, match="no maps yet"):
        Disentangler().split(x, y)
    with pytest.raises(OptionError, match="ridge="):
        Disentangler(order=0).fit(x, y, select=0)
    with pytest.raises(OptionError, match="unknown options"):
        Disentangler(order=1, solver_options={"steps": 3}).fit(x, y)
    with pytest.raises(ShapeError, match="same images, got 20 and 19"):
        Disentangler().fit(x, y[:19])
    with pytest.raises(ShapeError, match=r"\(N, C, H, W\) or \(N, C\)"):
        Disentangler().fit(x[:, :, 0], y)
    maps = Disentangler(order=0).fit(x, y)
    with pytest.raises(ShapeError, match=r"\(N, 4, H, W\)"):
        maps(torch.randn(2, 5, 5, 5))
    with pytest.raises(ShapeError, match="3 channels"):
        maps.split(x, x)
    with pytest.raises(NonFiniteError):
        Disentangler(order=0).fit(x.masked_fill(x > 3, float("inf")).index_fill(0, torch.tensor([1]), float("nan")), y)


def test_files_that_cannot_be_read_raise(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="not there"):
        Disentangler.load(tmp_path)
    x, y = torch.randn(20, 4, 5, 5), torch.randn(20, 3, 5, 5)
    Disentangler(order=0).fit(x, y).save(tmp_path)
    path = tmp_path / "disentangler.safetensors"
    tensors, description = read_tensors(path)
    write_tensors(path, tensors, description | {"format_version": 99})
    with pytest.raises(FormatError, match="version 99"):
        Disentangler.load(tmp_path)
    description["maps"]["target_channels"] = 9
    write_tensors(path, tensors, description)
    with pytest.raises(FormatError, match=r"cannot|can read"):
        Disentangler.load(tmp_path)


def test_a_shared_spectrum_changes_nothing() -> None:
    x, y = torch.randn(90, 7, 1, 1, dtype=torch.float64), torch.randn(90, 4, 1, 1, dtype=torch.float64)
    fit, select = batch_moments(x[:60], y[:60]), batch_moments(x[60:], y[60:])
    shared = Spectrum.of(fit, select)
    for part in (slice(0, 2), slice(2, 4)):
        alone = solve_ridge(batch_moments(x[:60], y[:60, part]), "search", batch_moments(x[60:], y[60:, part]))
        together = solve_ridge(
            fit.targets(part.start, part.stop), "search", select.targets(part.start, part.stop), shared
        )
        assert alone.ridge == together.ridge
        torch.testing.assert_close(alone.weight, together.weight)


def test_above_the_search_limit_the_ridge_is_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(50, 4, 1, 1, dtype=torch.float64), torch.randn(50, 2, 1, 1, dtype=torch.float64)
    fit, doubled = batch_moments(x, y), batch_moments(torch.cat([x, x], 1), y)
    expected = solve_ridge(fit, 1e-4)
    monkeypatch.setattr("knowiso_train.regression.ridge.MAX_SEARCH_FEATURES", 2)
    found = solve_ridge(fit, "search", fit)
    assert found.ridge == 1e-4
    torch.testing.assert_close(found.weight, expected.weight)
    with pytest.raises(OptionError, match="linearly dependent"):
        solve_ridge(doubled, 0.0)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_hidden_channels_have_unit_deviation_on_the_fitting_images(kernel_size: int) -> None:
    generator = torch.Generator().manual_seed(2)
    x = 5 * torch.randn(150, 4, 5, 5, generator=generator) + 2
    y = torch.relu(torch.einsum("dc,nchw->ndhw", torch.randn(3, 4, generator=generator), x))
    maps = Disentangler(order=2, kernel_size=kernel_size, hidden=6, solver_options={"epochs": 3}).fit(x, y).maps
    fit_images = x[[i for i in range(150) if i not in _selection_images(150)]]
    features = maps.features(fit_images, 2)[1:]
    assert len(features) == 2
    for hidden in features:
        deviation = hidden.std((0, 2, 3))
        live = deviation[deviation > 0.5]  # a ReLU may be dead or nearly so: its deviation stays small
        assert len(live) >= 3
        torch.testing.assert_close(live, torch.ones(len(live)), rtol=1e-3, atol=1e-3)


def _selection_images(count: int) -> set[int]:
    return set(np.flatnonzero(split_by_hash(np.arange(count), (0.2, 0.8), 0) == 0).tolist())


def test_order_zero_builds_nothing_for_higher_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("built for order 0")

    monkeypatch.setattr(closed_form_fit, "FeatureSample", fail)
    monkeypatch.setattr(closed_form_fit, "fit_order", fail)
    x, y = torch.randn(40, 4, 5, 5), torch.randn(40, 3, 5, 5)
    maps = Disentangler(order=0).fit(x, y).maps
    assert len(maps.layers) == len(maps.readouts) == 0
    with pytest.raises(AssertionError, match="built for order 0"):
        Disentangler(order=1).fit(x, y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 1.5}, "order must be an integer"),
        ({"ridge": -1.0}, "ridge must be a number at least 0 or 'search'"),
        ({"ridge": "auto"}, "ridge must be"),
        ({"hidden": 0}, "hidden must be an integer at least 1"),
        ({"max_rows": 0}, "max_rows must be an integer at least 1"),
        ({"solver": "paper", "hidden": 4}, "hidden cannot be set with solver"),
        ({"order": 0, "solver_options": {"steps": 3}}, "unknown options"),
        ({"solver_options": {"readout": "best"}}, "readout must be 'auto', 'trained' or 'exact'"),
        ({"solver_options": {"epochs": 0}}, "epochs must be an integer at least 1"),
        ({"solver": "paper", "solver_options": {"lr": 0}}, "lr must be a number above 0"),
    ],
)
def test_configurations_are_validated_when_they_are_built(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        DisentangleConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("grid", [(1, 12), (12, 1), (2, 6), (1, 2)])
@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("dead", [0, 2])
def test_padding_is_not_counted_as_channels_without_variance(
    grid: tuple[int, int], kernel_size: int, dead: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(200, 4, *grid, generator=generator) for _ in range(2))
    # Channels of a constant have variance at the padding's border alone
    x[:, :dead] = 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Disentangler(order=0, kernel_size=kernel_size).fit(x, y)
    messages = [str(warning.message) for warning in caught if "source channel" in str(warning.message)]
    assert len(messages) == (dead > 0)
    assert all(f"{dead} source channel(s) without variance" in message for message in messages)


@pytest.mark.parametrize("ridge", ["search", 1e-3])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_higher_orders_do_not_depend_on_the_noise_floor_or_the_other_direction(
    kernel_size: int, ridge: float | str
) -> None:
    def network(seed: int, width: int) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU())

    images = torch.randn(100, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    shares = {
        measure(
            network(0, 6), network(1, 9), [images], "3", order=1, kernel_size=kernel_size, ridge=ridge, hidden=8,
            noise_floor=noise_floor, directions=directions, bootstrap=0, progress=False, solver_options={"epochs": 3},
        ).pairs[0].shares
        for noise_floor in (False, True)
        for directions in ("forward", "both")
    }  # fmt: skip
    assert len(shares) == 1


@pytest.mark.parametrize("order", [1, 2])
def test_nearly_constant_channels_are_bounded(order: int) -> None:
    x, y = (torch.randn(200, 4, 3, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    # Channel 0 is active in one image alone
    x[:, 0] = 0
    x[7, 0] = 1
    maps = Disentangler(order=order, solver_options={"epochs": 3}).fit(x, y).maps
    assert isinstance(maps, ClosedFormMaps)
    assert maps.features(x, order)[1].isfinite().all()
    strong = x.clone()
    strong[:, 0] = 1e4
    stronger = strong.clone()
    stronger[:, 0] = 1e6
    assert maps.standardize(strong).abs().max() <= MAX_SOURCE_DEVIATIONS
    # Beyond the bound no hidden channel changes
    assert torch.equal(maps.features(strong, order)[order], maps.features(stronger, order)[order])
