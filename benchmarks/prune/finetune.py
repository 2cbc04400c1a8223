"""Short trainings that may follow `ki.prune`, without labels and with them; for bench_prune.py at the screened ratio, all but one for ResNet-56.

tuned                    `ki.finetune` on the images that pruned, crops with mirrored margins, flips, mixed patches: without
labels
tuned, four times        the same with four times as many updates
blocks, tuned            the same, from blocks that were tuned as a whole (`block_steps`)
5 epochs, cross-entropy  the control: SGD on the 15,000 labeled images at hand, crops and flips
5 epochs, ki.finetune        as many passes over these images towards the original's blocks, in updates of 64, augmented as
for "tuned": no labels

ResNet-56 was trained on these images and knows them by heart. Rates were chosen on the select images of seed 0:
`ki.finetune`'s from 0.005, 0.009 and
0.018 in short runs, the control's from 0.003 and 0.01 in full, and from 0.03 too in one epoch. Labels and logits in
`ki.finetune` made it worse there.
Updates of 32 images at 0.0065 were better there than half as many of 64 at 0.009; in five epochs 64 at 0.018 (32 at
0.0065 and 64 at 0.009 were tried
too) had no more right on the select images than the first of these, but agreed more often with the original.
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
    """Updates, images of each, their length, and pixels by which crops move."""

    steps: int
    batch: int
    lr: float
    padding: int


FINETUNE_SETTINGS = {
    "resnet56": FinetuneSettings(800, 32, 6.5e-3, CROP_PADDING),
    "lite0": FinetuneSettings(200, 16, 6.5e-3, 24),
}


def finetune(setting: MethodContext, model: nn.Module) -> None:
    _finetune(setting, model, setting.data.images, FINETUNE_SETTINGS[setting.task.name])


def finetune_longer(setting: MethodContext, model: nn.Module) -> None:
    how = FINETUNE_SETTINGS[setting.task.name]
    _finetune(setting, model, setting.data.images, replace(how, steps=4 * how.steps))


def finetune_on_training_images(setting: MethodContext, model: nn.Module) -> None:
    images, _ = setting.task.labeled
    _finetune(
        setting,
        model,
        images,
        FinetuneSettings(
            TRAINING_EPOCHS * len(images) // TRAINING_BATCH_SIZE, TRAINING_BATCH_SIZE, TRAINING_LR, CROP_PADDING
        ),
    )


def _finetune(setting: MethodContext, model: nn.Module, images: Tensor, how: FinetuneSettings) -> None:
    generator, steps = torch.Generator().manual_seed(setting.seed), 8 if setting.task.quick else how.steps
    layout = torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format

    def transform(batch: Tensor) -> Tensor:
        return cutmix(augment(batch, generator, "reflect", how.padding).contiguous(memory_format=layout))

    ki.finetune(
        model, setting.task.original, [images], steps=steps, lr=how.lr, batch_size=how.batch, max_images=len(images), validation_fraction=VALIDATION_FRACTION,
        transform=transform, seed=setting.seed, progress=False,
    )  # fmt: skip


def train_with_labels(setting: MethodContext, model: nn.Module, lr: float = CONTROL_LR) -> None:
    """What a user would do: SGD with momentum in training mode, a warm-up and a cosine."""
    images, labels = setting.task.labeled
    generator, total = torch.Generator().manual_seed(setting.seed), TRAINING_EPOCHS * len(images) // TRAINING_BATCH_SIZE
    order, schedule = (
        shuffled_epochs(torch.arange(len(images)), TRAINING_BATCH_SIZE * total, setting.seed),
        WeightSchedule(warmup=total // 20, total=total + 1),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=CONTROL_DECAY, nesterov=True)
    model.train()
    with torch.enable_grad():
        for step in range(total):
            which = order[TRAINING_BATCH_SIZE * step : TRAINING_BATCH_SIZE * (step + 1)]
            optimizer.param_groups[0]["lr"] = lr * schedule(step + 1)
            loss = F.cross_entropy(model(augment(images[which], generator)), labels[which])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    model.eval()


def augment(
    images: Tensor, generator: torch.Generator, margin: str = "constant", padding: int = CROP_PADDING
) -> Tensor:
    """Random crops of the images with a margin of the mean color, or as they are mirrored there; half of them flipped."""
    return random_crops_and_flips(F.pad(images, (padding,) * 4, mode=margin), images.shape[-1], generator)


FINETUNINGS: dict[str, Callable[[MethodContext, nn.Module], None]] = {
    "tuned": finetune,
    "tuned, four times": finetune_longer,
    "blocks, tuned": finetune,
    "5 epochs, cross-entropy": train_with_labels,
    "5 epochs, ki.finetune": finetune_on_training_images,
}
