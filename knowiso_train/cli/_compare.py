"""Command `knowiso compare`: descendants of a network, or checkpoints of a training, beside a reference."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowiso_train.cli._options import (
    add_image_options,
    add_method_options,
    add_network_options,
    add_output_options,
    add_running_options,
    autocast_dtype,
    layer_pairs,
    load_images,
    printed_warnings,
)
from knowiso_train.cli._output import check_outputs, write_report
from knowiso_train.errors import OptionError

if TYPE_CHECKING:
    from torch import nn

    from knowiso_train.diagnosis.comparison import CheckpointStage


@dataclass(frozen=True)
class _LoadedStage:
    """Network that is loaded when it is called. Its text identifies a stage in the folder of `--path`.

    Attributes:
        model: Network of timm.
        pretrained: Load its published weights.
        num_classes: Width of its classifier. None: that of the network.
        in_order: Assign the tensors of a checkpoint in order.
        checkpoint: Weight file. None: no own weights.
        digest: Digest of the weight file. None: no file, or no folder of results.
    """

    model: str
    pretrained: bool
    num_classes: int | None
    in_order: bool
    checkpoint: str | None = None
    digest: str | None = None

    def __call__(self) -> nn.Module:
        from knowiso_train.loading.timm import load_model

        return load_model(
            self.model,
            pretrained=self.pretrained,
            num_classes=self.num_classes,
            in_order=self.in_order,
            checkpoint=self.checkpoint,
        )


def add_options(options: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    networks = options.add_argument_group("networks")
    networks.add_argument(
        "--reference", metavar="MODEL", help="timm network to compare with (default: the last of --checkpoints)"
    )
    networks.add_argument(
        "--reference-checkpoint", metavar="FILE", help="weights of the reference (default: timm's published ones)"
    )
    stages = networks.add_mutually_exclusive_group(required=True)
    stages.add_argument(
        "--stages",
        nargs="+",
        metavar="STAGE",
        help="[NAME=]FILE with weights of --model, or [NAME=]MODEL of timm (default: --checkpoints)",
    )
    stages.add_argument(
        "--checkpoints",
        metavar="FOLDER",
        help="checkpoints of one training of --model, or a glob of files or folders (default: --stages)",
    )
    networks.add_argument("--model", metavar="MODEL", help="timm network of the weights (default: that of --reference)")
    networks.add_argument(
        "--classes", type=int, metavar="N", help="width of all classifiers (default: the networks' own)"
    )
    networks.add_argument(
        "--layers", required=True, nargs="+", metavar="LAYER", help="names or globs, or reference=stage pairs"
    )
    add_network_options(networks)
    add_image_options(options)
    method = options.add_argument_group("method")
    add_method_options(method, order=0)
    add_output_options(method)
    method.add_argument(
        "--path",
        type=Path,
        metavar="FOLDER",
        help="one file per finished stage, so that the command can be resumed (default: none)",
    )
    add_running_options(options)


def run(args: argparse.Namespace) -> None:
    """Compare stages with a reference: what of its features each of them keeps, loses and gains, layer by layer."""
    check_outputs(args)
    import torch

    import knowiso_train as ki
    from knowiso_train.experiment.processes import Processes
    from knowiso_train.loading.timm import input_transform

    with Processes(args.device) as processes:
        torch.manual_seed(args.seed)
        stages: dict[str, _LoadedStage | CheckpointStage] = _stages(args)
        reference, name = _reference(args, stages)
        with printed_warnings(processes):
            comparison = ki.compare_stages(
                reference,
                [(name, stage) if isinstance(stage, _LoadedStage) else stage for name, stage in stages.items()],
                load_images(args, processes),
                layer_pairs(args.layers),
                order=args.order,
                kernel_size=args.kernel_size,
                functional=args.functional,
                labels="auto" if args.labels else None,
                seed=args.seed,
                max_images=args.max_images,
                reference_transform=input_transform(reference, size=args.input_size),
                stage_transform=_transforms(args, stages),
                reference_name=name,
                path=args.path,
                device=processes.device,
                autocast=autocast_dtype(args),
                progress=args.progress and processes.is_main,
            )
        if processes.is_main:
            write_report(comparison, args)


def _stage(args: argparse.Namespace, model: str, **options: Any) -> _LoadedStage:
    options = {"pretrained": args.pretrained} | options
    return _LoadedStage(model, num_classes=args.classes, in_order=args.checkpoints_in_order, **options)


def _model(args: argparse.Namespace) -> str:
    """Return the timm network of the weight files."""
    model = args.model or args.reference
    if model is None:
        raise OptionError("weight files need --model, the timm network that they belong to")
    return str(model)


def _stages(args: argparse.Namespace) -> dict[str, Any]:
    """Return functions that load the stages, by name."""
    from knowiso_train.diagnosis.comparison import checkpoint_stages
    from knowiso_train.diagnosis.comparison._digests import file_digest
    from knowiso_train.loading.checkpoints import weight_files

    if args.checkpoints is not None:
        make = _stage(args, _model(args), pretrained=False)
        found = checkpoint_stages(args.checkpoints, make, in_order=args.checkpoints_in_order)
        return {stage.name: stage for stage in found}
    stages = {}
    for item in args.stages:
        # A path may hold "=", as the checkpoints of Lightning do
        given, equals, value = ("", "", item) if Path(item).exists() else item.partition("=")
        value = value if equals else item
        file = Path(value) if Path(value).exists() else None
        name = given if equals else value if file is None else file.stem
        if name in stages:
            raise OptionError(f"two stages are named {name!r}; give names as NAME=FILE")
        if file is None:
            stages[name] = _stage(args, value)
        else:
            digest = None if args.path is None else file_digest(weight_files(file))
            stages[name] = _stage(args, _model(args), checkpoint=value, digest=digest)
    return stages


def _reference(args: argparse.Namespace, stages: dict[str, Any]) -> tuple[nn.Module, str]:
    """Return the reference and its name; the last checkpoint is removed from the stages if it is the reference."""
    if args.reference is not None:
        file = args.reference_checkpoint
        name = f"{args.reference} ({Path(file).stem})" if file else args.reference
        return _stage(args, args.reference, checkpoint=file)(), name
    if args.checkpoints is None or len(stages) < 2:
        raise OptionError(
            "expected --reference MODEL, or at least two --checkpoints, the last of which is the reference"
        )
    name, last = stages.popitem()
    return last(), name


def _transforms(args: argparse.Namespace, stages: Mapping[str, _LoadedStage | CheckpointStage]) -> dict[str, Any]:
    """Return the transform of the images for each stage, from the configuration of its network alone."""
    from knowiso_train.loading.timm import input_transform

    specs = {name: stage.model if isinstance(stage, _LoadedStage) else _model(args) for name, stage in stages.items()}
    # Checkpoints of one training share their network, which is built once
    transforms = {
        spec: input_transform(_stage(args, spec, pretrained=False)(), size=args.input_size)
        for spec in dict.fromkeys(specs.values())
    }
    return {name: transforms[spec] for name, spec in specs.items()}
