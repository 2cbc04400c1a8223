"""Command-line arguments of the recipes."""

from __future__ import annotations

import argparse
import ast
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from knowiso_train.errors import CapacityError
from knowiso_train.utils.environment import library_versions
from knowiso_train.utils.memory import check_images_fit
from knowiso_train.utils.option_files import ConfigParser, option_values


class RecipeParser(ConfigParser):
    """Argument parser in which one call adds one option, or a group of options that recipes share.

    Args:
        description: Text shown unchanged in the help.

    Examples:
        >>> parser = RecipeParser("A recipe.")
        >>> parser.add("--epochs", 8, at_least(1), "passes over the images")
        >>> parser.add("--flip", False, help="mirror half of the images")
        >>> parser.parse_args(["--epochs", "3"])
        Namespace(epochs=3, flip=False)
    """

    def __init__(self, description: str | None) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter)

    def add(
        self, name: str, default: Any = None, kind: Callable[[str], Any] = str, help: str = "", **options: Any
    ) -> None:
        """Add an option with a default value; a default of False makes a switch.

        Args:
            name: Name with its dashes.
            default: Default, shown in the help unless it is None, False or empty.
            kind: Conversion of the text to the value.
            help: Meaning of the option, and the reason for its default.
            **options: Further arguments of `add_argument`.
        """
        if default is False:
            self.add_argument(name, action="store_true", help=help)
            return
        text = " ".join(map(str, default)) if isinstance(default, list) else default
        if text not in (None, ""):
            help = f"{help} (default: {text})"
        self.add_argument(name, type=kind, default=default, help=help, **options)

    def add_data(self, splits: Sequence[str], split_help: str, *, digits: str, image_size: int = 224) -> None:
        """Add the options of the dataset, as `labeled_images` reads it.

        Args:
            splits: Default names of the splits.
            split_help: Use of the splits.
            digits: Description of the default dataset.
            image_size: Default of --image-size.
        """
        self.add("--dataset", "digits", help=f"folder, hfds/NAME or torch/NAME; digits: {digits}")
        self.add("--data-dir", None, Path, "folder of torch/NAME datasets")
        self.add(
            "--data-options", [], parse_key_value, "KEY=VALUE for timm.data.create_dataset: download=True", nargs="*"
        )
        self.add("--splits", list(splits), str, split_help, nargs=len(splits))
        self.add("--image-size", image_size, image_side, "side of the images in pixels; the digits are 28 pixels")
        self.add("--classes", None, at_least(2), "number of classes, if the dataset does not provide it")
        self.add("--workers", 0, at_least(0), "processes that read images; 0 suits images in memory")

    def add_training(self, *, padding: int, batch_size: int = 64, weight_decay: float = 5e-4, save_every: int) -> None:
        """Add the options of a training: augmentation, batches, precision, log and checkpoints.

        Args:
            padding: Default of --padding.
            batch_size: Default of --batch-size.
            weight_decay: Default of --weight-decay.
            save_every: Default of --save-every.
        """
        self.add("--padding", padding, at_least(0), "padding of the random crop; 2 pixels suit side 28, 4 suit 32")
        self.add("--flip", False, help="mirror half of the images; not for digits")
        self.add("--batch-size", batch_size, at_least(2), "images of all processes together")
        self.add("--weight-decay", weight_decay, at_least(0, float), "weight decay of all parameters")
        self.add("--seed", 0, at_least(0), "seed of initial weights, order, augmentation and dropout")
        choices = ("no", "bf16", "fp16")
        self.add("--mixed-precision", None, help="precision; default: that of accelerate launch", choices=choices)
        self.add("--log-every", 10, at_least(1), "batches between log entries")
        self.add("--save-every", save_every, at_least(1), "batches between checkpoints, which a kill can cost at most")


def at_least(
    minimum: float, kind: Callable[[str], Any] = int, word: Literal["auto"] | None = None
) -> Callable[[str], Any]:
    """Return the type of an option that is a finite number with a lower bound.

    Args:
        minimum: Lower bound.
        kind: int or float.
        word: Text that is also allowed. None: numbers only.

    Examples:
        >>> at_least(0, float, "auto")("0.5"), at_least(0, float, "auto")("auto")
        (0.5, 'auto')
    """

    def number(text: str) -> Any:
        if text == word:
            return text
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not minimum <= value < math.inf:
            expected = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(
                f"expected {expected} of at least {minimum}{f' or {word}' if word else ''}, got {text!r}"
            )
        return value

    return number


def image_side(text: str) -> int:
    """Parse the side of square images in pixels, of which at least one fits into the free memory.

    Examples:
        >>> image_side("224")
        224
    """
    side: int = at_least(1)(text)
    try:
        check_images_fit(side, 1)
    except CapacityError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return side


def parse_key_value(text: str) -> tuple[str, Any]:
    """Parse KEY=VALUE, with a Python literal or plain text as the value.

    Examples:
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


def run_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of a run without its folder, as a file that `--config` reads.

    Examples:
        >>> run_settings(argparse.Namespace(output=Path("output"), epochs=3, teacher_size=None))
        {'epochs': 3}
    """
    return option_values({name: value for name, value in vars(args).items() if name != "output"})


def describe_run(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments and the versions of the packages, for the summary of a run."""
    return {"settings": vars(args), "versions": library_versions()}


def loader_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `training_loader` among the arguments."""
    names = ("batch_size", "seed", "padding", "flip", "workers")
    return {name: getattr(args, name) for name in names} | {"pin_memory": torch.cuda.is_available()}


def training_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `ResumableTraining` among the arguments."""
    return {name: getattr(args, name) for name in ("seed", "log_every", "save_every")}
