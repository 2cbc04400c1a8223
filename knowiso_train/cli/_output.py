"""Files that the commands write, and the options that name them."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from knowiso_train.errors import DataError, MissingDependencyError, OptionError
from knowiso_train.utils.option_files import option_values

WRITERS = {"json": "to_json", "html": "to_html", "csv": "to_csv", "plot": "plot"}


def add_file_options(options: argparse._ActionsContainer, *, csv: bool = True) -> None:
    """Add the options that name files of a report.

    Args:
        options: Parser or group of options.
        csv: Add --csv.
    """
    options.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page that opens in a browser (default: not written)"
    )
    if csv:
        options.add_argument("--csv", type=Path, metavar="FILE", help="write the figures as CSV (default: not written)")
    options.add_argument(
        "--plot", type=Path, metavar="FILE", help="write a picture: .png, .pdf, .svg (default: not written)"
    )


def check_outputs(args: argparse.Namespace) -> None:
    """Check that the output files can be written, before a long run.

    Raises:
        OptionError: A folder, or a picture of another type.
        DataError: A folder that cannot be created.
        MissingDependencyError: --plot without matplotlib.
    """
    if args.plot is not None:
        if find_spec("matplotlib") is None:
            raise MissingDependencyError(
                '--plot needs matplotlib, which is not installed; pip install "knowiso_train[plots]"'
            )
        if args.plot.suffix.lower() not in (".png", ".pdf", ".svg"):
            raise OptionError(f"--plot writes .png, .pdf or .svg, got {args.plot.name!r}")
    for name in WRITERS:
        path = getattr(args, name, None)
        if path is None:
            continue
        if path.is_dir():
            raise OptionError(f"expected a file to write, got the folder {path}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"the folder of {path} cannot be created: {error}") from error


def write_report(report: Any, args: argparse.Namespace) -> None:
    """Write a report to the files that the options name, and print it.

    Raises:
        OptionError: A report of a kind that has no such file.
    """
    paths = {name: path for name in WRITERS if (path := getattr(args, name, None)) is not None}
    for name in paths:
        if not hasattr(report, WRITERS[name]):
            raise OptionError(f"--{name} is not available for a {type(report).__name__}; use --html or --plot")
    from knowiso_train.utils.serialization import is_special, write_json

    for name, path in paths.items():
        getattr(report, WRITERS[name])(path)
    # The options beside the first file, so that --config repeats the command
    files = [path for path in paths.values() if not is_special(path)]
    if files and hasattr(args, "dataset"):
        path = files[0]
        write_json(path.with_name(f"{path.stem}.config.json"), option_values(vars(args)))
    try:
        print(report, flush=True)
    except BrokenPipeError:
        # The reader, such as `head`, has ended; the interpreter cannot flush at its end either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
