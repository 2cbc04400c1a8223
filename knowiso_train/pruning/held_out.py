"""The images that choose: how far a network that is tuned is from its original where it was not tuned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knowiso_train.errors import InputTypeError, NonFiniteError, OptionError, ShapeError
from knowiso_train.features import batch_size, select
from knowiso_train.pruning.objective import Objective, are_logits, divergence
from knowiso_train.pruning.targets import PER_PASS, Targets, distance, tapped
from knowiso_train.pruning.tune_report import Check

DIGITS = 6
WHERE = ("Look at the network and the images", "Try a smaller lr")
LABEL_KEYS = ("label", "labels", "target", "targets")


class HeldOut:
    """Compares a network with its original on images that do not train it.

    Args:
        model: the network; the caller sees to its mode.
        targets: what the original gives.
        index: of the images.
        objective: what chooses.
        labels: of all images of the targets; None where the original alone is the measure.

    Raises:
        OptionError: labels, and outputs that are no logits.

    Example:
        >>> from knowiso_train.pruning.calibration import Calibration
        >>> model, images = nn.Linear(3, 2), Calibration([torch.randn(8, 3)])
        >>> HeldOut(model, Targets(model, [], images, images.all()), torch.arange(4), Objective(logits=1.0)).check(0).agreement
        1.0
    """

    def __init__(self, model: nn.Module, targets: Targets, index: Tensor, objective: Objective, labels: Tensor | None = None) -> None:
        self.model, self.targets, self.index, self.objective = model, targets, index, objective
        self.wanted = torch.cat([targets.of(part).output for part in torch.split(index, PER_PASS)])
        if labels is not None and not are_logits(self.wanted):
            raise OptionError(f"label_weight: labels need logits (images, classes), and the network gives {tuple(self.wanted.shape)}; leave it at 0")
        self.truth = None if labels is None else labels[index.to(labels.device)].to(self.wanted.device)

    @torch.no_grad()
    def check(self, step: int) -> Check:
        """How it is now.

        Raises:
            ShapeError: outputs of different shapes.
            NonFiniteError: NaN or Inf in the network's output.
        """
        images, batch = self.targets.images, self.targets.batch
        outputs: list[Tensor] = []
        apart = torch.zeros(())
        for part in torch.split(self.index, PER_PASS):
            found, wanted = tapped(images, self.model, self.targets.layers, select(batch, part)), self.targets.of(part)
            outputs.append(found.output)
            apart = apart + distance(found, wanted, self.targets).cpu() * len(part) / len(self.index)
        made = torch.cat(outputs)
        if made.shape != self.wanted.shape:
            raise ShapeError(f"the pruned network gives {tuple(made.shape)}, the original {tuple(self.wanted.shape)} for the same images")
        if not bool(made.isfinite().all()):
            raise NonFiniteError(f"NaN or Inf in the pruned network's output after {step} steps; the weights are as they were. " + WHERE[step > 0])
        logits, scale = are_logits(made), self.targets.output_scale
        return Check(
            step,
            divergence=_rounded(divergence(made, self.wanted, scale)),
            agreement=float((made.argmax(1) == self.wanted.argmax(1)).float().mean()) if logits else None,
            cross_entropy=None if self.truth is None else float(F.cross_entropy(made, self.truth)),
            features=_rounded(apart) if self.targets.layers else None,
            objective=_rounded(self.objective(apart.to(made.device), made, self.wanted, scale, self.truth)),
        )


def _rounded(value: Tensor) -> float:
    """What is less is rounding, and no reason to choose."""
    return max(0.0, round(float(value), DIGITS))


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
            f"label_weight needs one integer for each image: (images, labels), or a mapping with one of {LABEL_KEYS}; got {type(batch).__name__} "
            f"with {'none' if found is None else getattr(found, 'shape', type(found).__name__)}"
        )
    return found
