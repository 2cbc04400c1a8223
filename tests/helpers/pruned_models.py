"""Small networks of many architectures, pruned by torch-pruning."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

import timm
import torch
import torch_pruning as tp
from torch import Tensor, nn

SIDE = 32
Network = TypeVar("Network", bound=nn.Module)
NETWORKS: dict[str, dict[str, Any]] = {
    "test_resnet": {},
    "resnext26ts": {},
    "regnetx_002": {},
    "mobilenetv3_small_050": {},
    "vit_tiny_patch16_224": {"img_size": SIDE, "depth": 2},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 16)},
    "densenet121": {"growth_rate": 4, "block_config": (2, 2)},
}


def network(name: str, **more: Any) -> nn.Module:
    """Return one of NETWORKS with random offsets, so that all entries of a tensor differ."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=5, **NETWORKS[name], **more).eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(0.01 * torch.rand_like(tensor))
    return model


def prune(model: nn.Module, example: torch.Tensor | None = None) -> None:
    """Remove about a third of the channels of a model in place, attention heads and their widths included."""
    example = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) if example is None else example
    attentions = {name: module for name, module in model.named_modules() if hasattr(module, "num_heads")}
    heads = {module.qkv: module.num_heads for module in attentions.values()}
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            model,
            example,
            tp.importance.MagnitudeImportance(p=2),
            pruning_ratio=0.34,
            ignored_layers=[last],
            num_heads=heads,
            prune_num_heads=True,
            prune_head_dims=True,
            head_pruning_ratio=0.34,
            out_channel_groups={},
            in_channel_groups={},
        )
        pruner.step()
    widths = {name: (heads[module.qkv], module.qkv.out_features // 3) for name, module in attentions.items()}
    _patch(model, widths)


def _patch(model: nn.Module, widths: dict[str, tuple[int, int]]) -> None:
    for name, (heads, width) in widths.items():
        module: Any = model.get_submodule(name)
        module.num_heads, module.attn_dim, module.head_dim = heads, width, width // heads


def settled(model: Network, images: Tensor) -> Network:
    """Randomize batch norms, and set their statistics to those of the activations, as after training."""
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = None
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_(0, 0.3)
        model.train()
        model(images)
    return model.eval()
