"""Command `knowiso report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from knowiso_train.cli._output import add_file_options, check_outputs, write_report


def add_options(options: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    options.add_argument("report", metavar="FILE", help="JSON of a measurement, a diagnosis, or another report")
    add_file_options(options)


def run(args: argparse.Namespace) -> None:
    """Show a report that --json or `to_json` wrote, such as a measurement or a diagnosis."""
    check_outputs(args)
    from knowiso_train.diagnosis import Diagnosis, StabilityReport
    from knowiso_train.diagnosis.comparison import StageComparison
    from knowiso_train.errors import FormatError
    from knowiso_train.measurement import Report
    from knowiso_train.utils.serialization import read_json

    path = Path(args.report)
    classes: dict[str, type[Any]] = {
        kind.saved_format: kind for kind in (Report, Diagnosis, StabilityReport, StageComparison)
    }
    values = read_json(path)
    saved_format = values.get("format") if isinstance(values, dict) else None
    kind = classes.get(str(saved_format))
    if kind is None:
        raise FormatError(
            f"expected the JSON of one of {', '.join(kind.__name__ for kind in classes.values())} in {path}, "
            f"got the format {saved_format!r}"
        )
    write_report(kind.from_json(path), args)
