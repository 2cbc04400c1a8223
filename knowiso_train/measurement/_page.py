"""Page of a report: bars and tables of every direction, with settings, versions and warnings folded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from knowiso_train.measurement.render import (
    FUNCTIONAL_HEADS,
    block_title,
    directions,
    footnotes,
    headline,
    interval,
    number_cells,
    number_columns,
    pair_name,
    pair_warnings,
    percent,
    roughness_mark,
)
from knowiso_train.pages import (
    Bar,
    Cell,
    Column,
    Html,
    LegendEntry,
    Mark,
    Section,
    Segment,
    folded,
    heading,
    join,
    note,
    paragraph,
    picture,
    render_page,
    stacked_bars,
    table,
)
from knowiso_train.pages.charts import clip, stacked_edges
from knowiso_train.pages.colors import series_colors
from knowiso_train.pages.elements import HATCHED

if TYPE_CHECKING:
    from knowiso_train.measurement.report import PairResult, Report

EXPLAINED_CSS_COLOR = "light-dark(#c9d8e6,#41586f)"  # all orders together, where they cannot be stacked
OUTPUT_AID = (
    "Each bar is the share of outputs that keep their class while only the explained part of a layer's feature "
    "(colored) or only its residual (hatched) is passed on."
)
COLUMN_HINTS = {
    "order 0": "Explained by a linear map",
    "unexplained": "Share of the variance that no order explains",
    "95 % interval": "Bootstrap interval of the unexplained share over images; sorted by its width",
    "noise floor": "Share that is still explained after the targets are permuted between images",
    "CKA": "Linear centered kernel alignment, crossed between fitting and report images",
    "Procrustes": "Correlation after the best rotation, which is fitted on other images",
    "R²": "Share that least squares explains, fitted on other images",
}


def report_page(report: Report, title: str | None = None) -> str:
    """Return the page; see `Report.to_html`."""
    sections = [
        Section(block_title(report, direction), _direction(report, direction, pairs))
        for direction, pairs in directions(report)
    ]
    if not sections:
        sections = [Section("No layer pairs", paragraph("The report has no layer pairs."))]
    return render_page(
        title or f"{report.source} and {report.target}: shared features",
        sections,
        subtitle=headline(report),
        appendix=join([note(footnotes(report)), *_appendix(report)]),
    )


def method_details(settings: dict[str, Any], versions: dict[str, str], warnings: list[str]) -> list[Html]:
    """Return the folded warnings, settings and versions of a result; warnings only where there are some."""
    details = []
    if warnings:
        details.append(folded(f"Warnings ({len(warnings)})", join(map(paragraph, warnings))))
    details.append(folded("Settings", _key_values("Options that determine the figures", settings)))
    details.append(folded("Versions", _key_values("Packages that affect the figures", versions)))
    return details


def _direction(report: Report, direction: str, pairs: tuple[PairResult, ...]) -> Html:
    """Return the bars and the table of one direction."""
    explaining, explained = report.roles(direction)
    aid = (
        f"Each bar is the variance of one layer of {explained}: the colored part can be computed from the layer of "
        f"{explaining}, the hatched part cannot, and the bracket is the 95 % interval of the edge between them."
    )
    mark = roughness_mark(report)
    parts = [picture(aid, pair_bars(pairs)), _table(f"Figures of {block_title(report, direction)}", pairs, mark)]
    if any(pair.functional for pair in pairs):
        parts += [heading(f"Output of {explained}"), output_bars(pairs), _output_table(explained, pairs, mark)]
    return join(parts)


def pair_bars(pairs: Sequence[PairResult], labels: Sequence[str] | None = None) -> Html:
    """Return the stacked bars of layer pairs, or bars with a diamond per component where these are correlated.

    Args:
        pairs: Layer pairs from top to bottom, at least one.
        labels: Text left of each bar. None: names of the layers.
    """
    colors = series_colors(max(len(pair.shares) for pair in pairs))
    variances = [value for pair in pairs if not pair.additive for value in pair.component_variances]
    largest = max([1.0, *(value for value in variances if value < float("inf"))])
    entries = []
    if any(pair.additive for pair in pairs):
        entries += [
            LegendEntry(f"order {k}{' (linear)' if k == 0 else ''}", fill) for k, (fill, _) in enumerate(colors)
        ]
    if not all(pair.additive for pair in pairs):
        entries.append(LegendEntry("explained", EXPLAINED_CSS_COLOR))
        entries += [LegendEntry(f"Var(order {k})", fill, "diamond") for k, (fill, _) in enumerate(colors)]
    entries += [LegendEntry("unexplained"), LegendEntry("95 % interval of the edge", kind="interval")]
    if any(pair.noise_floor is not None for pair in pairs):
        entries.append(LegendEntry("noise floor", kind="floor"))
    names = [pair_name(pair) for pair in pairs] if labels is None else labels
    bars = [_bar(pair, name, colors) for pair, name in zip(pairs, names, strict=True)]
    return stacked_bars(bars, entries, text_title="unexplained", maximum=largest)


def output_bars(pairs: Sequence[PairResult], labels: Sequence[str] | None = None) -> Html:
    """Return bars of the outputs that stay the same with the explained part, or the residual, in a feature's place.

    Args:
        pairs: Layer pairs from top to bottom; those without functional shares are left out.
        labels: Text left of the bars of each pair. None: names of the layers.
    """
    color, text_color = series_colors(1)[0]
    names = [pair_name(pair) for pair in pairs] if labels is None else labels
    bars = []
    for pair, name in zip(pairs, names, strict=True):
        if not pair.functional or pair.residual_only is None:
            continue
        parts = (("explained part", color, pair.functional[-1]), ("residual alone", "", pair.residual_only))
        for part, fill, output in parts:
            hint = f"{name}, {part}: {percent(output.agreement)} of the outputs agree, KL {output.kl:.3g}"
            segment = Segment(0.0, clip(output.agreement), hint, fill, text_color=text_color)
            label = name if part == "explained part" else ""
            bars.append(Bar(label, (segment,), percent(output.agreement), small_text=f"KL {output.kl:.3g}"))
    entries = [LegendEntry("explained part in the feature's place", color), LegendEntry("residual alone")]
    return picture(OUTPUT_AID, stacked_bars(bars, entries, text_title="outputs that agree"))


def _output_table(explained: str, pairs: Sequence[PairResult], mark: str) -> Html:
    """Return agreement, KL and top-1 of every part that stood in the place of a feature."""
    columns = [
        Column("layer", numeric=False),
        Column("in the feature's place", numeric=False),
        Column(
            "agreement", hint="Outputs with the same top-1 class as the network's own; ± standard error over images"
        ),
        Column("KL", hint="KL divergence from the network's own output, in nats"),
        Column("top-1", hint="Outputs with the label as top-1 class"),
    ]
    rows = []
    for pair in pairs:
        parts = [(f"orders 0 … {k}" if k else "order 0", output) for k, output in enumerate(pair.functional)]
        others = [("residual alone", pair.residual_only), ("own feature", pair.target_output)]
        for part, output in [*parts, *others]:
            if output is not None:
                agreement = f"{mark}{percent(output.agreement)} ± {100 * output.agreement_error:.1f}"
                figures = [Cell(agreement, output.agreement), Cell(f"{mark}{output.kl:.3g}", output.kl)]
                figures.append(Cell(mark + percent(output.top1), output.top1))
                rows.append([Cell(pair_name(pair)), Cell(part), *figures])
    if all(row[-1].value is None for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    caption = f"Output of {explained} with parts of a feature in its place"
    return folded("All parts, with KL and top-1", table(caption, columns, rows))


def _bar(pair: PairResult, label: str, colors: list[tuple[str, str]]) -> Bar:
    end = clip(pair.explained)
    marks: list[Mark] = []
    if pair.additive:
        edges = stacked_edges(pair.shares, end)
        segments = [
            Segment(*edge, f"order {k}: {percent(share)}", fill, f"{100 * share:.1f}", text_color)
            for k, (share, edge, (fill, text_color)) in enumerate(zip(pair.shares, edges, colors, strict=False))
        ]
    else:
        segments = [Segment(0.0, end, f"explained: {percent(pair.explained)}", EXPLAINED_CSS_COLOR)]
        marks += [
            Mark(variance, f"variance of order {k}: {percent(variance)}", "diamond", fill)
            for k, (variance, (fill, _)) in enumerate(zip(pair.component_variances, colors, strict=False))
        ]
    segments.append(Segment(end, 1.0, f"unexplained: {percent(pair.unexplained)}"))
    if pair.noise_floor is not None:
        marks.append(Mark(pair.noise_floor, f"noise floor: {percent(pair.noise_floor)}"))
    low, high = pair.interval
    bounds = interval(pair.interval)
    return Bar(
        label,
        tuple(segments),
        percent(pair.unexplained),
        small_text=bounds.removesuffix(" %"),
        interval=(clip(1 - high), clip(1 - low)),
        interval_hint=f"95 % interval of the unexplained share: {bounds}",
        marks=tuple(marks),
    )


def _table(caption: str, pairs: tuple[PairResult, ...], mark: str) -> Html:
    """Return the figures of one direction, without those of the outputs, which have a table of their own."""
    names = [name for name in number_columns(pairs) if name not in FUNCTIONAL_HEADS]
    colors = dict(enumerate(series_colors(max(len(pair.shares) for pair in pairs))))
    same = all(pair.source == pair.target for pair in pairs)
    layers = ["layer"] if same else ["source layer", "target layer"]
    columns = [Column(name, numeric=False) for name in layers]
    for name in names:
        kind, _, number = name.partition(" ")
        order = int(number) if kind == "order" and number.isdigit() else None
        color = HATCHED if name == "unexplained" else "" if order is None else colors[order][0]
        hint = COLUMN_HINTS.get(name, f"Explained by {order} non-linear steps beyond the orders below" if order else "")
        columns.append(Column(name, hint=hint, color=color))
    rows = [[*map(Cell, (pair.source, pair.target)[: len(layers)]), *number_cells(pair, names, mark)] for pair in pairs]
    return table(caption, columns, rows)


def _appendix(report: Report) -> list[Html]:
    """Return the folded warnings, layers, settings and versions."""
    details = method_details(report.settings, report.versions, pair_warnings(report))
    columns = [
        Column("source layer", numeric=False),
        Column("target layer", numeric=False),
        Column("direction", numeric=False),
        Column("channels", hint="Of the source layer → of the target layer", numeric=False),
        Column("grid", hint="Height × width of the source layer → of the target layer", numeric=False),
        Column("samples", hint="Positions × images of the order-0 fit"),
        Column("ridge", hint="Relative ridge of each order", numeric=False),
    ]
    rows = [
        [
            Cell(pair.source),
            Cell(pair.target),
            Cell(pair.direction),
            Cell(f"{pair.source_channels} → {pair.target_channels}"),
            Cell(f"{_grid(pair.source_grid)} → {_grid(pair.target_grid)}"),
            Cell(f"{pair.rows:,}", pair.rows),
            Cell(", ".join(f"{ridge:.3g}" for ridge in pair.ridge)),
        ]
        for pair in report.pairs
    ]
    if rows:
        details.insert(-2, folded("Layers", table("Shapes and fits of the layer pairs", columns, rows)))
    return details


def _grid(grid: tuple[int, int]) -> str:
    return f"{grid[0]} × {grid[1]}"


def _key_values(caption: str, values: dict[str, Any]) -> Html:
    columns = [Column("name", numeric=False), Column("value", numeric=False)]
    return table(caption, columns, [[Cell(str(name)), Cell(str(value))] for name, value in values.items()])
