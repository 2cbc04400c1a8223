"""Command line `knowiso`: measure two networks, compare stages, list the layers of a network, show a saved report.

knowiso layers resnet18
knowiso measure --source resnet18 --target resnet50 --layers layer3 layer4 --dataset hfds/cifar100 --directions both
--plot report.png
knowiso compare --model resnet18 --checkpoints output/run --layers "layer*" --dataset hfds/cifar100 --html compare.html
accelerate launch -m knowiso_train.cli measure ...
knowiso report report.json --html report.html --csv report.csv --plot report.png
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowiso_train import __version__
from knowiso_train.errors import DataError, FormatError, KnowisoError, MissingDependencyError, OptionError
from knowiso_train.experiment import compare_command
from knowiso_train.utils.text_table import format_table

if TYPE_CHECKING:
    from knowiso_train.diagnosis.comparison import StageComparison
    from knowiso_train.features.summary import LayerSummary
    from knowiso_train.measurement import Report

SIMILARITIES = ("cka", "procrustes", "r2", "pooled_cka", "pooled_procrustes", "pooled_r2")
SUMMARY_IMAGES = 2  # so that the batch axis differs from axes of size 1
EXIT_ERROR, EXIT_INTERRUPTED = 2, 130  # 2 as in argparse; 130 = 128 + SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; KNOWISO_DEBUG=1 shows the traceback of errors."""
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
        print(f"knowiso: {'' if rank == '0' else f'process {rank}: '}{error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("knowiso: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands and options."""
    root = argparse.ArgumentParser(
        prog="knowiso", description="Measure the features that two vision networks share, layer by layer."
    )
    root.add_argument("--version", action="version", version=f"knowiso_train {__version__}")
    commands = root.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _measure_options(
        commands.add_parser(
            "measure", help="measure two timm networks on any images that timm reads", description=measure.__doc__
        )
    )
    _compare_options(
        commands.add_parser(
            "compare",
            help="compare descendants of a network, or checkpoints of a training, with a reference",
            description=compare.__doc__,
        )
    )
    _layers_options(
        commands.add_parser(
            "layers", help="list the layers of a network, with the shapes they emit", description=layers.__doc__
        )
    )
    _report_options(commands.add_parser("report", help="show a saved report again", description=show.__doc__))
    return root


def measure(args: argparse.Namespace) -> None:
    """Measure the shares of one network's features that another network explains, on held-out images."""
    _check_outputs(args)
    import torch

    import knowiso_train as ki
    from knowiso_train.experiment.processes import Processes
    from knowiso_train.loading.datasets import image_loader
    from knowiso_train.loading.timm import input_transform, load_model

    processes = Processes(args.device)
    try:
        # Random weights (--no-pretrained) are the same in every process and every run
        torch.manual_seed(args.seed)
        source, target = (
            load_model(
                spec,
                checkpoint=file,
                pretrained=args.pretrained,
                num_classes=classes,
                in_order=args.checkpoints_in_order,
            ).to(processes.device)
            for spec, file, classes in (
                (args.source, args.source_checkpoint, args.source_classes),
                (args.target, args.target_checkpoint, args.target_classes),
            )
        )
        loader = image_loader(
            args.dataset,
            split=args.split,
            image_size=args.image_size,
            batch_size=args.batch_size,
            workers=args.workers,
            root=args.data_dir,
            download=args.download,
            pin_memory=processes.device.type == "cuda",
        )
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning if processes.is_main else _ignore_warning
            report = ki.measure(
                source,
                target,
                loader,
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
                autocast={"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.autocast),
                names=_names(args),
                progress=args.progress and processes.is_main,
            )
        if processes.is_main:
            _write_report(report, args)
    finally:
        processes.close()


def compare(args: argparse.Namespace) -> None:
    """Compare stages with a reference: what of its features each of them keeps, loses and gains, layer by layer."""
    _check_outputs(args)
    with warnings.catch_warnings():
        warnings.showwarning = _print_warning if os.environ.get("RANK", "0") == "0" else _ignore_warning
        comparison = compare_command.compare(args, layer_pairs(args.layers))
    if comparison is not None:
        _write_report(comparison, args)


def layers(args: argparse.Namespace) -> None:
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


def show(args: argparse.Namespace) -> None:
    """Show a saved report of `knowiso measure --json`, `knowiso compare --json` or the method to_json."""
    _check_outputs(args)
    from knowiso_train.diagnosis.comparison import StageComparison
    from knowiso_train.measurement import Report

    path, report = Path(args.report), None
    with suppress(FormatError):
        report = StageComparison.from_json(path)
    _write_report(report or Report.from_json(path), args)


def layer_pairs(layers: Sequence[str]) -> list[str] | list[tuple[str, str]]:
    """Return names and globs unchanged, or tuples if there are `source=target` pairs.

    A plain name beside pairs stands for the layer of this name in both networks.

    Raises:
        OptionError: A pair with an empty side.

    Example:
        >>> layer_pairs(["layer3=blocks.5", "head"])
        [('layer3', 'blocks.5'), ('head', 'head')]
    """
    if not any("=" in item for item in layers):
        return list(layers)
    pairs = []
    for item in layers:
        source, equals, target = item.partition("=")
        if equals and not (source and target):
            raise OptionError(f"expected source=target in --layers, got {item!r}")
        pairs.append((source, target if equals else source))
    return pairs


def _names(args: argparse.Namespace) -> tuple[str, str]:
    """Return the names of the networks: architectures, with checkpoint or role if they are equal."""
    from knowiso_train.features.modules import distinct_names

    if args.source != args.target:
        return args.source, args.target
    files = [Path(file).stem if file else "" for file in (args.source_checkpoint, args.target_checkpoint)]
    source, target = (f"{args.source} {f'({file})' if file else ''}".strip() for file in files)
    return distinct_names(source, target)


def _check_outputs(args: argparse.Namespace) -> None:
    """Check that the output files can be written, before a long run."""
    if args.plot is not None:
        from importlib.util import find_spec

        if find_spec("matplotlib") is None:
            raise MissingDependencyError(
                '--plot needs matplotlib, which is not installed; pip install "knowiso_train[plots]"'
            )
        if args.plot.suffix.lower() not in (".png", ".pdf", ".svg"):
            raise OptionError(f"--plot writes .png, .pdf or .svg, got {args.plot.name!r}")
    for path in (args.plot, args.html, args.csv, getattr(args, "json", None)):
        if path is None:
            continue
        if path.is_dir():
            raise OptionError(f"expected a file to write, got the folder {path}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"the folder of {path} cannot be created: {error}") from error


def _write_report(report: Report | StageComparison, args: argparse.Namespace) -> None:
    """Print a report and write it to the files that the options name."""
    print(report)
    writers: dict[str, Callable[[Path], object]] = {
        "json": report.to_json,
        "html": report.to_html,
        "csv": report.to_csv,
        "plot": report.plot,
    }
    for name, write in writers.items():
        if (path := getattr(args, name, None)) is not None:
            write(path)


def _layer_table(lines: Sequence[LayerSummary], ends: set[str]) -> str:
    rows = [("layer", "type", "channels", "grid", "")]
    for line in lines:
        grid = "–" if line.grid is None else f"{line.grid[0]} × {line.grid[1]}"
        mark = " ★" if line.name in ends else ""
        rows.append(
            (f"{line.name}{mark}", line.kind, "–" if line.channels is None else str(line.channels), grid, line.note)
        )
    return format_table(rows, left=(0, 1, -1), rule=True, indent="  ")


def _print_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    print(f"knowiso: warning: {message}", file=sys.stderr)


def _ignore_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    """Ignore the warnings of other processes, which equal those of the main process."""


def _measure_options(options: argparse.ArgumentParser) -> None:
    _network_options(options)
    _image_options(options)
    _method_options(options)
    _running_options(options)
    options.set_defaults(run=measure)


def _compare_options(options: argparse.ArgumentParser) -> None:
    compare_command.add_options(options)
    _image_options(options)
    _running_options(options)
    options.set_defaults(run=compare)


def _network_options(options: argparse.ArgumentParser) -> None:
    networks = options.add_argument_group("networks")
    networks.add_argument("--source", required=True, metavar="MODEL", help="explaining timm network")
    networks.add_argument("--target", required=True, metavar="MODEL", help="explained timm network")
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


def _image_options(options: argparse.ArgumentParser) -> None:
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


def _method_options(options: argparse.ArgumentParser) -> None:
    method = options.add_argument_group("method")
    method.add_argument(
        "--order", type=int, default=2, metavar="K", help="highest number of non-linear steps (default: %(default)s)"
    )
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
        "--no-noise-floor",
        dest="noise_floor",
        action="store_false",
        help="skip the fit to permuted targets (default: fitted)",
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
        "--seed", type=int, default=0, help="seed of split, samples and random weights (default: %(default)s)"
    )
    method.add_argument(
        "--at",
        default="output",
        choices=("output", "input"),
        help="side of the layers, such as the input of an activation (default: %(default)s)",
    )
    method.add_argument(
        "--similarity",
        nargs="*",
        choices=SIMILARITIES,
        metavar="NAME",
        help=f"columns of other measures: {', '.join(SIMILARITIES)} (default: none; without a NAME: the first three)",
    )


def _running_options(options: argparse.ArgumentParser) -> None:
    running = options.add_argument_group("running")
    running.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: selected by accelerate)")
    running.add_argument(
        "--autocast", choices=("bf16", "fp16"), help="autocast of the networks, not of the statistics (default: off)"
    )
    running.add_argument("--json", type=Path, metavar="FILE", help="write the report (default: not written)")
    _file_options(running)
    running.add_argument(
        "--no-progress", dest="progress", action="store_false", help="no progress bars (default: shown)"
    )


def _layers_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("model", metavar="MODEL", help="timm network")
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
    options.set_defaults(run=layers)


def _report_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("report", metavar="FILE", help="JSON of a report")
    _file_options(options)
    options.set_defaults(run=show)


def _file_options(options: argparse._ActionsContainer) -> None:
    """Add the options that name files of a report."""
    options.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page that opens in a browser (default: not written)"
    )
    options.add_argument("--csv", type=Path, metavar="FILE", help="write the figures as CSV (default: not written)")
    options.add_argument(
        "--plot", type=Path, metavar="FILE", help="write a picture: .png, .pdf, .svg (default: not written)"
    )


if __name__ == "__main__":
    sys.exit(main())
