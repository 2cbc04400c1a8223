"""Small networks of many architectures, and `ki.prune` on few images."""

from __future__ import annotations

import warnings
from typing import Any

import timm
import torch
from torch import Tensor, nn

import knowiso_train as ki
from knowiso_train.errors import KnowisoWarning
from knowiso_train.pruning.api import PruneResult

FAMILIES: dict[str, dict[str, Any]] = {
    "test_resnet": {"channels": (16, 16, 24, 24)},
    "seresnet50": {"layers": (1, 1, 1, 1), "channels": (16, 16, 32, 32)},
    "test_byobnet": {},
    "densenet121": {"growth_rate": 4, "block_config": (2, 2)},
    "mobilenetv2_035": {},
    "mobilenetv3_small_050": {},
    "test_efficientnet": {},
    "regnety_002": {},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 16)},
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 2, "embed_dim": 48},
    "deit_tiny_patch16_224": {"img_size": 32, "depth": 2, "embed_dim": 48},
    "deit3_small_patch16_224": {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3},
    "vit_small_patch14_dinov2": {"img_size": 28, "depth": 2, "embed_dim": 48, "num_heads": 3},
    "swin_tiny_patch4_window7_224": {
        "img_size": 56,
        "embed_dim": 24,
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 2, 2, 2),
    },
    "cait_xxs24_224": {"img_size": 32, "depth": 2, "depth_token_only": 1, "embed_dim": 48, "num_heads": 4},
    "xcit_nano_12_p16_224": {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 4},
}


def family(name: str) -> tuple[nn.Module, Tensor]:
    """A lively network: running statistics are those of its own activations."""
    torch.manual_seed(0)
    options = FAMILIES[name]
    model: nn.Module = timm.create_model(name, num_classes=5, **options)
    images = torch.randn(32, 3, *[options.get("img_size", 32)] * 2)
    return lively(model, images), images


def lively(model: nn.Module, images: Tensor) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
            if name.endswith("gamma"):  # layer scale begins near nothing
                parameter.add_(0.5)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
                module.reset_running_stats()
                module.weight.data.clamp_(min=0.5)  # residual blocks of timm begin with 0
        model.train()(images)
    return model.eval()


def little(model: nn.Module, images: Tensor, **options: Any) -> PruneResult:
    """With few images: the point is the cut."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KnowisoWarning)
        return ki.prune(model, [images], progress=False, **{"rows": 2, "macs": 0.7, **options})


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 12, 3, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 10, 3, bias=False), nn.BatchNorm2d(10)
        self.fc = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


def chain(seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    images = torch.randn(128, 3, 10, 10)
    return lively(Chain(), images), images
