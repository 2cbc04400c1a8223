"""Command-line arguments of the recipes."""

from __future__ import annotations

import argparse
import ast
import math
from collections.abc import Callable
from typing import Any


class Options(argparse.ArgumentParser):
    """A parser on which one line adds one option.

    Args:
        description: shown as it is.

    Example:
        >>> options = Options("A recipe.")
        >>> options.add("--epochs", 8, at_least(1), "passes over the images")
        >>> options.add("--flip", False, help="mirror half of the images")
        >>> options.parse_args(["--epochs", "3"])
        Namespace(epochs=3, flip=False)
    """

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def add(
        self, name: str, default: Any = None, kind: Callable[[str], Any] = str, help: str = "", **more: Any
    ) -> None:
        """An option with its default; a default of False makes it a switch.

        Args:
            name: with its dashes.
            default: also shown in the help, unless it is none, off or empty.
            kind: from the word to the value.
            help: what it is, and why its default is what it is.
            **more: as for `add_argument`.
        """
        if default is False:
            self.add_argument(name, action="store_true", help=help)
            return
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        self.add_argument(
            name, type=kind, default=default, help=help if shown in (None, "") else f"{help} (default: {shown})", **more
        )


def at_least(least: float, kind: Callable[[str], Any] = int, word: str | None = None) -> Callable[[str], Any]:
    """Type of an option that is a finite number with a lower bound.

    Args:
        least: the bound.
        kind: int or float.
        word: also allowed, and kept as it is.

    Example:
        >>> at_least(0, float, "balanced")("0.5"), at_least(0, float, "balanced")("balanced")
        (0.5, 'balanced')
    """

    def number(text: str) -> Any:
        if text == word:
            return text
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf:
            wanted = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(
                f"expected {wanted} of at least {least}{f' or {word}' if word else ''}, got {text!r}"
            )
        return value

    return number


def parse_key_value(text: str) -> tuple[str, Any]:
    """Type of an option KEY=VALUE; the value is a Python literal, or else a word.

    Example:
        >>> parse_key_value("channels=(16, 32)"), parse_key_value("stem_type=deep")
        (('channels', (16, 32)), ('stem_type', 'deep'))
    """
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
