"""Page of a comparison: a table of the stages, and bars of every stage for each layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from knowiso_train.diagnosis.comparison.render import TABLE_TITLES, headline, shown_tables, warnings
from knowiso_train.measurement._page import method_details, output_bars, pair_bars
from knowiso_train.measurement.render import interval, percent
from knowiso_train.pages import (
    Cell,
    Column,
    Html,
    Section,
    heading,
    join,
    paragraph,
    picture,
    render_page,
    side_by_side,
    table,
)

if TYPE_CHECKING:
    from knowiso_train.diagnosis.comparison.report import StageComparison, StageFigure, StageLayer, StageResult

KEPT_AID = "Each bar is the reference's feature beside one stage; the stage cannot reproduce the hatched part (lost)."
GAINED_AID = "Each bar is the feature of one stage; the reference cannot reproduce the hatched part (gained)."
START_HINT = "First layer in the reference's order whose lost share is above 1 % by its 95 % interval"


def comparison_page(comparison: StageComparison, title: str | None = None) -> str:
    """Return the page; see `StageComparison.to_html`."""
    sections = [Section("Stages", _overview(comparison))] if comparison.stages else []
    sections += [Section(f"Layer {layer}", _layer(comparison, layer)) for layer in comparison.layers]
    return render_page(
        title or f"Stages beside {comparison.reference}",
        sections or [Section("No stages", paragraph("The comparison has no stages."))],
        subtitle=headline(comparison),
        appendix=join(method_details(comparison.settings, comparison.versions, warnings(comparison))),
    )


def _overview(comparison: StageComparison) -> Html:
    """Return a table of the stages, and one per figure with a column for each layer."""
    columns = [
        Column("stage", numeric=False),
        Column("step"),
        Column("output agrees", hint="Images with the reference's top-1 class; ± standard error"),
        Column("KL", hint="KL divergence of the stage's output from the reference's, in nats"),
        Column("loss starts in", numeric=False, hint=START_HINT),
    ]
    tables = [table("Stages", columns, [_stage_row(comparison, stage) for stage in comparison])]
    for figure in shown_tables(comparison):
        columns = [Column("stage", numeric=False), *(Column(layer) for layer in comparison.layers)]
        rows = [
            [Cell(stage.name), *(_figure_cell(stage, layer, figure) for layer in comparison.layers)]
            for stage in comparison
        ]
        tables.append(table(TABLE_TITLES[figure], columns, rows))
    return join(tables)


def _stage_row(comparison: StageComparison, stage: StageResult) -> list[Cell]:
    output = stage.output
    agreement, kl = Cell("–"), Cell("–")
    if output is not None:
        agreement = Cell(f"{percent(output.agreement)} ± {100 * output.agreement_error:.1f}", output.agreement)
        kl = Cell(f"{output.kl:.3g}", output.kl)
    step = Cell("–") if stage.step is None else Cell(str(stage.step), stage.step)
    return [Cell(stage.name), step, agreement, kl, Cell(comparison.loss_start(stage.name) or "–")]


def _figure_cell(stage: StageResult, layer: str, figure: StageFigure) -> Cell:
    value = stage.figure(layer, figure)
    entry = next((entry for entry in stage if entry.layer == layer), None)
    hint = ""
    if entry is not None and figure in ("lost", "gained"):
        pair = entry.of_reference if figure == "lost" else entry.of_stage
        hint = f"95 % interval: {interval(pair.interval)}"
    return Cell(percent(value), None if math.isnan(value) else value, hint)


def _layer(comparison: StageComparison, layer: str) -> Html:
    """Return bars of both directions side by side, with those of the outputs below."""
    entries: list[tuple[str, StageLayer]] = [
        (stage.name, entry) for stage in comparison for entry in stage if entry.layer == layer
    ]
    labels = [name for name, _ in entries]
    columns = []
    for title, aid, pairs in (
        ("Kept and lost", KEPT_AID, [entry.of_reference for _, entry in entries]),
        ("Gained", GAINED_AID, [entry.of_stage for _, entry in entries]),
    ):
        parts = [heading(title), picture(aid, pair_bars(pairs, labels))]
        columns.append([*parts, output_bars(pairs, labels)] if any(pair.functional for pair in pairs) else parts)
    return side_by_side(columns)
