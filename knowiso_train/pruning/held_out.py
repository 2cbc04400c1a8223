"""The images that choose: how far a network that is tuned is from its original where it was not tuned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knowiso_train.errors import InputTypeError, NonFiniteError, ShapeError
from knowiso_train.features import batch_size, select
from knowiso_train.losses import kd_loss
from knowiso_train.pruning.targets import PER_PASS, Targets, distance, tapped
from knowiso_train.pruning.tune_report import Check

DIGITS = 6
LABEL_KEYS = ("label", "labels", "target", "targets")


class HeldOut:
    """Compares a network with its original on images that do not train it.

    Args:
        model: the network; the caller sees to its mode.
        targets: what the original gives.
        index: of the images.
        labels: of all images of the targets; None where the original alone is the measure.

    Raises:
        ShapeError: outputs of different shapes.

    Example:
        >>> from knowiso_train.pruning.calibration import Calibration
        >>> model, images = nn.Linear(3, 2), Calibration([torch.randn(8, 3)])
        >>> HeldOut(model, Targets(model, [], images, images.all()), torch.arange(4)).check(0).agreement
        1.0
    """

    def __init__(self, model: nn.Module, targets: Targets, index: Tensor, labels: Tensor | None = None) -> None:
        self.model, self.targets, self.index, self.labels = model, targets, index, labels
        self.wanted = torch.cat([targets.of(part).output for part in torch.split(index, PER_PASS)])

    @torch.no_grad()
    def check(self, step: int) -> Check:
        """How it is now.

        Raises:
            NonFiniteError: NaN or Inf in the network's output.
        """
        images, batch = self.targets.images, self.targets.batch
        outputs, apart = [], 0.0
        for part in torch.split(self.index, PER_PASS):
            found, wanted = tapped(images, self.model, self.targets.layers, select(batch, part)), self.targets.of(part)
            outputs.append(found.output)
            apart += float(distance(found, wanted, self.targets)) * len(part) / len(self.index)
        made = torch.cat(outputs)
        features = round(apart, DIGITS) if self.targets.layers else None
        if made.shape != self.wanted.shape:
            raise ShapeError(f"the pruned network gives {tuple(made.shape)}, the original {tuple(self.wanted.shape)} for the same images")
        if not bool(made.isfinite().all()):
            raise NonFiniteError(f"NaN or Inf in the pruned network's output after {step} steps")
        if made.ndim != 2 or made.shape[1] < 2:
            return Check(step, round(float((made - self.wanted).square().mean()) / self.targets.output_scale, DIGITS), None, None, features)
        divergence = max(0.0, round(float(kd_loss(made, self.wanted, 1.0)), DIGITS))  # what is less is rounding, and no reason to choose
        agreement = float((made.argmax(1) == self.wanted.argmax(1)).float().mean())
        if self.labels is None:
            return Check(step, divergence, agreement, None, features)
        return Check(step, divergence, agreement, float(F.cross_entropy(made, self.labels[self.index.to(self.labels.device)])), features)


def labels_of(batch: Any) -> Tensor:
    """The labels of a batch: the second of a tuple or list, or what a mapping holds at "label", "labels", "target" or "targets".

    Raises:
        InputTypeError: none there, or not one integer for each image.

    Example:
        >>> labels_of([torch.zeros(3, 4), torch.tensor([2, 0, 1])])
        tensor([2, 0, 1])
    """
    found = None
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in LABEL_KEYS if key in batch), None)
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        found = batch[1]
    if not isinstance(found, Tensor) or found.is_floating_point() or found.shape != (batch_size(batch),):
        raise InputTypeError(
            f"labels=True needs one integer for each image: (images, labels), or a mapping with one of {LABEL_KEYS}; got {type(batch).__name__} "
            f"with {'none' if found is None else getattr(found, 'shape', type(found).__name__)}"
        )
    return found
