"""Losses on timm networks with random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knowiso_train import IsomorphismLoss

# With an early and a late layer, overwritten in place where there is such a one
NETWORKS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "resnet18": ({}, ["bn1", "layer3"]),
    "mobilenetv3_small_050": ({}, ["bn1", "blocks.4"]),
    "vit_tiny_patch16_224": ({"img_size": 64}, ["blocks.2", "blocks.9"]),
    "convnext_atto": ({}, ["stages.0", "stages.2"]),
    "swin_tiny_patch4_window7_224": ({"img_size": 64, "window_size": 4}, ["layers.0", "layers.2"]),
}
SIDE, IMAGES = 64, 2
FORMS: dict[str, dict[str, Any]] = {"moment": {}, "learned": {"solver": "learned", "order": 1}}

_made: dict[tuple[str, int], nn.Module] = {}


def network(name: str, seed: int) -> nn.Module:
    if (name, seed) not in _made:
        torch.manual_seed(seed)
        _made[name, seed] = timm.create_model(name, num_classes=10, **NETWORKS[name][0])
    return copy.deepcopy(_made[name, seed])


def batch(seed: int = 0) -> Tensor:
    return torch.randn(IMAGES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def hooks_of(*models: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for model in models for module in model.modules() for kind in kinds)


def stepped(
    student: nn.Module, iso: IsomorphismLoss, call: int = 0, run: Callable[[Tensor], Any] | None = None
) -> dict[str, Tensor]:
    """One training step without the update: the gradients of cross-entropy plus loss, by parameter."""
    torch.manual_seed(call)  # drop path
    student.zero_grad()
    loss = F.cross_entropy((student if run is None else run)(batch(call)).float(), torch.arange(IMAGES)) + iso()
    loss.backward()
    return {"loss": loss.detach()} | {
        name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None
    }


def ready(form: str, student: nn.Module, teacher: nn.Module, layers: Any, **more: Any) -> IsomorphismLoss:
    """A loss whose maps stand, whatever the number of rows that one batch has."""
    iso = IsomorphismLoss(student, teacher, layers, **({"scale": "linear", "weight": 1.0} | FORMS[form] | more))
    for map_ in iso.maps.values():
        if form == "moment":
            torch.nn.init.normal_(map_.weight, std=0.05)
            map_.variance.fill_(10.0)
            map_.ready = True
            map_.refresh = 10**6
    return iso


def same(first: dict[str, Tensor], second: dict[str, Tensor], **tolerance: float) -> None:
    assert set(first) == set(second)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
