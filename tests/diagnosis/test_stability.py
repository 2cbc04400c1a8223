"""Stability of networks of one task."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from knowiso_train import measure, stability
from knowiso_train.diagnosis.stability import StabilityReport
from knowiso_train.errors import LayerNameError, OptionError
from knowiso_train.measurement.data import SplitImageLoader


def network(channels: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, channels, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return model.append(nn.Linear(channels, 4))


def part_of(model: nn.Sequential, channels: int) -> nn.Sequential:
    """Return a network with the first channels of another."""
    part = network(channels)
    part[0].weight.data = model[0].weight.data[:channels].clone()
    part[0].bias.data = model[0].bias.data[:channels].clone()
    return part


def loader() -> DataLoader[Tensor]:
    images: Any = torch.randn(240, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(images, batch_size=60)


def run(networks: Any, layers: Any = "1", **options: Any) -> StabilityReport:
    return stability(networks, loader(), layers, progress=False, **{"bootstrap": 0} | options)


def test_matrix_has_explained_networks_as_rows() -> None:
    large = network(8)
    report = run({"large": large, "part": part_of(large, 4), "same": large})
    (_, by_part, by_same), (by_large, _, _), _ = report.matrix("1")
    assert by_part > 0.2  # the part has four of the eight channels
    assert by_large < 1e-3
    assert by_same < 1e-3
    assert all(math.isnan(report.matrix("1")[i][i]) for i in range(3))


def test_figures_are_those_of_measure() -> None:
    a, b = network(8, 1), network(6, 2)
    report = run({"a": a, "b": b}, functional=True)
    expected = measure(a, b, loader(), "1", order=0, directions="both", functional=True, progress=False, bootstrap=0)
    assert [(entry.source, entry.target) for entry in report.entries] == [("a", "b"), ("b", "a")]
    for entry, pair in zip(report.entries, expected.pairs, strict=True):
        assert entry.pair.unexplained == pytest.approx(pair.unexplained, rel=1e-6)
        assert entry.pair.functional[0].kl == pytest.approx(pair.functional[0].kl, rel=1e-4)
    assert report.matrix("1", "kl")[1][0] == expected.forward[0].functional[0].kl
    assert report.matrix("1", "residual_agreement")[0][1] == expected.backward[0].residual_only.agreement


def test_networks_run_once_on_the_images_to_fit_on() -> None:
    networks = {name: network(4, seed) for seed, name in enumerate("abcd")}
    images = dict.fromkeys(networks, 0)

    def forward(model: nn.Module, batch: Tensor) -> Any:
        images[next(name for name, one in networks.items() if one is model)] += len(batch)
        return model(batch)

    stream = SplitImageLoader(loader())
    sizes = [len(batch.index) for part in (stream.fit_batches(), stream.report_batches()) for batch in part]
    reports = []
    for cache_gib in (2.0, 0.0):
        images.update(dict.fromkeys(networks, 0))
        reports.append(run(networks, functional=False, forward=forward, cache_gib=cache_gib))
        # Each network has three pairs; each checks one image, and determines the layouts in its first batch
        assert set(images.values()) == {3 + (sum(sizes) + 2 * sizes[0] if cache_gib else 3 * sum(sizes))}
    for layer in reports[0].layers:
        np.testing.assert_allclose(reports[0].matrix(layer), reports[1].matrix(layer), rtol=1e-6)


def test_spread_is_over_all_ordered_pairs() -> None:
    report = run([network(4, seed) for seed in range(3)], functional=False)
    values = np.array(report.matrix("1"))
    off_diagonal = values[~np.eye(3, dtype=bool)]
    spread = report.spread("1")
    assert report.networks == ("network 0", "network 1", "network 2")
    assert (spread.mean, spread.minimum) == pytest.approx((off_diagonal.mean(), off_diagonal.min()))
    assert (spread.deviation, spread.maximum) == pytest.approx((off_diagonal.std(ddof=1), off_diagonal.max()))
    assert math.isnan(report.spread("1", "kl").mean)


def test_architectures_are_paired_by_lists_of_layers() -> None:
    deep = nn.Sequential(nn.Identity(), *network(5))
    report = run({"plain": network(4), "deep": deep}, {"plain": ["0", "1"], "deep": ["1", "2"]})
    assert report.layers == ("0", "1")
    assert {(e.layer, e.pair.source, e.pair.target) for e in report.entries} == {
        ("0", "0", "1"), ("0", "1", "0"), ("1", "1", "2"), ("1", "2", "1"),
    }  # fmt: skip
    with pytest.raises(LayerNameError, match="equally many"):
        run({"plain": network(4), "deep": deep}, {"plain": ["0"], "deep": ["1", "2"]})


def test_wrong_options_are_refused() -> None:
    with pytest.raises(OptionError, match="at least two networks"):
        run([network(4)])
    with pytest.raises(OptionError, match="no option kernel; expected some of"):
        run([network(4), network(4)], kernel=3)
    with pytest.raises(OptionError, match="missing \\['b'\\]"):
        run({"a": network(4), "b": network(4)}, {"a": ["0"]})


def test_report_is_saved_printed_and_drawn(tmp_path: Path) -> None:
    report = run([network(4, seed) for seed in range(3)], ["0", "1"], bootstrap=20)
    assert StabilityReport.from_json(report.to_json(tmp_path / "stability.json")) == report
    text = str(report)
    assert "±" in text
    assert "StabilityEntry" not in text
    report.plot(tmp_path / "stability.png", title="Three seeds")
    assert (tmp_path / "stability.png").stat().st_size > 10_000
    report.plot(figure="kl")
    with pytest.raises(LayerNameError, match="compared: 0, 1"):
        report.matrix("5")
    with pytest.raises(OptionError, match="figure must be one of"):
        report.matrix("1", "share")  # type: ignore[arg-type]
