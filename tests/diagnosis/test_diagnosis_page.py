"""The pages of a diagnosis and of a stability report."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from knowiso_train.diagnosis import OutputEffect
from knowiso_train.diagnosis._page import SHOWN_DIRECTIONS
from knowiso_train.diagnosis.render import key_figures
from knowiso_train.measurement.render import percent
from tests.helpers.diagnoses import CLASS_NAMES, NUM_CHANNELS, NUM_IMAGES, diagnosis, stability_report
from tests.helpers.html_page import PageParser


def test_figures_of_the_page_are_those_of_the_diagnosis(tmp_path: Path) -> None:
    made = diagnosis()
    text = made.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == text
    page = PageParser(text)
    overview = next(table for table in page.tables if table.caption == "All results")
    for layer, values, cells in zip(made, overview.values[1:], overview.rows[1:], strict=True):
        assert cells[0] == layer.layer
        figures = [layer.pair.unexplained, layer.directions[0].share, layer.directions[0].effect.kl]
        assert [float(values[i] or "nan") for i in (2, 4, 5)] == figures
        assert cells[6] == "cat (90.0 %)"
    channels = [table for table in page.tables if table.caption == "Channels"]
    for layer, table in zip(sorted(made, key=lambda layer: layer.layer), channels, strict=True):
        assert [float(row[1] or "nan") for row in table.values[1:]] == list(layer.channels)
        residual = [float(row[3] or "nan") for row in table.values[1:]]
        assert residual == pytest.approx([a * b for a, b in zip(layer.channels, layer.channel_variances, strict=True)])
        assert len(residual) == NUM_CHANNELS


def test_the_summary_has_the_extremes_of_all_layers() -> None:
    made = diagnosis()
    first, unreliable, second, _ = made.layers
    changed = replace(first.pair, functional=(replace(first.pair.functional[-1], agreement=0.25),))
    first = replace(first, pair=changed, classes=())
    effect = OutputEffect(0.1, 0.5, None)
    directions = (*second.directions[:3], replace(second.directions[3], effect=effect))
    second = replace(second, pair=replace(second.pair, unexplained=0.8), directions=directions)
    made = replace(made, layers=(first, unreliable, second))
    key = key_figures(made, "blind_spots")
    assert key is not None
    assert key.layer == first
    place = "layer2.<b> of large"
    change = "of the predictions change"
    expected = (
        ("80.0 %", f"of the variance of {place} cannot be computed from small, more than of any other layer."),
        (
            "75.0 %",
            f"{change} with the reproduced part alone in place of layer1 of large, more than at any other layer.",
        ),
        ("90.0 %", f"of {place} is not reproduced in images of class cat, against 80.0 % over all images."),
        ("50.0 %", f"{change} without direction 4 of {place}, more than without any other."),
    )
    assert key.lines == expected
    text = "".join(PageParser(made.to_html()).text)
    for figure, line in expected:
        assert f"{figure} {line}" in text
        assert f"{figure} {line}" in str(made)
    assert key_figures(replace(made, layers=(unreliable,)), "blind_spots") is None


def test_images_have_their_pictures_and_heat_maps() -> None:
    made = diagnosis()
    page = PageParser(made.to_html())
    images = [address for address in page.addresses if address.startswith("data:image/png")]
    tiles_per_layer = NUM_IMAGES + sum(
        len(part.images) for part in (*made.layers[0].directions, *made.layers[0].shared)
    )
    # Every tile has a heat map, also the mean of all images; that of the image without a thumbnail has no picture
    missing = 1 + len(made.layers[0].directions) + len(made.layers[0].shared)
    in_short = 2 * (2 * NUM_IMAGES - 1)  # of both kinds
    assert len(images) == len(made) * (2 * tiles_per_layer + 1 - missing) + in_short
    for thumbnail in made.thumbnails:
        assert thumbnail.picture in images
    text = "".join(page.text)
    assert text.count(f"{len(made.layers[0].directions) - SHOWN_DIRECTIONS} more directions") == len(made)
    assert "class 3\n" in text


def test_names_are_escaped_and_nothing_is_loaded() -> None:
    page = PageParser(diagnosis(strong=("large <i>", "other")).to_html(title="A & B"))
    assert page.tags.count("script") == 1
    assert not {"b", "i"} & set(page.tags)
    assert page.handlers == []
    assert all(address.startswith(("data:image/png;base64,", "#section-")) for address in page.addresses)
    text = "".join(page.text)
    for part in ("A & B", "large <i>", "layer2.<b>", CLASS_NAMES[2], "other reproduces 5.0 %"):
        assert part in text


def test_without_labels_there_are_no_classes() -> None:
    text = "".join(PageParser(diagnosis(labels=False).to_html()).text)
    assert "Classes" not in text
    assert not re.search(r"top-1|least explained class", text)
    assert "image 0\n" in text


def test_a_diagnosis_without_layers_has_a_page() -> None:
    assert "has no layer pairs" in replace(diagnosis(), layers=()).to_html()


def test_matrices_of_the_stability_page_are_those_of_the_report(tmp_path: Path) -> None:
    made = stability_report()
    text = made.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == text
    page = PageParser(text)
    tables = {table.caption: table for table in page.tables}
    for layer in made.layers:
        table = tables[f"Unexplained share, {layer}"]
        assert table.rows[0] == ["", *made.networks]
        for network, row, values in zip(made.networks, table.rows[1:], made.matrix(layer), strict=True):
            assert row == [network, *("" if value != value else percent(value) for value in values)]
    spreads = tables["Over all ordered pairs of networks"]
    spread = made.spread("layer1")
    assert [float(value or "nan") for value in spreads.values[1][2:]] == [
        spread.mean,
        spread.deviation,
        spread.minimum,
        spread.maximum,
    ]
    assert len(spreads.rows) == 1 + len(made.layers) * 4
    assert page.tags.count("script") == 1


def test_figures_that_were_not_measured_have_no_matrix() -> None:
    page = PageParser(stability_report(functional=False).to_html())
    assert "KL of the output" not in "".join(page.text)
    assert "has no layers" in replace(stability_report(), layers=(), entries=()).to_html()
