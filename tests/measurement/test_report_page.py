"""The page, the CSV file and the data frame of a report."""

from __future__ import annotations

import csv
import io
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from knowiso_train import Report
from knowiso_train.errors import MissingDependencyError
from tests.helpers.html_page import PageParser
from tests.helpers.reports import functional_pair, pair, report

SCRIPT = "<script>alert(1)</script>"


@pytest.fixture
def mixed() -> Report:
    """Pairs of different orders, without a noise floor, with negative shares, and with markup in their names."""
    return report(
        pair(SCRIPT, "layer2.0", shares=(0.5, 0.2, 0.1), warnings=(f"dead channel in {SCRIPT}",)),
        pair("b", "b", shares=(0.75,)),
        pair("x", "a", "backward", (0.4, -0.01), noise_floor=None),
    )


def test_table_rows_equal_the_figures(mixed: Report) -> None:
    page = PageParser(mixed.to_html())
    tables = {table.caption: table for table in page.tables}
    forward, backward = tables["Figures of large explained from small"], tables["Figures of small explained from large"]
    assert forward.rows[0][:5] == ["source layer", "target layer", "order 0", "order 1", "order 2"]
    assert forward.rows[0][5:] == ["unexplained", "95 % interval", "noise floor"]
    assert [row[:2] for row in forward.rows[1:]] == [[SCRIPT, "layer2.0"], ["b", "b"]]
    for pair_result, values in zip(mixed.forward, forward.values[1:], strict=True):
        count = len(pair_result.shares)
        assert tuple(map(float, filter(None, values[2 : 2 + count]))) == pair_result.shares
        assert values[2 + count : 5] == [None] * (3 - count)
        assert float(values[5] or "nan") == pair_result.unexplained
        assert float(values[7] or "nan") == pair_result.noise_floor
    assert backward.rows[1] == ["x", "a", "40.0 %", "-1.0 %", "61.0 %", "59.0 … 64.0 %"]
    assert [row[0] for row in tables["Options that determine the figures"].rows[1:]] == list(mixed.settings)
    assert tables["Packages that affect the figures"].rows[1] == ["torch", "2"]


def test_pages_escape_names_and_hold_no_address(mixed: Report, tmp_path: Path) -> None:
    named = replace(
        mixed, source=f"small {SCRIPT}", settings={**mixed.settings, SCRIPT: SCRIPT}, versions={"a": SCRIPT}
    )
    text = named.to_html(tmp_path / "deep" / "page.html")
    assert (tmp_path / "deep" / "page.html").read_text(encoding="utf-8") == text
    page = PageParser(text)
    assert page.tags.count("script") == 1
    assert page.addresses == page.handlers == []
    assert f"dead channel in {SCRIPT}" in "".join(page.text)
    assert "<h1>small &lt;script&gt;alert(1)&lt;/script&gt; and large: shared features</h1>" in text
    assert "<h1>Two &amp; more</h1>" in mixed.to_html(title="Two & more")


def test_bars_equal_the_figures_and_the_bracket_stands_where_the_unexplained_part_begins() -> None:
    html = report(pair("a", "x", shares=(0.6, 0.25))).to_html()
    for part in (
        '<rect x="0.00%" y="2" width="60.00%"',
        '<rect x="60.00%" y="2" width="25.00%"',
        '<rect x="85.00%" y="2" width="15.00%"',
        '<line x1="82.00%" x2="87.00%" y1="28" y2="28"/>',
        "95\xa0% interval of the unexplained share: 13.0 … 18.0\xa0%",
    ):
        assert part in html


def test_pages_of_odd_reports() -> None:
    assert "has no layer pairs" in "".join(PageParser(report().to_html()).text)
    nan = float("nan")
    PageParser(report(pair("a", "x", shares=(nan,), unexplained=nan, interval=(nan, nan), noise_floor=nan)).to_html())
    paper = report(pair("a", "x", shares=(1.1, 0.3), component_variances=(1.1, 0.3), unexplained=0.3, additive=False))
    text = "".join(PageParser(paper.to_html()).text)
    assert "variance of order 0: 110.0 %" in text
    assert "sum to 100 %" not in text


def test_csv_and_data_frame_hold_every_figure(mixed: Report, tmp_path: Path) -> None:
    text = mixed.to_csv(tmp_path / "report.csv")
    assert (tmp_path / "report.csv").read_text(encoding="utf-8") == text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [(row["direction"], row["explaining_network"], row["explained_network"]) for row in rows] == [
        ("forward", "small", "large"),
        ("forward", "small", "large"),
        ("backward", "large", "small"),
    ]
    for row, expected in zip(rows, mixed, strict=True):
        assert (row["source"], row["target"], row["warnings"]) == (
            expected.source,
            expected.target,
            "; ".join(expected.warnings),
        )
        assert [float(row[f"order_{k}"]) for k in range(len(expected.shares))] == list(expected.shares)
        assert [row[f"order_{k}"] for k in range(len(expected.shares), 3)] == [""] * (3 - len(expected.shares))
        assert (float(row["unexplained_low"]), float(row["unexplained_high"])) == expected.interval
        assert float(row["noise_floor"] or "nan") == pytest.approx(expected.noise_floor or math.nan, nan_ok=True)
        assert float(row["ridge_0"]) == expected.ridge[0]
    pandas = pytest.importorskip("pandas")
    frame = mixed.to_dataframe()
    expected_frame = pandas.read_csv(io.StringIO(text)).fillna({"warnings": ""})
    pandas.testing.assert_frame_equal(frame, expected_frame, check_dtype=False)


def test_without_pandas_the_message_says_what_to_do(mixed: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingDependencyError, match=r"pip install pandas, or use Report\.to_csv"):
        mixed.to_dataframe()


def test_figures_of_the_outputs_and_similarities() -> None:
    made = report(functional_pair("a", "x"), pair("b", "y"))
    page = PageParser(made.to_html())
    tables = {table.caption: table for table in page.tables}
    assert tables["Figures of large explained from small"].rows[1][-2:] == ["0.830", "-0.020"]
    output = tables["Output of large with parts of a feature in its place"]
    assert [row[:2] for row in output.rows[1:]] == [
        ["a → x", part] for part in ("order 0", "orders 0 … 1", "residual alone", "own feature")
    ]
    first = made.pairs[0]
    shares = [*first.functional, first.residual_only, first.target_output]
    values = [tuple(map(float, filter(None, row[2:]))) for row in output.values[1:]]
    assert values == [(share.agreement, share.kl, share.top1) for share in shares]
    assert '<rect x="0.00%" y="2" width="93.70%"' in made.to_html()
    row = next(csv.DictReader(io.StringIO(made.to_csv())))
    assert (float(row["functional_1_kl"]), float(row["residual_only_agreement"])) == (0.11, 0.25)
    assert (float(row["target_output_top1"]), float(row["similarity_cka"])) == (0.923, 0.83)


def test_outputs_without_labels_have_no_top1() -> None:
    unlabeled = [replace(share, top1=None) for share in functional_pair("a", "x").functional]
    made = report(
        functional_pair(
            "a", "x", functional=tuple(unlabeled), residual_only=unlabeled[0], target_output=replace(unlabeled[0])
        )
    )
    page = PageParser(made.to_html())
    output = next(table for table in page.tables if table.caption.startswith("Output of large"))
    assert output.rows[0] == ["layer", "in the feature's place", "agreement", "KL"]
