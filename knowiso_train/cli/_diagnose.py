"""Command `knowiso diagnose`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from knowiso_train.cli._options import (
    add_image_options,
    add_measurement_options,
    add_method_options,
    add_network_options,
    add_output_options,
    add_running_options,
    autocast_dtype,
    layer_pairs,
    load_images,
    load_network,
    printed_warnings,
    unique_names,
)
from knowiso_train.cli._output import check_outputs, write_report
from knowiso_train.errors import OptionError

PUBLISHED_WEIGHTS = "-"


def add_options(options: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    _add_networks(options)
    add_image_options(options)
    _add_method(options.add_argument_group("method"))
    _add_sizes(options.add_argument_group("size of the result"))
    add_running_options(options, csv=False)


def run(args: argparse.Namespace) -> None:
    """Find blind spots and unreliable features of a weak network beside strong ones, and what they do to the output."""
    check_outputs(args)
    checkpoints = _each("--strong-checkpoint", args.strong_checkpoint, args.strong)
    classes = _each("--strong-classes", args.strong_classes, args.strong)
    import torch

    import knowiso_train as ki
    from knowiso_train.experiment.processes import Processes
    from knowiso_train.loading.datasets import class_names
    from knowiso_train.loading.timm import input_transform

    with Processes(args.device) as processes:
        # Random weights (--no-pretrained) are the same in every process and every run
        torch.manual_seed(args.seed)
        models = [args.weak, *args.strong]
        files = [args.weak_checkpoint, *(None if file == PUBLISHED_WEIGHTS else file for file in checkpoints)]
        networks = [
            load_network(args, processes, model, file, count)
            for model, file, count in zip(models, files, [args.weak_classes, *classes], strict=True)
        ]
        transforms = [input_transform(network, size=args.input_size) for network in networks]
        roles = ["weak", *(f"strong {i}" if len(args.strong) > 1 else "strong" for i in range(1, len(models)))]
        loader = load_images(args, processes)
        with printed_warnings(processes):
            diagnosis = ki.diagnose(
                networks[0],
                networks[1:],
                loader,
                layer_pairs(args.layers),
                order=args.order,
                kernel_size=args.kernel_size,
                num_directions=args.num_directions,
                num_shared=args.num_shared,
                num_images=args.num_images,
                num_thumbnails=args.num_thumbnails,
                functional=args.functional,
                labels="auto" if args.labels else None,
                groups="auto",
                class_names=class_names(loader.dataset),
                to_image=_images_of,
                seed=args.seed,
                max_images=args.max_images,
                noise_floor=args.noise_floor,
                at=args.at,
                weak_transform=transforms[0],
                strong_transform=transforms[1:],
                autocast=autocast_dtype(args),
                names=unique_names(models, files, roles),
                progress=args.progress and processes.is_main,
            )
        if processes.is_main:
            write_report(diagnosis, args)


def _images_of(images: Any) -> Any:
    """Return the images of the loader, which are in [0, 1] already."""
    return images


def _each(option: str, values: Sequence[Any] | None, strong: Sequence[str]) -> list[Any]:
    """Return one value for each strong network.

    Raises:
        OptionError: Another number of values.
    """
    if values is None:
        return [None] * len(strong)
    if len(values) != len(strong):
        raise OptionError(
            f"expected one value of {option} for each of {len(strong)} strong networks, got {len(values)}"
        )
    return list(values)


def _add_networks(options: argparse.ArgumentParser) -> None:
    networks = options.add_argument_group("networks")
    networks.add_argument("--weak", required=True, metavar="MODEL", help="timm network to diagnose")
    networks.add_argument(
        "--strong", required=True, nargs="+", metavar="MODEL", help="timm networks to compare with, one or several"
    )
    networks.add_argument(
        "--layers",
        required=True,
        nargs="+",
        metavar="LAYER",
        help="names or globs, or weak=strong pairs; `knowiso layers MODEL` lists them",
    )
    weights = ".safetensors, .pth, .pt, .th"
    networks.add_argument(
        "--weak-checkpoint", metavar="FILE", help=f"weights of the weak network: {weights} (default: timm's)"
    )
    networks.add_argument(
        "--strong-checkpoint",
        nargs="+",
        metavar="FILE",
        help=f"weights of each strong network: {weights}, or {PUBLISHED_WEIGHTS} for timm's (default: timm's)",
    )
    networks.add_argument(
        "--weak-classes", type=int, metavar="N", help="width of the weak classifier (default: the network's own)"
    )
    networks.add_argument(
        "--strong-classes",
        nargs="+",
        type=int,
        metavar="N",
        help="width of the classifier of each strong network (default: the network's own)",
    )
    add_network_options(networks)


def _add_method(method: argparse._ActionsContainer) -> None:
    add_method_options(method, order=0)
    add_measurement_options(method)
    add_output_options(method)


def _add_sizes(sizes: argparse._ActionsContainer) -> None:
    for name, default, meaning in (
        ("directions", 6, "directions of each residual, each with its effect on the output"),
        ("shared", 3, "directions of each explained part"),
        ("images", 8, "images of each ranking"),
        ("thumbnails", 256, "pictures in the result at most"),
    ):
        sizes.add_argument(
            f"--num-{name}", type=int, default=default, metavar="N", help=f"{meaning} (default: %(default)s)"
        )
