"""Parser of all commands, and their start."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from knowiso_train import __version__
from knowiso_train.cli import _compare, _diagnose, _layers, _measure, _report
from knowiso_train.errors import KnowisoError, MissingDependencyError
from knowiso_train.utils.option_files import ConfigParser

# Modules with `add_options(parser)` and `run(args)`, and their summaries
COMMANDS = {
    "measure": (_measure, "measure two timm networks on any images that timm reads"),
    "diagnose": (_diagnose, "find what strong networks represent and a weak one cannot reproduce"),
    "compare": (_compare, "compare descendants of a network, or checkpoints of a training, with a reference"),
    "layers": (_layers, "list the layers of a network, with the shapes they emit"),
    "report": (_report, "show a saved report again"),
}
# Recipes, which parse their own options
RECIPES = {
    "distill": "distill a teacher into a student, with a table of all methods",
    "prune": "prune a network, and fine-tune it",
    "refine": "refine a pretrained network by a second one, with few labels",
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
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in RECIPES:
        run: Callable[[], Any] = partial(run_recipe, words)
    else:
        args = parser().parse_args(words)
        run = partial(args.run, args)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # for terminals without the character →
    try:
        run()
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
    commands = root.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=ConfigParser)
    for name, (command, summary) in COMMANDS.items():
        options = commands.add_parser(name, help=summary, description=command.run.__doc__)
        command.add_options(options)
        options.set_defaults(run=command.run)
    for name, summary in RECIPES.items():
        commands.add_parser(name, help=summary, add_help=False)
    return root


def run_recipe(words: Sequence[str]) -> None:
    """Run a recipe in this process.

    Args:
        words: Name of the recipe and its options.
    """
    name = words[0]
    package = Path(__file__).resolve().parents[1]
    # Inside an installed package, beside it in a clone of the repository
    paths = [folder / "recipes" / f"{name}.py" for folder in (package, package.parent)]
    path = next((path for path in paths if path.is_file()), None)
    spec = None if path is None else spec_from_file_location(f"knowiso_recipe_{name}", path)
    if spec is None or spec.loader is None:
        raise MissingDependencyError(f"expected the recipe at {paths[0]}; install knowiso_train again")
    recipe = module_from_spec(spec)
    sys.modules[spec.name] = recipe
    sys.argv = [f"knowiso {name}", *words[1:]]  # the name in the usage of the recipe's parser
    spec.loader.exec_module(recipe)
    recipe.main(list(words[1:]))
