"""Command `knowiso measure`."""

from __future__ import annotations

import argparse

from knowiso_train.cli._options import (
    add_image_options,
    add_measurement_options,
    add_method_options,
    add_network_options,
    add_running_options,
    autocast_dtype,
    layer_pairs,
    load_images,
    load_network,
    printed_warnings,
    unique_names,
)
from knowiso_train.cli._output import check_outputs, write_report

SIMILARITIES = ("cka", "procrustes", "r2", "pooled_cka", "pooled_procrustes", "pooled_r2")


def add_options(options: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    _add_networks(options)
    add_image_options(options)
    _add_method(options.add_argument_group("method"))
    add_running_options(options)


def run(args: argparse.Namespace) -> None:
    """Measure the shares of one network's features that another network explains, on held-out images."""
    check_outputs(args)
    import torch

    import knowiso_train as ki
    from knowiso_train.experiment.processes import Processes
    from knowiso_train.loading.timm import input_transform

    with Processes(args.device) as processes:
        # Random weights (--no-pretrained) are the same in every process and every run
        torch.manual_seed(args.seed)
        source = load_network(args, processes, args.source, args.source_checkpoint, args.source_classes)
        target = load_network(args, processes, args.target, args.target_checkpoint, args.target_classes)
        names = unique_names(
            [args.source, args.target], [args.source_checkpoint, args.target_checkpoint], ["source", "target"]
        )
        with printed_warnings(processes):
            report = ki.measure(
                source,
                target,
                load_images(args, processes),
                layer_pairs(args.layers),
                order=args.order,
                kernel_size=args.kernel_size,
                solver=args.solver,
                directions=args.directions,
                seed=args.seed,
                max_images=args.max_images,
                noise_floor=args.noise_floor,
                at=args.at,
                similarity=args.similarity or args.similarity is not None,
                functional=args.functional,
                labels="auto" if args.labels else None,
                source_transform=input_transform(source, size=args.input_size),
                target_transform=input_transform(target, size=args.input_size),
                autocast=autocast_dtype(args),
                names=(names[0], names[1]),
                progress=args.progress and processes.is_main,
            )
        if processes.is_main:
            write_report(report, args)


def _add_networks(options: argparse.ArgumentParser) -> None:
    networks = options.add_argument_group("networks")
    networks.add_argument(
        "--source",
        required=True,
        metavar="MODEL",
        help="explaining network: a name in timm, or hf:OWNER/NAME of transformers",
    )
    networks.add_argument("--target", required=True, metavar="MODEL", help="explained network, likewise")
    networks.add_argument(
        "--layers",
        required=True,
        nargs="+",
        metavar="LAYER",
        help="names or globs, or source=target pairs; `knowiso layers MODEL` lists them",
    )
    for role in ("source", "target"):
        networks.add_argument(
            f"--{role}-checkpoint",
            metavar="FILE",
            help=f"weights of the {role}: .safetensors, .pth, .pt, .th (default: timm's)",
        )
        networks.add_argument(
            f"--{role}-classes",
            type=int,
            metavar="N",
            help=f"width of the {role}'s classifier (default: the network's own)",
        )
    add_network_options(networks)


def _add_method(method: argparse._ActionsContainer) -> None:
    add_method_options(method, order=2)
    add_measurement_options(method)
    method.add_argument(
        "--kernel-size",
        type=int,
        metavar="N",
        help="neighborhood of the maps, 1 or 3 (default: 1; 3 for the paper's solver)",
    )
    method.add_argument(
        "--solver",
        default="closed_form",
        choices=("closed_form", "paper"),
        help="how maps are fitted (default: %(default)s)",
    )
    method.add_argument(
        "--directions",
        default="forward",
        choices=("forward", "backward", "both"),
        help="forward explains the target (default: %(default)s)",
    )
    method.add_argument(
        "--functional",
        action="store_true",
        help="run the explained network on parts of its features, and compare the outputs (default: not run)",
    )
    method.add_argument(
        "--labels",
        action="store_true",
        help="with --functional: top-1, for labels that are the networks' classes (default: no top-1)",
    )
    method.add_argument(
        "--similarity",
        nargs="*",
        choices=SIMILARITIES,
        metavar="NAME",
        help=f"columns of other measures: {', '.join(SIMILARITIES)} (default: none; without a NAME: the first three)",
    )
