"""Networks of recipes, built from command-line arguments."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from knowiso_train.errors import OptionError
from knowiso_train.experiment.arguments import parse_key_value
from knowiso_train.experiment.demo import demo_efficientnet_file
from knowiso_train.loading.checkpoints import read_checkpoint
from knowiso_train.loading.hub import is_hub_name, plain_logits
from knowiso_train.loading.timm import load_model

DEMO_NETWORKS = ("lite0", "lite1", "lite2")


def build_network(
    words: Sequence[str],
    *,
    num_classes: int,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    seed: int = 0,
    input_size: Sequence[int] | None = None,
) -> nn.Module:
    """Build a network that returns logits, with the same initial weights at every call.

    Args:
        words: Name in timm, followed by KEY=VALUE options of `timm.create_model`; or `hf:…`, as of `load_model`.
        num_classes: Number of classes.
        checkpoint: Weight file. None: no file.
        pretrained: Load the published weights.
        seed: Seed of the initial weights.
        input_size: (C, H, W) of images that the network must accept. None: not checked.

    Raises:
        OptionError: No such network, an unknown option, or a network for other images.

    Examples:
        >>> build_network(["test_resnet", "channels=(8,8,16,16)"], num_classes=4).num_classes
        4
    """
    torch.manual_seed(seed)
    try:
        options = timm_options(words, num_classes)
        model = load_model(words[0], checkpoint=checkpoint, pretrained=pretrained, **options)
    except (TypeError, argparse.ArgumentTypeError) as error:
        raise OptionError(f"timm cannot make {' '.join(words)}: {error}") from error
    if is_hub_name(words[0]):
        plain_logits(model)
    if input_size is not None:
        _check_input(model, words[0], input_size)
    return model


def check_published_classifier(model: nn.Module, name: str, num_classes: int, cure: str) -> None:
    """Check that the published weights of a network include its classifier, and do not leave it random.

    Args:
        model: Network of `build_network(pretrained=True)`.
        name: Its name, for the message.
        num_classes: Number of classes of the images.
        cure: Further sentence of the message.

    Raises:
        OptionError: Published weights for another number of classes.

    Examples:
        >>> model = build_network(["test_resnet"], num_classes=10)
        >>> check_published_classifier(model, "test_resnet", 10, "Train it first.")
        Traceback (most recent call last):
        knowiso_train.errors.OptionError: the published weights of test_resnet are for 1000 classes, and the images ...
    """
    published = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes")
    if published is not None and published != num_classes:
        raise OptionError(
            f"the published weights of {name} are for {published} classes, and the images have {num_classes}: its "
            f"classifier would be random. {cure}"
        )


@torch.no_grad()
def _check_input(model: nn.Module, name: str, size: Sequence[int]) -> None:
    try:
        model(torch.zeros(1, *size))
    # timm asserts, transformers raises ValueError, and torch raises RuntimeError
    except (AssertionError, RuntimeError, ValueError) as error:
        raise OptionError(
            f"{name} does not accept images of {tuple(size[1:])} pixels: {error}. Pass another --image-size, or a "
            "network for images of this size"
        ) from error


def timm_options(words: Sequence[str], num_classes: int) -> dict[str, Any]:
    """Return the options of `timm.create_model` in the words of a network.

    Examples:
        >>> timm_options(["resnet10t", "channels=(16,32)"], 10)
        {'num_classes': 10, 'channels': (16, 32)}
    """
    return {"num_classes": num_classes, **dict(map(parse_key_value, words[1:]))}


def build_checkpoint(name: str, num_classes: int | None = None, *, seed: int = 0) -> nn.Module:
    """Build a network with the weights of a checkpoint.

    Args:
        name: Name in timm for its published weights, NAME=FILE for those of a file, lite0, lite1, lite2 for those of a
            demo package, or `hf:…`, as of `load_model`.
        num_classes: Number of classes; another classifier is initialized anew. None: that of the checkpoint.
        seed: Seed of a new classifier.
    """
    torch.manual_seed(seed)
    if is_hub_name(name):
        return plain_logits(load_model(name, num_classes=num_classes))
    short_name, _, file = name.partition("=")
    if short_name in DEMO_NETWORKS:
        weights = demo_efficientnet_file(int(short_name[-1]))
        model = load_model(architecture_name(name), checkpoint=weights, in_order=True)
    elif file:
        model = load_model(short_name, checkpoint=file, num_classes=_num_classes(short_name, file))
    else:
        model = load_model(short_name)
    if num_classes is not None and model.num_classes != num_classes:
        model.reset_classifier(num_classes)  # type: ignore[operator]
    return model


def architecture_name(name: str) -> str:
    """Return the name of a network of `build_checkpoint` without its file.

    Examples:
        >>> architecture_name("lite0"), architecture_name("resnet18=weights.pth")
        ('tf_efficientnet_lite0', 'resnet18')
    """
    short_name = name if is_hub_name(name) else name.partition("=")[0]
    return f"tf_efficientnet_{short_name}" if short_name in DEMO_NETWORKS else short_name


def _num_classes(architecture: str, file: str) -> int | None:
    """Return the number of classes of a weight file, or None if it has no classifier."""
    model = load_model(architecture, pretrained=False)
    classifier = model.get_classifier()  # type: ignore[operator]
    name = next((name for name, layer in model.named_modules() if layer is classifier), "")
    weight = read_checkpoint(file, model.state_dict()).get(f"{name}.weight")
    return None if weight is None else len(weight)
