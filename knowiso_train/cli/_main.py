"""Parser of all commands, and their start."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from knowiso_train import __version__
from knowiso_train.cli import _compare, _diagnose, _layers, _measure, _report
from knowiso_train.errors import KnowisoError

# Modules with `add_options(parser)` and `run(args)`, and their summaries
COMMANDS = {
    "measure": (_measure, "measure two timm networks on any images that timm reads"),
    "diagnose": (_diagnose, "find what strong networks represent and a weak one cannot reproduce"),
    "compare": (_compare, "compare descendants of a network, or checkpoints of a training, with a reference"),
    "layers": (_layers, "list the layers of a network, with the shapes they emit"),
    "report": (_report, "show a saved report again"),
}
EXIT_ERROR, EXIT_INTERRUPTED = 2, 130  # 2 as in argparse; 130 = 128 + SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; KNOWISO_DEBUG=1 shows the traceback of errors.

    Args:
        arguments: Words of the command line. None: those of this process.

    Examples:
        >>> main(["report", "missing.json"])
        2
    """
    args = parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # for terminals without the character →
    try:
        args.run(args)
    except KnowisoError as error:
        if os.environ.get("KNOWISO_DEBUG", "0") not in ("", "0"):
            raise
        rank = os.environ.get("RANK", "0")
        lines = "\n".join([str(error), *getattr(error, "__notes__", ())])
        print(f"knowiso: {'' if rank == '0' else f'process {rank}: '}{lines}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("knowiso: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands and options.

    Examples:
        >>> parser().parse_args(["layers", "resnet18"]).depth
        2
    """
    root = argparse.ArgumentParser(
        prog="knowiso", description="Measure the features that vision networks share, layer by layer."
    )
    root.add_argument("--version", action="version", version=f"knowiso_train {__version__}")
    commands = root.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (command, summary) in COMMANDS.items():
        options = commands.add_parser(name, help=summary, description=command.run.__doc__)
        command.add_options(options)
        options.set_defaults(run=command.run)
    return root
