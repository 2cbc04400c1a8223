"""Page of a stability report: a matrix of all pairs of networks per layer, and the spread of each figure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from knowiso_train.measurement._page import method_details
from knowiso_train.measurement.render import duration, image_counts, percent
from knowiso_train.pages import (
    Cell,
    Column,
    Html,
    Section,
    heading,
    join,
    matrix,
    paragraph,
    picture,
    render_page,
    side_by_side,
    table,
)

if TYPE_CHECKING:
    from knowiso_train.diagnosis.stability import StabilityFigure, StabilityReport

FIGURE_AIDS: dict[StabilityFigure, tuple[str, str]] = {
    "unexplained": (
        "Unexplained share",
        "Each cell is the share of the row's network that the column's network does not reproduce.",
    ),
    "agreement": (
        "Agreement of the output",
        "Each cell is the share of the row's outputs that keep their class with the part explained by the column.",
    ),
    "residual_agreement": (
        "Agreement of the residual alone",
        "Each cell is the share of the row's outputs that keep their class with the unexplained part alone.",
    ),
    "kl": (
        "KL of the output",
        "Each cell is the divergence of the row's output, in nats, with the part explained by the column.",
    ),
}


def stability_page(report: StabilityReport, title: str | None = None) -> str:
    """Return the page; see `StabilityReport.to_html`."""
    counts = image_counts(report.images)
    figures = [figure for figure in FIGURE_AIDS if _is_measured(report, figure)]
    sections = [Section("All layers", _spreads(report, figures))] if report.layers else []
    sections += [
        Section(layer, side_by_side([_matrix(report, layer, figure) for figure in figures])) for layer in report.layers
    ]
    warnings = [
        f"{entry.layer}, {entry.target} explained from {entry.source}: {note}"
        for entry in report.entries
        for note in entry.pair.warnings
    ]
    return render_page(
        title or f"Stability of {len(report.networks)} networks",
        sections or [Section("No layers", paragraph("The report has no layers."))],
        subtitle=f"{', '.join(report.networks)} · images: {counts} · {duration(report.seconds)}",
        appendix=join(method_details(report.settings, report.versions, warnings)),
    )


def _is_measured(report: StabilityReport, figure: StabilityFigure) -> bool:
    return any(not math.isnan(report.spread(layer, figure).mean) for layer in report.layers)


def _format(value: float, figure: StabilityFigure) -> str:
    return percent(value) if figure != "kl" else "–" if math.isnan(value) else f"{value:.3g}"


def _matrix(report: StabilityReport, layer: str, figure: StabilityFigure) -> list[Html]:
    """Return the matrix of one figure; divergences are colored relative to the largest one."""
    values = report.matrix(layer, figure)
    largest = max((value for row in values for value in row if not math.isnan(value)), default=0.0)
    scale = largest if figure == "kl" and largest > 0 else 1.0
    title, aid = FIGURE_AIDS[figure]
    texts = [["" if math.isnan(value) else _format(value, figure) for value in row] for row in values]
    cells = matrix(f"{title}, {layer}", report.networks, [[value / scale for value in row] for row in values], texts)
    return [heading(title), picture(aid, cells)]


def _spreads(report: StabilityReport, figures: list[StabilityFigure]) -> Html:
    """Return mean, deviation and range of every figure and layer."""
    columns = [Column("layer", numeric=False), Column("figure", numeric=False)]
    columns += [Column("mean"), Column("standard deviation"), Column("smallest"), Column("largest")]
    rows = []
    for layer in report.layers:
        for figure in figures:
            spread = report.spread(layer, figure)
            numbers = (spread.mean, spread.deviation, spread.minimum, spread.maximum)
            cells = [Cell(_format(number, figure), number) for number in numbers]
            rows.append([Cell(layer), Cell(FIGURE_AIDS[figure][0]), *cells])
    return table("Over all ordered pairs of networks", columns, rows)
