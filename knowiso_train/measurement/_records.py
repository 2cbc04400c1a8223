"""Flat records of a report: one row per layer pair, for CSV files and data frames."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from knowiso_train.errors import MissingDependencyError

if TYPE_CHECKING:
    import pandas

    from knowiso_train.measurement.report import PairResult, Report

Value = str | int | float | None


def pair_records(report: Report) -> list[dict[str, Value]]:
    """Return the figures of each layer pair by column name; every record has the same columns in the same order."""
    records = [_record(report, pair) for pair in report.pairs]
    # Pairs of fewer orders have no value in the columns of the others, whose order is taken
    longest_first = sorted(records, key=len, reverse=True)
    columns = dict.fromkeys(column for record in longest_first for column in record)
    return [{column: record.get(column) for column in columns} for record in records]


def records_csv(report: Report) -> str:
    """Return the records as CSV with a header; None is an empty cell."""
    records = pair_records(report)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(list(records[0]) if records else ["direction", "source", "target"])
    writer.writerows(list(record.values()) for record in records)
    return text.getvalue()


def records_frame(report: Report) -> pandas.DataFrame:
    """Return the records as a data frame; see `Report.to_dataframe`."""
    try:
        import pandas
    except ImportError as error:
        raise MissingDependencyError(
            "Report.to_dataframe needs pandas, which is not installed; pip install pandas, or use Report.to_csv"
        ) from error
    return pandas.DataFrame(pair_records(report))


def _record(report: Report, pair: PairResult) -> dict[str, Value]:
    explaining, explained = report.roles(pair.direction)
    record: dict[str, Value] = {
        "direction": pair.direction,
        "explaining_network": explaining,
        "explained_network": explained,
        "source": pair.source,
        "target": pair.target,
    }
    for k, (share, bounds) in enumerate(zip(pair.shares, pair.share_intervals, strict=True)):
        record |= {f"order_{k}": share, f"order_{k}_low": bounds[0], f"order_{k}_high": bounds[1]}
    record |= {
        "explained": pair.explained,
        "unexplained": pair.unexplained,
        "unexplained_low": pair.interval[0],
        "unexplained_high": pair.interval[1],
        "noise_floor": pair.noise_floor,
    }
    for name in ("functional", "residual_only", "target_output", "similarity"):
        record |= flatten(getattr(pair, name, None), name)
    record |= flatten(pair.ridge, "ridge")
    return record | {
        "source_channels": pair.source_channels,
        "target_channels": pair.target_channels,
        "source_height": pair.source_grid[0],
        "source_width": pair.source_grid[1],
        "target_height": pair.target_grid[0],
        "target_width": pair.target_grid[1],
        "rows": pair.rows,
        "warnings": "; ".join(pair.warnings),
    }


def flatten(value: Any, name: str) -> dict[str, Value]:
    """Return the numbers of nested dataclasses, mappings and sequences by name, joined with underscores."""
    if value is None or isinstance(value, str | int | float):
        return {} if value is None else {name: value}
    items: list[tuple[object, Any]]
    if is_dataclass(value):
        items = [(field.name, getattr(value, field.name)) for field in fields(value) if field.compare]
    else:
        items = list(value.items() if isinstance(value, Mapping) else enumerate(value))
    return {key: leaf for part, item in items for key, leaf in flatten(item, f"{name}_{part}").items()}
