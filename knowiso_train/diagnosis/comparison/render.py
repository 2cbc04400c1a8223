"""Text tables of a comparison of stages."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from knowiso_train.measurement.render import image_counts, interval, percent
from knowiso_train.utils.text_table import format_table

if TYPE_CHECKING:
    from knowiso_train.diagnosis.comparison.report import StageComparison, StageFigure, StageLayer, StageResult

# Of the tables that have a column per layer
TABLE_TITLES: dict[StageFigure, str] = {
    "lost": "Lost: share of the reference's feature that the stage does not reproduce",
    "gained": "Gained: share of the stage's feature that the reference does not reproduce",
    "agreement": "Output agrees: images with the reference's own top-1 class, the kept part in place of the feature",
    "lost_agreement": "Lost part agrees: the same with the lost part alone, and the feature's mean",
}


def render_comparison(comparison: StageComparison) -> str:
    """Return one table of the stages, and one per figure with a column for each layer."""
    lines = [headline(comparison), ""]
    if not comparison.stages:
        return "\n".join([*lines, "no stages"])
    lines += [format_table(stage_rows(comparison), rule=True), ""]
    for figure, title in shown_tables(comparison).items():
        rows = [["stage", *comparison.layers]]
        rows += [
            [stage.name, *(percent(stage.figure(layer, figure)) for layer in comparison.layers)] for stage in comparison
        ]
        lines += [title, format_table(rows, rule=True, indent="  "), ""]
    lines.append('print(comparison["stage"]) shows orders, intervals and outputs of a stage.')
    notes = warnings(comparison)
    return "\n".join([*lines, "", *(f"! {note}" for note in notes)] if notes else lines)


def render_stage(stage: StageResult) -> str:
    """Return a table with one row per layer."""
    orders = max((len(entry.of_reference.shares) for entry in stage), default=0)
    rows = [["layer", *(f"order {k}" for k in range(orders)), "lost", "95 %", "gained", "95 %", "agrees", "KL"]]
    rows += [_layer_row(entry, orders) for entry in stage]
    return "\n".join([f"stage {stage.name}", format_table(rows, rule=True, indent="  ")])


def headline(comparison: StageComparison) -> str:
    """Return reference, number of stages, numbers of images and time in one line."""
    counts = comparison.stages[-1].images if comparison.stages else {}
    images = image_counts(counts) or "none"
    return f"{comparison.reference} and {len(comparison)} stages · images: {images} · {comparison.seconds:.1f} s"


def stage_rows(comparison: StageComparison) -> list[list[str]]:
    """Return one row of text per stage, below a header: step, output, and the layer in which the loss starts."""
    rows = [["stage", "step", "output agrees", "KL", "loss starts in"]]
    for stage in comparison:
        output = stage.output
        rows.append(
            [
                stage.name,
                "–" if stage.step is None else str(stage.step),
                "–" if output is None else percent(output.agreement),
                "–" if output is None else f"{output.kl:.3g}",
                comparison.loss_start(stage.name) or "–",
            ]
        )
    return rows


def shown_tables(comparison: StageComparison) -> dict[StageFigure, str]:
    """Return titles of the figures that were measured."""
    functional = any(entry.of_reference.functional for stage in comparison for entry in stage)
    return {name: title for name, title in TABLE_TITLES.items() if functional or name in ("lost", "gained")}


def warnings(comparison: StageComparison) -> list[str]:
    """Return all warnings, each with its stage and layer."""
    return [
        f"{stage.name}, {entry.layer}: {note}"
        for stage in comparison
        for entry in stage
        for note in dict.fromkeys((*entry.of_reference.warnings, *entry.of_stage.warnings))
    ]


def _layer_row(entry: StageLayer, orders: int) -> list[str]:
    shares = [percent(share) for share in entry.of_reference.shares]
    kl = entry.figure("kl")
    return [
        entry.layer,
        *shares,
        *[""] * (orders - len(shares)),
        percent(entry.lost),
        interval(entry.of_reference.interval),
        percent(entry.gained),
        interval(entry.of_stage.interval),
        percent(entry.figure("agreement")),
        "–" if math.isnan(kl) else f"{kl:.3g}",
    ]
