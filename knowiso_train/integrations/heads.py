"""Heads of timm's attention: found, and cut, so that `num_heads`, `head_dim` and `attn_dim` stay true."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from knowiso_train.pruning.channel_group import ChannelGroup

PLAIN = {"qkv", "proj", "q_norm", "k_norm"}  # children with parameters that know nothing of the number of heads


def head_groups(model: nn.Module) -> list[ChannelGroup]:
    """One group for every attention with a joint qkv layer: a unit is a head, read by the output projection.

    Attention that keeps something else per head (position tables, gates, norms over all heads) is left out.

    Example:
        >>> from timm.layers import Attention
        >>> [group] = head_groups(nn.ModuleDict({"attn": Attention(8, num_heads=2)}))
        >>> group.name, group.size, group.readers["attn.proj"].shape, group.writers["attn.qkv"].shape
        ('attn', 2, torch.Size([2, 4]), torch.Size([2, 12]))
    """
    found = []
    for name, module in model.named_modules():
        heads, width = getattr(module, "num_heads", None), getattr(module, "head_dim", None)
        qkv, proj = getattr(module, "qkv", None), getattr(module, "proj", None)
        if not (isinstance(heads, int) and isinstance(width, int) and isinstance(qkv, nn.Linear) and isinstance(proj, nn.Linear)):
            continue
        others = {child for child, part in module.named_children() if any(True for _ in part.parameters())} - PLAIN
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if others or own or not hasattr(module, "attn_dim") or qkv.out_features != 3 * heads * width or proj.in_features != heads * width:
            continue
        columns = torch.arange(heads * width).view(heads, width)
        rows = torch.cat([columns + part * heads * width for part in range(3)], 1)
        found.append(ChannelGroup(name, heads, {f"{name}.proj": columns}, {f"{name}.qkv": rows}, kind="heads"))
    return found


@torch.no_grad()
def cut_heads(model: nn.Module, group: ChannelGroup, gone: Sequence[int]) -> None:
    """Take heads out of an attention, in place; width of a head and scale stay."""
    attention: Any = model.get_submodule(group.name)
    left = [head for head in range(group.size) if head not in set(gone)]
    qkv, proj = attention.qkv, attention.proj
    rows = group.writers[f"{group.name}.qkv"][left].view(len(left), 3, -1).transpose(0, 1).flatten().to(qkv.weight.device)
    columns = group.readers[f"{group.name}.proj"][left].flatten().to(proj.weight.device)
    qkv.weight = nn.Parameter(qkv.weight.index_select(0, rows), requires_grad=qkv.weight.requires_grad)
    if qkv.bias is not None:
        qkv.bias = nn.Parameter(qkv.bias.index_select(0, rows), requires_grad=qkv.bias.requires_grad)
    proj.weight = nn.Parameter(proj.weight.index_select(1, columns), requires_grad=proj.weight.requires_grad)
    qkv.out_features, proj.in_features = len(rows), len(columns)
    attention.num_heads, attention.attn_dim = len(left), len(columns)
