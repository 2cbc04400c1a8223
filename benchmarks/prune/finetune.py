"""Finetunings after `ki.prune` at the screened ratio, with and without labels, for bench_prune.py.

tuned                    `ki.finetune` on the calibration images without labels: crops with mirrored margins, flips,
                         CutMix
tuned, four times        the same with four times as many updates
blocks, tuned            the same, from blocks that were finetuned (`block_steps`)
5 epochs, cross-entropy  control: SGD on the 15,000 labeled training images, crops and flips
5 epochs, ki.finetune    as many passes over these images towards the original's blocks, without labels, in updates of
                         64, augmented as for "tuned"

ResNet-56 was trained on these images and fits them almost perfectly. Learning rates were chosen on the select images
of seed 0: for `ki.finetune` from 0.005, 0.009 and 0.018 in short runs, for the control from 0.003 and 0.01 in full and
0.03 in one epoch. Labels and logits in `ki.finetune` reduced the accuracy there. Updates of 32 images at 0.0065 were
better than half as many of 64 at 0.009. For five epochs, 64 at 0.018 had the same accuracy on the select images as 32
at 0.0065, and a higher agreement with the original.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import knowiso_train as ki
from benchmarks.common.augment import random_crops_and_flips
from benchmarks.prune.methods import MethodContext
from benchmarks.refine.data import shuffled_epochs
from knowiso_train.distillation import WeightSchedule
from knowiso_train.pruning import cutmix

TRAINING_EPOCHS, TRAINING_BATCH_SIZE, CROP_PADDING, VALIDATION_FRACTION = 5, 64, 4, 0.0625
TRAINING_LR = 0.018
CONTROL_LR, CONTROL_DECAY = 0.003, 5e-4


@dataclass(frozen=True)
class FinetuneSettings:
    """Number of updates, batch size, learning rate, and padding of the crops in pixels."""

    steps: int
    batch: int
    lr: float
    padding: int


FINETUNE_SETTINGS = {
    "resnet56": FinetuneSettings(800, 32, 6.5e-3, CROP_PADDING),
    "lite0": FinetuneSettings(200, 16, 6.5e-3, 24),
}


def finetune(context: MethodContext, model: nn.Module) -> None:
    """Finetune on the calibration images."""
    _finetune(context, model, context.data.images, FINETUNE_SETTINGS[context.task.name])


def finetune_longer(context: MethodContext, model: nn.Module) -> None:
    """Finetune with four times as many updates."""
    settings = FINETUNE_SETTINGS[context.task.name]
    _finetune(context, model, context.data.images, replace(settings, steps=4 * settings.steps))


def finetune_on_training_images(context: MethodContext, model: nn.Module) -> None:
    """Finetune on the training images, without labels."""
    images, _ = context.task.labeled
    _finetune(
        context,
        model,
        images,
        FinetuneSettings(
            TRAINING_EPOCHS * len(images) // TRAINING_BATCH_SIZE, TRAINING_BATCH_SIZE, TRAINING_LR, CROP_PADDING
        ),
    )


def _finetune(context: MethodContext, model: nn.Module, images: Tensor, settings: FinetuneSettings) -> None:
    generator, steps = torch.Generator().manual_seed(context.seed), 8 if context.task.quick else settings.steps
    layout = torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format

    def transform(batch: Tensor) -> Tensor:
        return cutmix(augment(batch, generator, "reflect", settings.padding).contiguous(memory_format=layout))

    ki.finetune(
        model,
        context.task.original,
        [images],
        steps=steps,
        lr=settings.lr,
        batch_size=settings.batch,
        max_images=len(images),
        validation_fraction=VALIDATION_FRACTION,
        transform=transform,
        seed=context.seed,
        progress=False,
    )


def train_with_labels(context: MethodContext, model: nn.Module, lr: float = CONTROL_LR) -> None:
    """Train with SGD on labels: momentum, training mode, warm-up and cosine schedule."""
    images, labels = context.task.labeled
    generator, total = torch.Generator().manual_seed(context.seed), TRAINING_EPOCHS * len(images) // TRAINING_BATCH_SIZE
    order, schedule = (
        shuffled_epochs(torch.arange(len(images)), TRAINING_BATCH_SIZE * total, context.seed),
        WeightSchedule(warmup=total // 20, total=total + 1),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=CONTROL_DECAY, nesterov=True)
    model.train()
    with torch.enable_grad():
        for step in range(total):
            indices = order[TRAINING_BATCH_SIZE * step : TRAINING_BATCH_SIZE * (step + 1)]
            optimizer.param_groups[0]["lr"] = lr * schedule(step + 1)
            loss = F.cross_entropy(model(augment(images[indices], generator)), labels[indices])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    model.eval()


def augment(
    images: Tensor, generator: torch.Generator, margin: str = "constant", padding: int = CROP_PADDING
) -> Tensor:
    """Apply random crops and flips.

    The margin is the mean color, or mirrored for `margin="reflect"`.
    """
    return random_crops_and_flips(F.pad(images, (padding,) * 4, mode=margin), images.shape[-1], generator)


FINETUNINGS: dict[str, Callable[[MethodContext, nn.Module], None]] = {
    "tuned": finetune,
    "tuned, four times": finetune_longer,
    "blocks, tuned": finetune,
    "5 epochs, cross-entropy": train_with_labels,
    "5 epochs, ki.finetune": finetune_on_training_images,
}
