"""Measure the features that two EfficientNet-Lite share, with their ImageNet weights. Nothing is downloaded.

    pip install -e ".[demo]"
    accelerate launch recipes/measure.py                        # real digits, about a minute on two CPU cores
    accelerate launch recipes/measure.py --images FOLDER        # photographs, at 224 pixels

Prints the report; writes output/measure.json and output/measure.png.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import knowiso_train as ki
from knowiso_train.errors import DataError
from knowiso_train.experiment import Processes, demo_digits, demo_efficientnet_file
from knowiso_train.loading import image_loader, input_transform, load_model

# From early to late; `knowiso layers tf_efficientnet_lite0` lists all layers
LAYERS = ["blocks.1", "blocks.2", "blocks.3", "blocks.4"]
DIGIT_SIZE, PHOTOGRAPH_SIZE = 96, 224  # input sizes in pixels; 96 takes about a minute on two cores
BATCH_SIZE = 50
MAX_ROWS = 16_384  # positions kept for order 1; 131,072 by default


def load_efficientnet(size: int) -> nn.Module:
    """Return timm's tf_efficientnet_lite<size> with the weights of its demo package."""
    return load_model(f"tf_efficientnet_lite{size}", checkpoint=demo_efficientnet_file(size), in_order=True)


def load_digits(count: int) -> DataLoader[Any]:
    """Return a loader of MNIST digits, evenly distributed over the classes."""
    images, labels = demo_digits()
    if count > len(images):
        raise DataError(f"expected --count of at most {len(images):,} digits, got {count:,}")
    # The digits are sorted by class
    index = np.linspace(0, len(images) - 1, count).round().astype(int)
    return DataLoader(TensorDataset(images[index], labels[index]), batch_size=BATCH_SIZE)


def main() -> int:
    """Measure both directions, print the report, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of photographs (default: digits)")
    parser.add_argument("--count", type=int, default=1_000, help="number of images (default: %(default)s)")
    parser.add_argument("--layers", nargs="+", default=LAYERS, help=f"names or globs (default: {' '.join(LAYERS)})")
    parser.add_argument(
        "--order", type=int, default=1, help="highest number of non-linear steps (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder to write to (default: %(default)s)")
    args = parser.parse_args()

    with Processes() as processes:
        source, target = load_efficientnet(0).to(processes.device), load_efficientnet(1).to(processes.device)
        if args.images is None:
            dataset, size, loader = "MNIST digits", DIGIT_SIZE, load_digits(args.count)
        else:
            dataset, size = str(args.images), PHOTOGRAPH_SIZE
            loader = image_loader(dataset, image_size=size, batch_size=BATCH_SIZE)

        report = ki.measure(
            source,
            target,
            loader,
            args.layers,
            order=args.order,
            directions="both",
            max_images=args.count,
            max_rows=MAX_ROWS,
            # From images in [0, 1] to the resolution and normalization of each network
            source_transform=input_transform(source, size=size),
            target_transform=input_transform(target, size=size),
            names=("EfficientNet-Lite0", "EfficientNet-Lite1"),
            progress=processes.is_main,
        )

        if processes.is_main:
            print(f"\n{report}\n")
            report.to_json(args.output / "measure.json")
            report.plot(args.output / "measure.png", title=f"Shared features of two ImageNet networks ({dataset})")
            print(f"written: {args.output / 'measure.json'}, {args.output / 'measure.png'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ki.KnowisoError as error:
        sys.exit(f"measure: {error}")
