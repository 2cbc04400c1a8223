"""The report: its words, its notebook view, its file and its picture."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from knowiso_train import Report
from knowiso_train.errors import FormatError, LayerNameError, MissingDependencyError, OptionError
from knowiso_train.measurement.render import percent
from knowiso_train.pages.colors import ORDER_COLORS, TEXT_COLOR, order_colors, text_color_on
from tests.helpers.reports import functional_pair, pair, report

matplotlib = pytest.importorskip("matplotlib")
MARKER_POINTS = 4.5  # half of a marker with its edge


@pytest.fixture
def both() -> Report:
    return report(
        pair("a", "x"), pair("b", "y"), pair("x", "a", "backward", (0.4, 0.1)), pair("y", "b", "backward", (0.4, 0.1))
    )


def test_text_says_every_figure_once_per_row(both: Report) -> None:
    text = str(both)
    lines = text.splitlines()
    assert "small and large" in lines[0]
    assert "1,800 to fit, 600 to select, 600 to report" in lines[0]
    forward = lines.index("large explained from small")
    backward = lines.index("small explained from large")
    assert forward < backward
    assert re.split(r"\s{2,}", lines[forward + 3].strip()) == [
        "a",
        "x",
        "60.0 %",
        "25.0 %",
        "15.0 %",
        "13.0 … 18.0 %",
        "1.2 %",
    ]
    assert re.split(r"\s{2,}", lines[backward + 4].strip()) == [
        "y",
        "b",
        "40.0 %",
        "10.0 %",
        "50.0 %",
        "48.0 … 53.0 %",
        "1.2 %",
    ]
    assert len({len(line) for line in lines[forward + 1 : forward + 5]}) == 1  # aligned to the last column
    assert "sum to 100 %" in text


def test_text_of_the_papers_solver_does_not_claim_a_sum() -> None:
    text = str(report(pair("a", "x", shares=(1.1, 0.3), unexplained=0.3, additive=False)))
    assert "110.0 %" in text
    assert "do not add up" in text
    assert "sum to 100 %" not in text


def test_text_ends_with_the_warnings_and_their_layers() -> None:
    noted = report(
        pair("a", "x", warnings=("only 7 images",)), pair("b", "b", "backward", warnings=("a dead channel",))
    )
    assert str(noted).splitlines()[-2:] == ["! a → x (forward): only 7 images", "! b (backward): a dead channel"]


def test_figures_from_few_images_are_marked_everywhere(tmp_path: Path) -> None:
    rough = replace(report(pair("a", "x")), images={"fit": 6, "select": 2, "report": 2})
    row = next(line for line in str(rough).splitlines() if line.strip().startswith("a "))
    assert re.split(r"\s{2,}", row.strip())[2:] == ["~60.0 %", "~25.0 %", "~15.0 %", "13.0 … 18.0 %", "~1.2 %"]
    for text in (str(rough), rough._repr_html_()):
        assert "~ rough: measured on 2 images only" in text
    assert "only 2 report images" in rough.plot().axes[0].get_xlabel()
    assert "rough" not in str(report(pair("a", "x"))) + report(pair("a", "x")).plot().axes[0].get_xlabel()


def test_text_of_one_pair_is_a_table() -> None:
    one = pair("a", "x", warnings=("a dead channel",))
    lines = str(one).splitlines()
    assert lines[0] == "x explained from a (forward)"
    assert re.split(r"\s{2,}", lines[3].strip()) == ["a", "x", "60.0 %", "25.0 %", "15.0 %", "13.0 … 18.0 %", "1.2 %"]
    assert lines[4:] == ["! a dead channel"]
    assert repr(one) == "PairResult('a' → 'x', forward, 15.0 % unexplained)"


def test_text_of_unknown_and_tiny_figures() -> None:
    assert [percent(share) for share in (-0.0004, -0.003, 1.02, float("nan"), None)] == [
        "0.0 %",
        "-0.3 %",
        "102.0 %",
        "–",
        "–",
    ]
    rows = str(report(pair("a", "x", noise_floor=None))).splitlines()
    assert not any("noise floor" in row.lower() for row in rows)
    ragged = str(report(pair("a", "x"), pair("b", "y", shares=(0.5,))))
    assert "order 1" in ragged
    assert "no layer pairs" in str(report())


def test_html_escapes_names_and_draws_every_share() -> None:
    html = replace(report(pair("<b>", "x&y", warnings=("<script>",))), source="<i>")._repr_html_()
    for raw in ("<b>", "<i>", "<script>", "x&y"):
        assert raw not in html
    assert "&lt;b&gt;" in html
    assert f"width:60.00%;background:{ORDER_COLORS[0]}" in html
    assert f"width:25.00%;background:{ORDER_COLORS[1]}" in html
    for tag in ("div", "table", "thead", "tbody", "tr", "td", "th", "span", "code"):
        assert len(re.findall(rf"<{tag}[ >]", html)) == html.count(f"</{tag}>"), tag


def test_html_never_stacks_correlated_components() -> None:
    html = report(pair("a", "x", shares=(1.1, 0.3), unexplained=0.3, additive=False))._repr_html_()
    assert re.findall(r"width:([\d.]+)%", html) == ["70.00"]


def test_pairs_are_found_by_name(both: Report) -> None:
    assert both["x"] is both.pairs[0]
    assert both["b"] is both.pairs[1]  # a name of the layer explained from
    assert both["a", "backward"] is both.pairs[2]
    assert (len(both), list(both)) == (4, list(both.pairs))
    assert [len(both.forward), len(both.backward)] == [2, 2]
    assert report(pair("x", "a", "backward"))["a"].direction == "backward"
    with pytest.raises(LayerNameError, match="a → x, b → y"):
        both["z"]
    with pytest.raises(LayerNameError, match="2 forward pairs: a → x, b → x"):
        report(pair("a", "x"), pair("b", "x"))["x"]
    with pytest.raises(LayerNameError, match="direction"):
        both["x", "sideways"]


def test_target_names_win_over_source_names() -> None:
    crossed = report(pair("a", "b"), pair("b", "c"))
    assert crossed["b"] is crossed.pairs[0]


def test_json_round_trip(both: Report, tmp_path: Path) -> None:
    text = both.to_json(tmp_path / "deep" / "report.json")
    assert Report.from_json(text) == both
    assert Report.from_json(tmp_path / "deep" / "report.json") == both
    assert Report.from_json(str(tmp_path / "deep" / "report.json")) == both
    assert Report.from_dict(both.to_dict()) == both
    assert json.loads(text)["format_version"] == 1
    assert "disentangler" not in text


def test_json_is_strict_and_keeps_what_json_cannot_say() -> None:
    odd = replace(
        report(pair("a", "x", unexplained=float("nan"), noise_floor=float("-inf"))),
        settings={"ridge": np.float64(0.5), "limit": float("inf")},
    )
    text = odd.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    back = Report.from_json(text)
    assert math.isnan(back.pairs[0].unexplained)
    assert back.pairs[0].noise_floor == float("-inf")
    assert back.settings == {"ridge": 0.5, "limit": float("inf")}
    assert Report.from_json(report(pair("a", "x", noise_floor=None)).to_json()).pairs[0].noise_floor is None


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d.update(format_version=2), "format version 1, got 2"),
        (lambda d: d.pop("format"), "Report.to_json"),
        (lambda d: d.pop("seconds"), "missing.*seconds"),
        (lambda d: d.update(more=1), "unknown.*more"),
        (lambda d: d["pairs"][0].pop("shares"), r"'pairs'\[0\]: missing.*shares"),
        (lambda d: d["pairs"][0].update(unexplained="much"), "'unexplained' must be a number, got 'much'"),
        (lambda d: d["pairs"][0].update(interval=[0.1]), "'interval' must be a list of 2"),
        (lambda d: d["pairs"][0].update(direction="up"), "'direction' must be one of"),
        (lambda d: d["pairs"][0].update(additive=1), "'additive' must be true or false"),
        (lambda d: d["pairs"][0].update(shares=[1.0]), "one share, interval and component variance per order"),
        (lambda d: d.update(pairs=3), "'pairs' must be a list"),
    ],
)
def test_malformed_reports_are_refused(both: Report, change: Any, match: str) -> None:
    values = both.to_dict()
    change(values)
    with pytest.raises(FormatError, match=match):
        Report.from_dict(values)


def test_files_that_are_no_report_are_refused(tmp_path: Path) -> None:
    (tmp_path / "half.json").write_text('{"format":')
    with pytest.raises(FormatError, match="no JSON"):
        Report.from_json(tmp_path / "half.json")
    with pytest.raises(FormatError, match="not there"):
        Report.from_json(tmp_path / "none.json")
    with pytest.raises(FormatError, match=r"Report\.to_json"):
        Report.from_json("[1]")


def test_picture_has_a_panel_per_direction(both: Report, tmp_path: Path) -> None:
    figure = both.plot(tmp_path / "deep" / "report.png", title="what they know")
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "large explained from small",
        "small explained from large",
    ]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a → x", "b → y"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "order 0 (linear)",
        "order 1",
        "unexplained",
        "95 % interval of unexplained (right)",
        "noise floor",
    ]
    with Image.open(tmp_path / "deep" / "report.png") as image:
        assert image.width == 1440
        drawn = {color for _, color in image.convert("RGB").getcolors(1 << 24)}
    for color in ORDER_COLORS[:2]:
        assert tuple(int(color[i : i + 2], 16) for i in (1, 3, 5)) in drawn


def test_picture_bars_are_the_shares(both: Report) -> None:
    widths = [round(patch.get_width(), 6) for patch in both.plot().axes[0].patches]
    assert widths[:3] == [0.15, 0.6, 0.25]
    texts = [text.get_text() for text in both.plot().axes[0].texts]
    assert texts[:3] == ["60.0", "25.0", "15.0"]
    # The interval of the table, beside the bar
    right = both.plot().axes[0].child_axes[0]
    assert [label.get_text() for label in right.get_yticklabels()] == ["13.0 … 18.0"] * 2


def test_picture_titles_and_figures_stay_readable() -> None:
    marked = report(pair("a", "x", noise_floor=0.3), pair("b", "y", "backward"))
    # The mark would cross the 60.0 at its middle
    assert min(abs(text.get_position()[0] - 0.3) for text in marked.plot().axes[0].texts) > 0.03
    lite = replace(marked, source="EfficientNet-Lite0", target="EfficientNet-Lite1").plot()
    assert lite.axes[0].get_title(loc="left") == "EfficientNet-Lite1 explained from EfficientNet-Lite0"
    long = replace(
        marked, source="vit_base_patch16_224.augreg2_in21k_ft_in1k", target="convnext_tiny.in12k_ft_in1k"
    ).plot()
    assert len(long.axes[0].get_title(loc="left")) <= 52
    assert long.axes[0].get_title(loc="left").startswith("convnext")


@pytest.mark.parametrize("num_orders", [1, 2, 3, 4])
@pytest.mark.parametrize("made", [pair, functional_pair])
def test_legend_is_within_the_picture(made: Any, num_orders: int) -> None:
    first = made("a", "x", shares=(0.2,) * num_orders)
    for noise_floor in (0.0123, None):
        pairs = [replace(first, noise_floor=noise_floor), made("x", "a", "backward", noise_floor=noise_floor)]
        figure = report(*pairs).plot()
        figure.draw_without_rendering()
        legend = figure.legends[0].get_window_extent()
        assert 0 <= legend.x0 < legend.x1 <= figure.bbox.width
        # Markers of a bar of 100 % do not cover the interval beside it
        tick = figure.axes[0].child_axes[0].yaxis.get_major_ticks()[0].label2.get_window_extent()
        end = figure.axes[0].get_window_extent().x1
        assert tick.x0 - end > (MARKER_POINTS / 72 * figure.dpi if first.functional else 0)


def test_picture_survives_odd_figures() -> None:
    nan = float("nan")
    odd = report(
        pair("a", "x", shares=(0.9, -0.02)),
        pair("b", "y", shares=(-0.1, 0.0)),
        pair("c", "z", shares=(nan, nan), unexplained=nan, interval=(nan, nan), noise_floor=nan),
        pair("encoder.stages.3.blocks.12.mlp.fc2.activation", "e", noise_floor=None),
        pair("p", "q", shares=(1.3, 0.2), unexplained=0.3, additive=False),
    )
    figure = odd.plot()
    figure.draw_without_rendering()
    for patch in figure.axes[0].patches:
        assert 0 <= patch.get_x() <= patch.get_x() + patch.get_width() <= 1 + 1e-9
    assert max(len(label.get_text()) for label in figure.axes[0].get_yticklabels()) < 60


def test_picture_refuses_what_it_cannot_write(both: Report, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"\.doc"):
        both.plot(tmp_path / "report.doc")
    with pytest.raises(OptionError, match="no layer pairs"):
        report().plot()


def test_picture_leaves_pyplot_alone(both: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would fail
    names = [name for name in matplotlib.rcParams if name != "backend"]  # asking for it imports pyplot
    before = [matplotlib.rcParams[name] for name in names]
    both.plot(tmp_path / "report.png")
    assert [matplotlib.rcParams[name] for name in names] == before


def test_picture_without_matplotlib_names_the_extra(both: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"knowiso_train\[plots\]"):
        both.plot()


def test_colors_go_from_dark_to_light_for_any_number_of_orders() -> None:
    for count in range(1, 9):
        colors = order_colors(count)
        light = [sum(int(color[i : i + 2], 16) for i in (1, 3, 5)) for color in colors]
        assert len(set(colors)) == count
        assert light == sorted(light)
    assert (text_color_on(ORDER_COLORS[0]), text_color_on(ORDER_COLORS[-1])) == ("#ffffff", TEXT_COLOR)
