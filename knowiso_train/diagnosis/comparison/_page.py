"""Page of a comparison: where the loss starts, tables of the stages, and bars of every stage for each layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from knowiso_train.diagnosis.comparison.render import (
    TABLE_TITLES,
    has_steps,
    headline,
    loss_summary,
    most_lost,
    shown_tables,
    warnings,
)
from knowiso_train.measurement._page import method_details, output_bars, pair_bars
from knowiso_train.measurement.render import interval, percent
from knowiso_train.pages import (
    Cell,
    Column,
    Html,
    Section,
    folded,
    heading,
    join,
    note,
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
START_MARK = "▸"
START_NOTE = f"{START_MARK} marks the layer in which the loss of a stage starts: above 1 % by its whole 95 % interval."
OUTPUTS_TITLE = "Outputs with the parts in the feature's place"
MAX_ADJACENT_LAYERS = 6  # tables with more columns stand one below the other


def comparison_page(comparison: StageComparison, title: str | None = None) -> str:
    """Return the page; see `StageComparison.to_html`."""
    sections = [Section("Where the loss starts", _overview(comparison))] if comparison.stages else []
    sections += [Section(layer, _layer(comparison, layer)) for layer in comparison.layers]
    return render_page(
        title or f"Stages beside {comparison.reference}",
        sections or [Section("No stages", paragraph("The comparison has no stages."))],
        subtitle=headline(comparison),
        appendix=join(method_details(comparison.settings, comparison.versions, warnings(comparison))),
    )


def _overview(comparison: StageComparison) -> Html:
    """Return a summary, a table of the stages, and one colored table per figure with a column for each layer."""
    columns = [
        Column("stage", numeric=False),
        Column("loss starts in", numeric=False, hint=START_HINT),
        Column("most lost in", numeric=False, hint="Layer with the largest lost share"),
        Column("output agrees", hint="Images with the reference's top-1 class; ± standard error"),
        Column("KL", hint="KL divergence of the stage's output from the reference's, in nats"),
        *([Column("step")] if has_steps(comparison) else []),
    ]
    rows = [_stage_row(comparison, stage) for stage in comparison]
    tables = [_figure_table(comparison, figure) for figure in shown_tables(comparison)]
    parts = [paragraph(loss_summary(comparison)), note([START_NOTE]), _arrange(comparison, tables[:2])]
    return join([*parts, table("Each stage", columns, rows), _arrange(comparison, tables[2:])])


def _arrange(comparison: StageComparison, tables: list[Html]) -> Html:
    """Return tables side by side, or below each other where they have many columns."""
    is_narrow = len(comparison.layers) <= MAX_ADJACENT_LAYERS
    return side_by_side([[part] for part in tables]) if tables and is_narrow else join(tables)


def _stage_row(comparison: StageComparison, stage: StageResult) -> list[Cell]:
    output, start, most = stage.output, comparison.loss_start(stage.name), most_lost(stage)
    agreement, kl = Cell("–"), Cell("–")
    if output is not None:
        agreement = Cell(f"{percent(output.agreement)} ± {100 * output.agreement_error:.1f}", output.agreement)
        kl = Cell(f"{output.kl:.3g}", output.kl)
    cells = [
        Cell(stage.name),
        _layer_cell(stage, start),
        _layer_cell(stage, None if most is None else most.layer),
        agreement,
        kl,
    ]
    step = [Cell("–") if stage.step is None else Cell(str(stage.step), stage.step)]
    return cells + step if has_steps(comparison) else cells


def _layer_cell(stage: StageResult, layer: str | None) -> Cell:
    return Cell("–" if layer is None else f"{layer} ({percent(stage[layer].lost)})")


def _figure_table(comparison: StageComparison, figure: StageFigure) -> Html:
    columns = [Column("stage", numeric=False), *(Column(layer) for layer in comparison.layers)]
    rows = []
    for stage in comparison:
        start = comparison.loss_start(stage.name) if figure == "lost" else None
        cells = [_figure_cell(stage, layer, figure, is_start=layer == start) for layer in comparison.layers]
        rows.append([Cell(stage.name), *cells])
    return table(TABLE_TITLES[figure], columns, rows)


def _figure_cell(stage: StageResult, layer: str, figure: StageFigure, *, is_start: bool) -> Cell:
    value = stage.figure(layer, figure)
    entry = next((entry for entry in stage if entry.layer == layer), None)
    hint = ""
    if entry is not None and figure in ("lost", "gained"):
        pair = entry.of_reference if figure == "lost" else entry.of_stage
        hint = f"95 % interval: {interval(pair.interval)}"
    text = f"{START_MARK} {percent(value)}" if is_start else percent(value)
    return Cell(
        text, None if math.isnan(value) else value, hint, strength=value if figure in ("lost", "gained") else None
    )


def _layer(comparison: StageComparison, layer: str) -> Html:
    """Return bars of both directions side by side, with those of the outputs folded below."""
    entries: list[tuple[str, StageLayer]] = [
        (stage.name, entry) for stage in comparison for entry in stage if entry.layer == layer
    ]
    labels = [name for name, _ in entries]
    bars, outputs = [], []
    for title, aid, pairs in (
        ("Kept and lost", KEPT_AID, [entry.of_reference for _, entry in entries]),
        ("Gained", GAINED_AID, [entry.of_stage for _, entry in entries]),
    ):
        bars.append([heading(title), picture(aid, pair_bars(pairs, labels))])
        if any(pair.functional for pair in pairs):
            outputs.append([heading(title), output_bars(pairs, labels)])
    parts = [side_by_side(bars)]
    return join([*parts, folded(OUTPUTS_TITLE, side_by_side(outputs))] if outputs else parts)
