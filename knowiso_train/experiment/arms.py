"""Page and picture of a distillation with several arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from knowiso_train.errors import MissingDependencyError
from knowiso_train.experiment.cards import explained_layers
from knowiso_train.measurement._page import method_details
from knowiso_train.measurement._plot import new_figure, save_figure
from knowiso_train.measurement.render import MUTED_COLOR, UNEXPLAINED_COLOR
from knowiso_train.pages import (
    Bar,
    Cell,
    Column,
    Html,
    LegendEntry,
    Section,
    Segment,
    difference_bars,
    heading,
    join,
    picture,
    render_page,
    stacked_bars,
    table,
)
from knowiso_train.pages.colors import TEXT_COLOR, order_colors, series_colors
from knowiso_train.utils.serialization import write_file

ARMS_WIDTH_INCHES, ARM_HEIGHT_INCHES, ARMS_MARGIN_INCHES = 9.0, 0.22, 1.3
Cards = Sequence[Mapping[str, Any]]


def write_arms(folder: Path, summary: Mapping[str, Any]) -> str:
    """Write the page and the picture of a finished distillation, and return the names of the written files.

    Args:
        folder: Folder for `summary.html` and, if matplotlib is installed, `summary.png`.
        summary: `arms`, the cards as for `results_table`; `settings` and `versions` of `describe_run`.

    Examples:
        >>> import tempfile
        >>> card = {"arm": "student", "parameters": 1200, "top1": 98.5, "explained": {"layer2": 0.5}}
        >>> summary = {"arms": [card], "settings": {"epochs": 6}, "versions": {"torch": "2.8"}}
        >>> write_arms(Path(tempfile.mkdtemp()), summary)
        'summary.html, summary.png'
    """
    write_file(folder / "summary.html", _page(summary))
    try:
        _plot(summary["arms"], folder / "summary.png")
    except MissingDependencyError as error:
        return f"summary.html (no summary.png: {error})"
    return "summary.html, summary.png"


def _page(summary: Mapping[str, Any]) -> str:
    """Return the page of a distillation: arms, their accuracy, and the explained shares of the teacher's layers."""
    cards, layers = summary["arms"], explained_layers(summary["arms"])
    columns = [Column("arm", numeric=False), Column("parameters"), Column("top-1"), Column("best"), Column("seconds")]
    rows = [
        [
            Cell(card["arm"]),
            Cell(f"{card['parameters']:,}", card["parameters"]),
            *(_number(card.get(name), 1, " %", 2) for name in ("top1", "best_top1")),
            _number(card.get("seconds"), 1, "", 0),
            *(_number(card.get("explained", {}).get(layer), 100, " %", 1) for layer in layers),
        ]
        for card in cards
    ]
    columns += [Column(f"explains {layer}", hint="share of the teacher's layer on test images") for layer in layers]
    reference = next((card for card in cards if card["arm"] != "teacher"), cards[0])
    values = [(card["arm"], card["top1"] / 100, f"{card['arm']}: {card['top1']:.2f} %") for card in cards]
    accuracy = difference_bars(values, reference["top1"] / 100, reference["arm"], text_title="top-1")
    sections = [
        Section("Arms", table("Networks after the last epoch, on test images", columns, rows)),
        Section("Accuracy", picture(f"Each bar begins at the accuracy of {reference['arm']}.", accuracy)),
    ]
    if layers:
        aid = "The colored part of the teacher's layer is a linear function of the student's layer, on test images."
        shares = join(part for layer in layers for part in (heading(layer), _share_bars(cards, layer)))
        sections.append(Section("Explained shares", picture(aid, shares)))
    details = method_details(dict(summary["settings"]), dict(summary["versions"]), [])
    return render_page("Distillation", sections, appendix=join(details))


def _plot(cards: Cards, path: Path) -> None:
    """Plot the accuracy and the explained shares of each arm."""
    layers = explained_layers(cards)
    num_bars = len(cards) * max(2, len(layers))
    height = ARMS_MARGIN_INCHES + ARM_HEIGHT_INCHES * num_bars
    figure = new_figure(ARMS_WIDTH_INCHES, height, None, "the picture of the arms")
    left, right = figure.subplots(1, 2, sharey=True)
    names = [card["arm"] for card in cards]
    # Points, since the axis does not begin at 0
    left.plot([card["top1"] for card in cards], names, "o", markersize=8, color=MUTED_COLOR)
    for name, card in zip(names, cards, strict=True):
        left.annotate(f"{card['top1']:.2f}", (card["top1"], name), (9, -3), textcoords="offset points", fontsize=8)
    left.margins(x=0.2)
    left.set_title("top-1 accuracy on test images, %", fontsize=10.5, color=TEXT_COLOR, loc="left")
    thickness = 0.75 / max(1, len(layers))
    for i, (layer, color) in enumerate(zip(layers, order_colors(len(layers)), strict=True)):
        rows = [(row, card["explained"][layer]) for row, card in enumerate(cards) if layer in card.get("explained", {})]
        middles = [row + (i - (len(layers) - 1) / 2) * thickness for row, _ in rows]
        bars = right.barh(middles, [100 * share for _, share in rows], 0.9 * thickness, color=color, label=layer)
        right.bar_label(bars, fmt="%.1f", padding=3, fontsize=8, color=TEXT_COLOR)
    right.set_xlim(0, 108)
    right.set_title("explained share of the teacher's layers, %", fontsize=10.5, color=TEXT_COLOR, loc="left")
    left.set_ylim(len(cards) - 0.5, -0.5)
    for axes in (left, right):
        axes.tick_params(length=0, labelsize=8.5, labelcolor=MUTED_COLOR)
        axes.grid(axis="x", color=UNEXPLAINED_COLOR, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
    num_columns = max(1, 80 // max(map(len, layers), default=1))
    figure.legend(loc="outside lower center", ncols=num_columns, frameon=False, fontsize=8.5)
    save_figure(figure, path)


def _number(value: float | None, factor: float, unit: str, digits: int) -> Cell:
    return Cell("") if value is None else Cell(f"{factor * value:.{digits}f}{unit}", value)


def _share_bars(cards: Cards, layer: str) -> Html:
    """Return one bar per arm with the explained share of a layer."""
    ((color, text_color),) = series_colors(1)
    shares = {card["arm"]: card["explained"][layer] for card in cards if layer in card.get("explained", {})}
    bars = []
    for arm, share in shares.items():
        explained = Segment(0.0, share, f"explained: {100 * share:.1f} %", color, text_color=text_color)
        bars.append(Bar(arm, (explained, Segment(max(share, 0.0), 1.0, "unexplained")), f"{100 * share:.1f} %"))
    return stacked_bars(bars, [LegendEntry("explained", color), LegendEntry("unexplained")], text_title="explained")
