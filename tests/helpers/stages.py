"""Networks whose features are known, and stages of them with known changes."""

from __future__ import annotations

import copy
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

NUM_IMAGES, NUM_CHANNELS, NUM_CLASSES, GRID = 400, 8, 4, 3


def gaussian_images(seed: int = 0) -> DataLoader[tuple[Tensor, ...]]:
    """Return images of independent channels; the networks of this module ignore the second half of the channels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(NUM_IMAGES, 2 * NUM_CHANNELS, GRID, GRID, generator=generator)
    labels = torch.randint(NUM_CLASSES, (NUM_IMAGES,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=50)


def class_images() -> DataLoader[tuple[Tensor, ...]]:
    """Return images of four equally frequent classes: channel c is 1 in images of class c, and 0 in others."""
    labels = torch.arange(NUM_IMAGES) % NUM_CLASSES
    images = torch.zeros(NUM_IMAGES, 2 * NUM_CHANNELS, GRID, GRID)
    images[torch.arange(NUM_IMAGES), labels] = 1
    images[labels == 0] = 0
    return DataLoader(TensorDataset(images, labels), batch_size=50)


def orthogonal_network(seed: int = 0) -> nn.Sequential:
    """Return three orthogonal maps of the first channels and a linear classifier: every feature has equal variances."""
    torch.manual_seed(seed)
    first, second, third = (nn.Conv2d(width, NUM_CHANNELS, 1, bias=False) for width in (2 * NUM_CHANNELS, *[8] * 2))
    for layer in (first, second, third):
        nn.init.orthogonal_(layer.weight.data[:, :NUM_CHANNELS])
        layer.weight.data[:, NUM_CHANNELS:] = 0
    head = [("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("fc", nn.Linear(NUM_CHANNELS, NUM_CLASSES))]
    return nn.Sequential(OrderedDict([("first", first), ("second", second), ("third", third), *head]))


def class_network() -> nn.Sequential:
    """Return a network whose features are the indicators of classes 1 to 3, and whose output is the class."""
    network = orthogonal_network()
    for layer in (network.first, network.second, network.third):
        layer.weight.data = torch.eye(layer.in_channels)[:NUM_CHANNELS, :, None, None]
    network.fc.weight.data = 10 * torch.eye(NUM_CHANNELS)[:NUM_CLASSES]
    network.fc.bias.data = torch.tensor([6.0, 0, 0, 0])
    return network


def without_channels(network: nn.Sequential, layer: str, count: int) -> nn.Sequential:
    """Return a copy with the first channels of a layer's output set to zero."""
    changed = copy.deepcopy(network)
    changed.get_submodule(layer).weight.data[:count] = 0
    return changed


def with_noise(network: nn.Sequential, scale: float) -> nn.Sequential:
    """Return a copy whose first layer adds independent noise of a standard deviation to every channel."""
    changed = copy.deepcopy(network)
    changed.first.weight.data[:, NUM_CHANNELS:] = scale * torch.eye(NUM_CHANNELS)[:, :, None, None]
    return changed
