"""Picture of the monitor: legend inside, roles in the title, an axis around the curves, floors in their colors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from knowiso_train.callbacks._curves import plot_curves
from knowiso_train.callbacks.history import Measurement
from tests.helpers.reports import pair, report

pytest.importorskip("matplotlib")
LONG_NAMES = (
    "resnet.encoder.stages.{}.layers.1.layer.1.convolution.of.the.shortcut.path",
    "vision_model.encoder.layers.{}.mlp.activation_fn.and.a.module.with.a.long.name",
)


def history(*shares: tuple[float, float], floor: float = 0.02, names: tuple[str, str] = ("a{}", "b{}")) -> list:
    """Return two measurements with the first and last share of each pair."""
    return [
        Measurement(
            500 * i,
            report(
                *(
                    pair(names[0].format(k), names[1].format(k), shares=(share[i],), noise_floor=floor * (k + 1))
                    for k, share in enumerate(shares)
                )
            ),
        )
        for i in range(2)
    ]


def test_long_names_stay_inside_and_distinguishable(tmp_path: Path) -> None:
    figure = plot_curves(history((0.2, 0.8), (0.3, 0.7), names=LONG_NAMES), tmp_path / "shares.png")
    legend = figure.legends[0]
    box, page = legend.get_window_extent(), figure.bbox
    assert page.x0 <= box.x0 < box.x1 <= page.x1
    assert page.y0 <= box.y0 < box.y1 <= figure.axes[0].get_window_extent().y0
    first, second = (text.get_text() for text in legend.get_texts())
    assert first != second
    assert first.startswith("resnet.encoder.stages.0")
    assert first.endswith("with.a.long.name")
    assert " → " in first


def test_title_has_the_roles_of_equal_names(tmp_path: Path) -> None:
    measurements = [Measurement(m.step, replace(m.report, source="ResNet", target="ResNet")) for m in history((0, 1))]
    title = plot_curves(measurements, tmp_path / "shares.png").axes[0].get_title(loc="left")
    assert title == "Features of the teacher (ResNet) that the student (ResNet) explains"


def test_noise_floors_have_the_colors_of_their_curves(tmp_path: Path) -> None:
    figure = plot_curves(history((0.1, 0.8), (0.3, 0.6)), tmp_path / "shares.png")
    curves, floors = figure.axes[0].lines[:2], figure.axes[0].lines[2:]
    assert [line.get_color() for line in floors] == [line.get_color() for line in curves]
    assert [list(line.get_ydata()) for line in floors] == [[2.0, 2.0], [4.0, 4.0]]
    assert "same color" in figure.legends[0].get_title().get_text()


def test_axis_around_a_flat_curve(tmp_path: Path) -> None:
    figure = plot_curves(history((0.612, 0.633)), tmp_path / "shares.png")
    low, high = figure.axes[0].get_ylim()
    assert 55 < low < 61.2 < 63.3 < high < 70
    # The floor of 2 % would flatten the curve again
    assert len(figure.axes[0].lines) == 1
    assert "at most 2.0 %" in figure.legends[0].get_title().get_text()


def test_curves_differ_in_color_marker_or_line(tmp_path: Path) -> None:
    figure = plot_curves(history(*[(0.1 * k, 0.1) for k in range(20)]), tmp_path / "shares.png")
    styles = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(styles) == 20
