"""Command `knowiso layers`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from knowiso_train.errors import OptionError
from knowiso_train.utils.text_table import format_table

if TYPE_CHECKING:
    from knowiso_train.features.summary import LayerSummary

SUMMARY_IMAGES = 2  # so that the batch axis differs from axes of size 1


def add_options(options: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    options.add_argument("model", metavar="MODEL", help="name in timm, or hf:OWNER/NAME of transformers")
    options.add_argument(
        "--depth", type=int, default=2, metavar="N", help="dotted segments to show (default: %(default)s)"
    )
    options.add_argument(
        "--match",
        nargs="+",
        metavar="GLOB",
        help="show these instead, at any depth: * within a segment, ** across (default: all)",
    )
    options.add_argument("--image-size", type=int, metavar="PX", help="side of the input (default: the network's own)")


def run(args: argparse.Namespace) -> None:
    """List the layers of a timm network with their output shapes: names for --layers."""
    import torch

    from knowiso_train.features import named_stages, resolve_layers
    from knowiso_train.features.summary import layer_summary
    from knowiso_train.loading.timm import input_config, load_model
    from knowiso_train.utils.memory import check_images_fit

    model = load_model(args.model, pretrained=False)
    config = input_config(model)
    channels, height, width = (3, 224, 224) if config is None else config.size
    size = (height, width) if args.image_size is None else (args.image_size, args.image_size)
    check_images_fit(max(size), SUMMARY_IMAGES, channels)
    matches = set(resolve_layers(model, args.match)) if args.match else None
    try:
        lines = layer_summary(model, torch.zeros(SUMMARY_IMAGES, channels, *size))
    except (RuntimeError, ValueError, AssertionError) as error:  # timm asserts its input size
        raise OptionError(f"{args.model} cannot run on images of {size[0]} × {size[1]}: {error}") from error
    rows = [line for line in lines if (line.name in matches if matches is not None else line.depth <= args.depth)]
    print(f"{args.model}, input {channels} × {size[0]} × {size[1]}\n")
    print(_layer_table(rows, ends := named_stages(model)))
    notes = ["★ end of a stage"] if any(line.name in ends for line in rows) else []
    if hidden := len(lines) - len(rows):
        notes.append(
            f"{hidden} more: --depth {args.depth + 1}, or --match '**.conv1'"
            if matches is None
            else f"{hidden} others do not match"
        )
    print("\n" + " · ".join([*notes, "names and globs go to `knowiso measure --layers`"]))


def _layer_table(lines: Sequence[LayerSummary], ends: set[str]) -> str:
    rows = [("layer", "type", "channels", "grid", "")]
    for line in lines:
        grid = "–" if line.grid is None else f"{line.grid[0]} × {line.grid[1]}"
        mark = " ★" if line.name in ends else ""
        rows.append(
            (f"{line.name}{mark}", line.kind, "–" if line.channels is None else str(line.channels), grid, line.note)
        )
    return format_table(rows, left=(0, 1, -1), rule=True, indent="  ")
