"""Flat records of a comparison: one row per stage and layer."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING

from knowiso_train.measurement._records import Value, flatten

if TYPE_CHECKING:
    from knowiso_train.diagnosis.comparison.report import StageComparison, StageLayer, StageResult
    from knowiso_train.measurement.report import PairResult

KEY_COLUMNS = ("stage", "step", "layer", "stage_layer")


def comparison_csv(comparison: StageComparison) -> str:
    """Return the figures as CSV with a header; None is an empty cell."""
    records = [_record(stage, entry) for stage in comparison for entry in stage]
    columns = dict.fromkeys(KEY_COLUMNS) | dict.fromkeys(column for record in records for column in record)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([record.get(column) for column in columns] for record in records)
    return text.getvalue()


def _record(stage: StageResult, entry: StageLayer) -> dict[str, Value]:
    record: dict[str, Value] = dict(
        zip(KEY_COLUMNS, (stage.name, stage.step, entry.layer, entry.stage_layer), strict=True)
    )
    record |= {"kept": entry.kept} | flatten(entry.of_reference.shares, "kept_order")
    record |= _share("lost", entry.of_reference) | _share("gained", entry.of_stage)
    return record | flatten(stage.output, "stage_output")


def _share(name: str, pair: PairResult) -> dict[str, Value]:
    """Return an unexplained share under a name, and the other figures of its pair under names that begin with it."""
    record: dict[str, Value] = {
        name: pair.unexplained,
        f"{name}_low": pair.interval[0],
        f"{name}_high": pair.interval[1],
    }
    for part in ("noise_floor", "functional", "residual_only", "target_output", "similarity"):
        record |= flatten(getattr(pair, part), f"{name}_{part}")
    return record
