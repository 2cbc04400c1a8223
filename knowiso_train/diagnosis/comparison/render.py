"""Text tables of a comparison of stages."""

from __future__ import annotations

import math
from statistics import fmean
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
    lines += [loss_summary(comparison), "", format_table(stage_rows(comparison), rule=True, left=(0, 1)), ""]
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


def loss_summary(comparison: StageComparison) -> str:
    """Return where the loss starts and where it is largest; of checkpoints, how the lost share changes."""
    first, last = comparison.stages[0], comparison.stages[-1]
    if has_steps(comparison):
        shares = [percent(fmean(entry.lost for entry in stage)) for stage in (first, last)]
        return f"Lost share, mean over the layers: {shares[0]} at {first.name}, {shares[1]} at {last.name}."
    starts = [(stage, layer) for stage in comparison if (layer := comparison.loss_start(stage.name)) is not None]
    if not starts:
        return "No stage loses more than 1 % of the feature of any layer."
    stage, layer = starts[0]
    start = f"The loss starts at {stage.name} in {layer}, of which {percent(stage[layer].lost)} is lost"
    before = "" if stage is first else "; the stages before lose at most 1 % of every layer"
    losses = [(entry.lost, each.name, entry.layer) for each in comparison for entry in each]
    lost, name, worst = max(loss for loss in losses if not math.isnan(loss[0]))
    return f"{start}{before}. The largest loss is {percent(lost)}, at {name} in {worst}."


def most_lost(stage: StageResult) -> StageLayer | None:
    """Return the layer with the largest lost share. None: no layer has one."""
    known = [entry for entry in stage if not math.isnan(entry.lost)]
    return max(known, key=lambda entry: entry.lost, default=None)


def has_steps(comparison: StageComparison) -> bool:
    """Return whether a stage is a checkpoint with a step."""
    return any(stage.step is not None for stage in comparison)


def stage_rows(comparison: StageComparison) -> list[list[str]]:
    """Return one row of text per stage, below a header: where the loss starts, output, and the step of checkpoints."""
    header = ["stage", "loss starts in", "output agrees", "KL"]
    rows = [[*header, "step"] if has_steps(comparison) else header]
    for stage in comparison:
        output, start = stage.output, comparison.loss_start(stage.name)
        row = [
            stage.name,
            "–" if start is None else f"{start} ({percent(stage[start].lost)})",
            "–" if output is None else percent(output.agreement),
            "–" if output is None else f"{output.kl:.3g}",
        ]
        step = "–" if stage.step is None else str(stage.step)
        rows.append([*row, step] if has_steps(comparison) else row)
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
