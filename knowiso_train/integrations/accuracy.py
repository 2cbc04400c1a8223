"""Top-1 accuracy over all processes, each image once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset


@torch.no_grad()
def top1_accuracy(
    model: nn.Module, images: Any, accelerator: Any, *, to_input: Callable[[Tensor], Tensor] | None = None, batch_size: int = 64, workers: int = 0
) -> float:
    """Share of images whose label is the network's first guess, in percent. Every process calls it; nothing is padded, no image counts twice.

    Args:
        model: the network, on the accelerator's device; its mode is as before afterwards.
        images: map-style dataset of (float image (C, H, W), integer label).
        accelerator: accelerate's.
        to_input: from the dataset's images to the network's inputs.
        batch_size: images a batch, in each process.
        workers: processes that read.

    Example:
        >>> from accelerate import Accelerator
        >>> images = [(torch.eye(4)[i].view(4, 1, 1), 0) for i in range(4)]  # the network repeats the image: one of four is of class 0
        >>> top1_accuracy(nn.Flatten(), images, Accelerator(cpu=True))
        25.0
    """
    mine = Subset(images, range(accelerator.process_index, len(images), accelerator.num_processes))
    right = torch.zeros((), dtype=torch.int64, device=accelerator.device)
    training = model.training
    model.eval()
    try:
        for batch, labels in DataLoader(mine, batch_size, num_workers=workers):
            batch = batch.to(accelerator.device)
            with accelerator.autocast():
                guess = model(batch if to_input is None else to_input(batch)).argmax(1)
            right += (guess == labels.to(accelerator.device)).sum()
    finally:
        model.train(training)
    return 100 * float(accelerator.reduce(right)) / len(images)
