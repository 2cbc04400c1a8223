"""Elements of pages: escaping, PNG files read by another library, colors, and the page as a whole."""

from __future__ import annotations

import base64
import io
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from knowiso_train.errors import ShapeError
from knowiso_train.pages import (
    Bar,
    Cell,
    Column,
    LegendEntry,
    Mark,
    Section,
    Segment,
    Tile,
    difference_bars,
    folded,
    heat_image,
    image_grid,
    join,
    matrix,
    note,
    paragraph,
    picture,
    render_page,
    stacked_bars,
    table,
    thumbnail,
)
from knowiso_train.pages.charts import MAX_BARS, Axis
from knowiso_train.pages.colors import DARK_ORDER_COLORS, HEAT_RAMP, ORDER_COLORS, heat_colors
from tests.helpers.html_page import PageParser

MARKUP = """<script>alert("1")</script><img src=x onerror='alert(2)'> & "quoted" 'single'"""


def decoded(uri: str) -> np.ndarray:
    """Return the pixels of a data URI, read by Pillow."""
    head, _, data = uri.partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        image.load()
        return np.asarray(image)


@pytest.mark.parametrize("shape", [(3, 7, 5), (7, 5, 3), (1, 7, 5), (7, 5)])
def test_thumbnails_hold_the_pixels(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = np.moveaxis(pixels, 0, -1) if shape[0] in (1, 3) else pixels
    assert np.array_equal(decoded(thumbnail(pixels)), expected.squeeze())
    assert np.array_equal(decoded(thumbnail(torch.from_numpy(pixels) / 255)), expected.squeeze())


def test_large_images_are_reduced_and_bad_values_clipped() -> None:
    photo = torch.linspace(0, 1, 3 * 400 * 200).reshape(3, 400, 200)
    small = decoded(thumbnail(photo, max_pixels=100))
    assert small.shape == (100, 50, 3)
    expected = torch.nn.functional.avg_pool2d(photo, 4).permute(1, 2, 0).numpy()
    assert np.abs(small / 255 - expected).max() < 0.02
    odd = torch.tensor([[-3.0, 0.5, 9.0, math.nan]])
    assert decoded(thumbnail(odd)).tolist() == [[0, 128, 255, 0]]
    for wrong in (torch.zeros(2, 4, 4), torch.zeros(4)):
        with pytest.raises(ShapeError, match="expected an image"):
            thumbnail(wrong)
    with pytest.raises(ShapeError, match="expected a heat map"):
        heat_image(np.zeros(3), 1.0)


def test_heat_maps_are_stronger_where_values_are_larger() -> None:
    rgba = decoded(heat_image(np.array([[0.0, 1.0], [2.0, math.nan]]), maximum=2.0)).astype(int)
    assert rgba.shape == (2, 2, 4)
    assert 0 == rgba[0, 0, 3] < rgba[0, 1, 3] < rgba[1, 0, 3]
    assert rgba[1, 1, 3] == 0
    lightness = heat_colors(np.linspace(0, 1, 50))[:, :3] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > 0).all()
    assert not decoded(heat_image(torch.zeros(2, 2), 0.0))[..., 3].any()


def simulated(colors: tuple[str, ...], deficiency: str) -> np.ndarray:
    """Return colors as dichromats see them, in CIE Lab (matrices of Viénot, Brettel and Mollon 1999)."""
    rgb = np.array([[int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] for color in colors])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    kinds = {
        "protanopia": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
        "deuteranopia": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
        "none": np.eye(3),
    }
    linear = (linear @ np.array(kinds[deficiency]).T).clip(0, 1)
    xyz = linear @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T
    f = np.cbrt(xyz / [0.9505, 1.0, 1.089])
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], -1)


@pytest.mark.parametrize("deficiency", ["none", "protanopia", "deuteranopia"])
@pytest.mark.parametrize("colors", [ORDER_COLORS, DARK_ORDER_COLORS, HEAT_RAMP])
def test_neighboring_colors_differ_for_color_blind_readers(colors: tuple[str, ...], deficiency: str) -> None:
    lab = simulated(colors, deficiency)
    assert np.linalg.norm(np.diff(lab, axis=0), axis=1).min() > 15  # 2 is just noticeable


def test_all_text_is_escaped() -> None:
    bar = Bar(
        MARKUP,
        (Segment(0, 0.5, MARKUP, MARKUP, MARKUP, MARKUP),),
        MARKUP,
        MARKUP,
        (0.1, 0.2),
        MARKUP,
        (Mark(0.1, MARKUP, color=MARKUP), Mark(0.2, MARKUP, "diamond", MARKUP)),
    )
    kinds = ("swatch", "floor", "diamond", "interval")
    content = join(
        [
            paragraph(MARKUP),
            note([MARKUP]),
            picture(MARKUP, paragraph(MARKUP)),
            folded(MARKUP, paragraph(MARKUP)),
            table(MARKUP, [Column(MARKUP, hint=MARKUP, color=MARKUP)], [[Cell(MARKUP, 1.0, MARKUP)]]),
            stacked_bars([bar], [LegendEntry(MARKUP, MARKUP, kind) for kind in kinds], text_title=MARKUP),
            difference_bars([(MARKUP, 0.1, MARKUP)] * (MAX_BARS + 1), 0.2, MARKUP, text_title=MARKUP),
            matrix(MARKUP, [MARKUP], [[0.5]], [[MARKUP]]),
            image_grid([Tile(thumbnail(np.zeros((2, 2))), MARKUP, MARKUP)]),
        ]
    )
    page = PageParser(render_page(MARKUP, [Section(MARKUP, content)] * 3, subtitle=MARKUP, appendix=paragraph(MARKUP)))
    assert page.tags.count("script") == 1
    assert page.handlers == []
    assert all(address.startswith(("data:image/png;base64,", "#section-")) for address in page.addresses)
    assert "".join(page.text).count(MARKUP) > 40


def test_a_page_loads_nothing() -> None:
    page = render_page("a", [Section("b", paragraph("c"))])
    assert re.findall(r"https?:|//\w|@import|url\((?!#)|fetch\(|XMLHttpRequest|WebSocket", page) == []
    assert "default-src 'none'" in page
    assert "nav" not in PageParser(page).tags  # too short for a list of contents


def test_names_that_utf8_cannot_hold_are_replaced() -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    assert "<h1>caf?</h1>" in render_page(name, [])


def test_bars_stay_within_their_axis() -> None:
    segments = (Segment(-1.0, 0.5, "a", "#000000"), Segment(0.5, 9.0, "b"), Segment(math.nan, math.nan, "c"))
    html = stacked_bars([Bar("layer", segments, "1 %", interval=(math.nan, 1.0))], [], text_title="t", maximum=2.0)
    assert re.findall(r'<rect x="([\d.]+)%" y="2" width="([\d.]+)%"', html) == [("0.00", "25.00"), ("25.00", "75.00")]
    assert "bracket" not in html


@pytest.mark.parametrize(
    ("maximum", "ticks"),
    [
        (1.0, ["0", "25", "50", "75", "100 %"]),
        (1.1, ["0", "25", "50", "75", "100 %"]),
        (2.0, ["0", "50", "100", "150", "200 %"]),
    ],
)
def test_axes_have_round_numbers_at_their_places(maximum: float, ticks: list[str]) -> None:
    html = stacked_bars([], [], text_title="share", maximum=maximum)
    found = re.findall(r'<text x="([\d.]+)%"[^>]*>([^<]*)</text>', html)
    assert [text for _, text in found] == ticks
    for position, text in found:
        assert float(position) * maximum == pytest.approx(float(text.removesuffix(" %")), rel=1e-4)


def test_axes_of_differences_end_at_round_numbers_around_the_values() -> None:
    assert Axis.around([0.337, 0.401]) == Axis(0.32, 0.42)
    assert Axis.around([-0.013, 1.27]).ticks() == pytest.approx([-0.5, 0.0, 0.5, 1.0, 1.5])
    assert Axis.around([0.5, 0.5, math.nan]).low <= 0.5 < Axis.around([0.5]).high
    assert Axis.around([]).percent(math.nan) == 0
    html = difference_bars([("cat", 0.4, ""), ("dog", 0.35, "")], 0.38, "all", text_title="share")
    low, high = Axis.around([0.35, 0.38, 0.4]).low, Axis.around([0.35, 0.38, 0.4]).high
    edges = [
        (float(x), float(x) + float(width))
        for x, width in re.findall(r'<rect x="([\d.]+)%" y="2" width="([\d.]+)', html)
    ]
    for edge, bar in zip(edges, [(0.38, 0.4), (0.35, 0.38)], strict=True):
        assert edge == pytest.approx([100 * (share - low) / (high - low) for share in bar], abs=0.02)
    assert re.findall(r"fill:var\(--(\w+)\)", html)[:2] == ["above", "below"]


def test_numbers_are_drawn_above_the_lines_that_cross_them() -> None:
    bar = Bar("layer", (Segment(0, 0.8, "order 0", "#16325b", "80.0"),), "20 %", marks=(Mark(0.4, "noise floor"),))
    html = stacked_bars([bar], [], text_title="t")
    assert html.index('class="floor"') < html.index(">80.0<")
    assert "stroke:#16325b" in html  # the halo


def test_images_stand_in_rows_of_equal_lengths() -> None:
    tile = Tile(thumbnail(np.zeros((2, 2))))
    columns = [re.search(r"--columns:(\d)", image_grid([tile] * count))[1] for count in (1, 4, 5, 6, 8, 9, 10)]  # type: ignore[index]
    assert columns == ["3", "4", "5", "3", "4", "3", "5"]


def test_numbers_and_their_units_stay_on_one_line() -> None:
    text = "5 % of 12 min, KL 0.1, class 5 stays, layer 3 has 4 points"
    page = render_page("t", [Section("s", paragraph(text))])
    broken = "5\xa0% of 12\xa0min, KL\xa00.1, class 5 stays, layer 3 has 4\xa0points"
    assert f"<p>{broken}</p>" in page


def test_tables_refuse_rows_of_other_lengths() -> None:
    with pytest.raises(ValueError, match="argument"):
        table("t", [Column("a")], [[Cell("1"), Cell("2")]])
    assert "data-value" not in table("t", [Column("a")], [[Cell("–", math.nan)], [Cell("", None)]])
