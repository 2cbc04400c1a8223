"""Short trainings that may follow `ki.prune`, without labels and with them; for bench_prune.py, ResNet-56 at the screened ratio.

tuned                    `ki.tune` on the images that pruned, 800 updates of 32, crops with mirrored margins, flips, mixed patches: without labels
blocks, tuned            the same, from blocks that were tuned as a whole (`block_steps`)
5 epochs, cross-entropy  the control: SGD on the 15,000 labelled images at hand, crops and flips
5 epochs, ki.tune        as many passes over these images towards the original's blocks, in updates of 64, augmented as for "tuned": no labels

The original was trained on these images and knows them by heart. Rates were chosen on the select images of seed 0: `ki.tune`'s from 0.005, 0.009 and
0.018 in short runs, the control's from 0.003 and 0.01 in full, and from 0.03 too in one epoch. Labels and logits in `ki.tune` made it worse there.
Updates of 32 images at 0.0065 were better there than half as many of 64 at 0.009; in five epochs 64 at 0.018 (32 at 0.0065 and 64 at 0.009 were tried
too) had no more right on the select images than the first of these, but agreed more often with the original.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from crops import crops_and_flips
from prune_methods import Setting
from refine_data import shuffled
from torch import Tensor, nn

import knowiso_train as ki
from knowiso_train.losses import WeightSchedule
from knowiso_train.pruning import mix_patches

EPOCHS, BATCH, PADDING = 5, 64, 4
STEPS, LR, SMALL, HELD_OUT = 800, 6.5e-3, 32, 0.0625
LONG_LR = 0.018
CONTROL_LR, CONTROL_DECAY = 0.003, 5e-4


def tuned(setting: Setting, model: nn.Module) -> None:
    _towards_original(setting, model, setting.data.images, STEPS, SMALL, LR)


def with_original(setting: Setting, model: nn.Module) -> None:
    images, _ = setting.task.labelled
    _towards_original(setting, model, images, EPOCHS * len(images) // BATCH, BATCH, LONG_LR)


def _towards_original(setting: Setting, model: nn.Module, images: Tensor, steps: int, batch_size: int, lr: float) -> None:
    generator = torch.Generator().manual_seed(setting.seed)
    ki.tune(
        model, setting.task.original, [images], steps=steps, lr=lr, batch_size=batch_size, max_images=len(images), held_out=HELD_OUT,
        transform=lambda x: mix_patches(changed(x, generator, "reflect")), seed=setting.seed, progress=False,
    )  # fmt: skip


def with_labels(setting: Setting, model: nn.Module, lr: float = CONTROL_LR) -> None:
    """What a user would do: SGD with momentum in training mode, a warm-up and a cosine."""
    images, labels = setting.task.labelled
    generator, total = torch.Generator().manual_seed(setting.seed), EPOCHS * len(images) // BATCH
    order, schedule = shuffled(torch.arange(len(images)), BATCH * total, setting.seed), WeightSchedule(warmup=total // 20, total=total + 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=CONTROL_DECAY, nesterov=True)
    model.train()
    with torch.enable_grad():
        for step in range(total):
            which = order[BATCH * step : BATCH * (step + 1)]
            optimizer.param_groups[0]["lr"] = lr * schedule(step + 1)
            loss = F.cross_entropy(model(changed(images[which], generator)), labels[which])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    model.eval()


def changed(images: Tensor, generator: torch.Generator, margin: str = "constant") -> Tensor:
    """Random crops of the images with a margin of the mean colour, or as they are mirrored there; half of them flipped."""
    return crops_and_flips(F.pad(images, (PADDING,) * 4, mode=margin), images.shape[-1], generator)


AFTERWARDS: dict[str, Callable[[Setting, nn.Module], None]] = {
    "tuned": tuned,
    "blocks, tuned": tuned,
    "5 epochs, cross-entropy": with_labels,
    "5 epochs, ki.tune": with_original,
}
