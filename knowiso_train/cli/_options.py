"""Options that commands share, and what they select: networks, images, device and warnings."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowiso_train.cli._output import add_file_options
from knowiso_train.errors import OptionError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.data import DataLoader

    from knowiso_train.experiment.processes import Processes


def layer_pairs(layers: Sequence[str]) -> list[str] | list[tuple[str, str]]:
    """Return names and globs unchanged, or tuples if there are `source=target` pairs.

    A plain name beside pairs stands for the layer of this name in both networks.

    Raises:
        OptionError: A pair with an empty side, or names with commas.

    Examples:
        >>> layer_pairs(["layer3=blocks.5", "head"])
        [('layer3', 'blocks.5'), ('head', 'head')]
    """
    if joined := next((item for item in layers if "," in item), None):
        raise OptionError(f"expected layers separated by spaces, got {joined!r}: --layers {joined.replace(',', ' ')}")
    if not any("=" in item for item in layers):
        return list(layers)
    pairs = []
    for item in layers:
        source, equals, target = item.partition("=")
        if equals and not (source and target):
            raise OptionError(f"expected source=target in --layers, got {item!r}")
        pairs.append((source, target if equals else source))
    return pairs


def load_network(
    args: argparse.Namespace, processes: Processes, model: str, checkpoint: str | None, classes: int | None
) -> nn.Module:
    """Load one network of a command line onto the device of this process."""
    from knowiso_train.loading.timm import load_model

    return load_model(
        model,
        checkpoint=checkpoint,
        pretrained=args.pretrained,
        num_classes=classes,
        in_order=args.checkpoints_in_order,
    ).to(processes.device)


def load_images(args: argparse.Namespace, processes: Processes) -> DataLoader[Any]:
    """Create the loader of --dataset."""
    from knowiso_train.experiment.processes import main_process_first
    from knowiso_train.loading.datasets import image_loader

    with main_process_first():
        return image_loader(
            args.dataset,
            split=args.split,
            image_size=args.image_size,
            batch_size=args.batch_size,
            workers=args.workers,
            root=args.data_dir,
            download=args.download,
            pin_memory=processes.device.type == "cuda",
        )


def autocast_dtype(args: argparse.Namespace) -> torch.dtype | None:
    """Return the dtype of --autocast."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.autocast)


def unique_names(models: Sequence[str], checkpoints: Sequence[str | None], roles: Sequence[str]) -> list[str]:
    """Return a different name for each network: its architecture, with checkpoint and role where names are equal.

    Examples:
        >>> unique_names(["resnet18", "resnet50"], [None, None], ["source", "target"])
        ['resnet18', 'resnet50']
        >>> unique_names(["resnet18", "resnet18"], ["a.pth", None], ["source", "target"])
        ['resnet18 (a)', 'resnet18']
        >>> unique_names(["resnet18", "resnet18"], [None, None], ["source", "target"])
        ['resnet18 (source)', 'resnet18 (target)']
    """
    names = list(models)
    for details in ([Path(file).stem if file else "" for file in checkpoints], roles):
        counts = Counter(names)
        names = [
            f"{name} ({detail})" if counts[name] > 1 and detail else name
            for name, detail in zip(names, details, strict=True)
        ]
    return names


@contextmanager
def printed_warnings(processes: Processes) -> Iterator[None]:
    """Print warnings on one line each, in the main process alone; those of the others are equal."""

    def print_warning(message: Warning | str, *where: Any, **more: Any) -> None:
        if processes.is_main:
            print(f"knowiso: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = print_warning
        yield


def add_network_options(networks: argparse._ActionsContainer) -> None:
    """Add the options of all networks."""
    networks.add_argument(
        "--checkpoints-in-order",
        action="store_true",
        help="map tensors in order where only the names differ (default: off)",
    )
    networks.add_argument(
        "--no-pretrained",
        dest="pretrained",
        action="store_false",
        help="random weights (default: timm's published weights)",
    )


def add_image_options(options: argparse.ArgumentParser) -> None:
    """Add the options of the images."""
    images = options.add_argument_group("images")
    images.add_argument(
        "--dataset",
        required=True,
        metavar="SPEC",
        help="a folder of images, hfds/NAME, hfds/FOLDER or torch/NAME, as timm reads them",
    )
    images.add_argument(
        "--split", help="split (default: a folder whole; else the first of validation, val, valid, test, train)"
    )
    images.add_argument(
        "--data-dir", metavar="DIR", help="where torch/ datasets are kept, cache of hfds/ (default: the hub's own)"
    )
    images.add_argument(
        "--download", action="store_true", help="download torch/ datasets that are missing (default: off)"
    )
    images.add_argument(
        "--image-size",
        type=int,
        default=224,
        metavar="PX",
        help="short side is resized, center cropped (default: %(default)s)",
    )
    images.add_argument(
        "--input-size",
        default="model",
        choices=("model", "image"),
        help="input size: that of each network, or --image-size (default: %(default)s)",
    )
    images.add_argument(
        "--max-images", type=int, metavar="N", help="read no more than this many, over all processes (default: all)"
    )
    images.add_argument("--batch-size", type=int, default=64, metavar="N", help="images a batch (default: %(default)s)")
    images.add_argument(
        "--workers", type=int, default=2, metavar="N", help="processes that decode images (default: %(default)s)"
    )


def add_method_options(method: argparse._ActionsContainer, *, order: int) -> None:
    """Add the options of the method that all measuring commands share.

    Args:
        method: Group of options.
        order: Default of --order.
    """
    method.add_argument(
        "--order",
        type=int,
        default=order,
        metavar="K",
        help="highest number of non-linear steps (default: %(default)s)",
    )
    method.add_argument(
        "--seed", type=int, default=0, help="seed of split, samples and random weights (default: %(default)s)"
    )


def add_measurement_options(method: argparse._ActionsContainer) -> None:
    """Add the options of the method that `measure` and `diagnose` share."""
    method.add_argument(
        "--no-noise-floor",
        dest="noise_floor",
        action="store_false",
        help="skip the fit to permuted targets (default: fitted)",
    )
    method.add_argument(
        "--at",
        default="output",
        choices=("output", "input"),
        help="side of the layers, such as the input of an activation (default: %(default)s)",
    )


def add_output_options(method: argparse._ActionsContainer) -> None:
    """Add the options that `diagnose` and `compare` share: neighborhood of the maps, and comparison of outputs."""
    method.add_argument("--kernel-size", type=int, metavar="N", help="neighborhood of the maps, 1 or 3 (default: 1)")
    method.add_argument(
        "--no-functional",
        dest="functional",
        action="store_false",
        help="do not compare outputs with parts of a feature in its place (default: compared)",
    )
    method.add_argument(
        "--labels",
        action="store_true",
        help="top-1 of the outputs, for labels that are the networks' classes (default: no top-1)",
    )


def add_running_options(options: argparse.ArgumentParser, *, csv: bool = True) -> None:
    """Add the options of device, precision, files and progress bars.

    Args:
        options: Parser of the command.
        csv: Add --csv.
    """
    running = options.add_argument_group("running")
    running.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: selected by accelerate)")
    running.add_argument(
        "--autocast", choices=("bf16", "fp16"), help="autocast of the networks, not of the statistics (default: off)"
    )
    running.add_argument("--json", type=Path, metavar="FILE", help="write the report (default: not written)")
    add_file_options(running, csv=csv)
    running.add_argument(
        "--no-progress", dest="progress", action="store_false", help="no progress bars (default: shown)"
    )
