"""Training with labels after pruning: five epochs of the 15,000 CIFAR-10 images at hand, with crops and flips; for bench_prune.py.

Rates were chosen on the select images, from three settings of one epoch each.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from prune_tasks import Task
from torch import Tensor, nn

import knowiso_train as ki

EPOCHS, BATCH, PADDING, HELD_OUT = 5, 64, 4, 0.05
RATES = {"cross-entropy": 0.01, "ours": 0.005}


def changed(images: Tensor) -> Tensor:
    """Random crops of the padded images, half of them mirrored."""
    wide = F.pad(images, (PADDING,) * 4)
    corners = torch.randint(2 * PADDING + 1, (len(images), 2)).tolist()
    flips = (torch.rand(len(images)) < 0.5).tolist()
    crops = [x[:, i : i + 32, j : j + 32] for x, (i, j) in zip(wide, corners, strict=True)]
    return torch.stack([crop.flip(-1) if flip else crop for crop, flip in zip(crops, flips, strict=True)])


def cross_entropy(task: Task, model: nn.Module, seed: int, epochs: float = EPOCHS, lr: float = RATES["cross-entropy"]) -> None:
    """What a user would do: SGD on the labels, in training mode, the rate as in the recipe."""
    images, labels = task.labelled
    torch.manual_seed(seed)
    total = round(epochs * len(images) / BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    model.requires_grad_(True).train()
    order = torch.cat([torch.randperm(len(images)) for _ in range(math.ceil(epochs))])
    for step in range(total):
        which = order[BATCH * step : BATCH * (step + 1)]
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / (0.05 * total)) * (1 + math.cos(math.pi * step / total)) / 2
        loss = F.cross_entropy(model(changed(images[which])), labels[which])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    model.eval().requires_grad_(False)


def with_original(task: Task, model: nn.Module, seed: int, epochs: float = EPOCHS, lr: float = RATES["ours"]) -> None:
    """`ki.tune` with labels: what the blocks of the original give, and the labels; as many updates, of which some images are held out."""
    images, labels = task.labelled
    model.requires_grad_(True)
    ki.tune(
        model, task.original, [(images, labels)], labels=True, steps=round(epochs * len(images) / BATCH), lr=lr, batch_size=BATCH,
        max_images=len(images), held_out=HELD_OUT, transform=changed, seed=seed, progress=False,
    )  # fmt: skip
    model.requires_grad_(False)
