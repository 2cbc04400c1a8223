"""Objective, reference outputs and validation of fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knowiso_train.distillation.kd import kd_loss
from knowiso_train.errors import InputTypeError, NonFiniteError, OptionError, ShapeError
from knowiso_train.features.hooks import FeatureTaps
from knowiso_train.pruning.calibration import Calibration
from knowiso_train.pruning.report import ValidationPoint
from knowiso_train.utils.batch import batch_size, index_batch

REFERENCE_BATCH_SIZE = 128  # images
MIN_VARIANCE = 1e-12

REPORTED_DIGITS = 6
NONFINITE_HINTS = ("Look at the network and the images", "Try a smaller lr")
LABEL_KEYS = ("label", "labels", "target", "targets")


@dataclass(frozen=True)
class ModelOutputs:
    """Features by layer, and the output, of one batch."""

    features: dict[str, Tensor]
    output: Tensor


class ReferenceCache:
    """The original's features and output for any of some images.

    Args:
        original: the network; in eval mode while this is used.
        layers: whose outputs are wanted.
        images: to look at.
        batch: these images as one batch.
        memory: bytes that may be kept; above them the original is run again each time.

    Raises:
        InputTypeError: an output that is not one tensor.
        NonFiniteError: NaN or Inf, with the layer's name.

    Example:
        >>> images = Calibration([torch.randn(8, 3)])
        >>> targets = ReferenceCache(nn.Sequential(nn.Linear(3, 2)), ["0"], images, images.concatenate())
        >>> given = targets.of(torch.tensor([4, 1]))
        >>> torch.equal(given.features["0"], given.output), targets.kept
        (True, True)
    """

    def __init__(
        self, original: nn.Module, layers: Sequence[str], images: Calibration, batch: Any, memory: int = 2**30
    ) -> None:
        self.images, self.batch, self.original, self.layers = images, batch, original, list(layers)
        first = self._run(torch.arange(min(REFERENCE_BATCH_SIZE, images.count)))
        self.scales = {name: feature_variance(name, feature) for name, feature in first.features.items()}
        self.output_scale = feature_variance("the output", first.output)
        size = sum(value[0].numel() * value.element_size() for value in (*first.features.values(), first.output))
        self.kept = size * images.count <= memory
        self._store: ModelOutputs | None = None
        if self.kept:
            parts = [self._run(index) for index in torch.split(torch.arange(images.count), REFERENCE_BATCH_SIZE)]
            features = {name: torch.cat([part.features[name] for part in parts]) for name in self.layers}
            self._store = ModelOutputs(features, torch.cat([part.output for part in parts]))

    def of(self, index: Tensor, seen: Any = None) -> ModelOutputs:
        """For the images with these indices, or for `seen`, what became of them by augmentation."""
        if seen is None and self._store is not None:
            store, at = self._store, index.to(self._store.output.device, non_blocking=True)
            return ModelOutputs(
                {name: value[at.to(value.device)] for name, value in store.features.items()}, store.output[at]
            )
        return self._run(index, seen)

    @torch.no_grad()
    def _run(self, index: Tensor, seen: Any = None) -> ModelOutputs:
        return forward_with_features(
            self.images, self.original, self.layers, index_batch(self.batch, index) if seen is None else seen
        )


def forward_with_features(images: Calibration, model: nn.Module, layers: Sequence[str], batch: Any) -> ModelOutputs:
    """What a network emits for a batch, at some layers and at its end.

    Raises:
        InputTypeError: an output that is not one tensor.

    Example:
        >>> batch = torch.ones(1, 2, 2)
        >>> forward_with_features(Calibration([batch]), nn.Sequential(nn.ReLU(), nn.Flatten()), ["0"], batch).output.shape
        torch.Size([1, 4])
    """
    if not layers:
        return ModelOutputs({}, _tensor(images.forward(model, batch)))
    with FeatureTaps(model, list(layers)) as taps:
        output = _tensor(images.forward(model, batch))
        return ModelOutputs(taps.collect(), output)


def distance(made: ModelOutputs, given: ModelOutputs, targets: ReferenceCache) -> Tensor:
    """Scalar: mean over the layers of the squared distance of two networks' features, relative to the original's variance; 0 without layers."""
    terms = [
        (made.features[name] - feature).square().mean() / targets.scales[name]
        for name, feature in given.features.items()
    ]
    return torch.stack(terms).mean() if terms else made.output.new_zeros(())


def feature_variance(name: str, values: Tensor) -> float:
    """Mean over all entries of their variance over the images, by which squared distances are divided.

    Raises:
        NonFiniteError: NaN or Inf.

    Example:
        >>> feature_variance("layer", torch.tensor([[0.0, 5.0], [2.0, 5.0]]))  # variances 1 and 0
        0.5
    """
    centered = values.detach().float()
    found = float((centered - centered.mean(0)).square().mean())
    if not torch.isfinite(torch.tensor(found)):
        raise NonFiniteError(f"NaN or Inf in the original, in what {name!r} emits")
    return max(found, MIN_VARIANCE)


def _tensor(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise InputTypeError(
            f"expected a network that gives one tensor, got {type(output).__name__}; pass forward= that picks it"
        )
    return output


@dataclass(frozen=True)
class Objective:
    """A weighted sum of the features' distance, the logits' divergence and the cross-entropy; divergences of weight 0 are not computed.

    Attributes:
        features: weight of `distance`.
        logits: weight of `divergence`.
        labels: weight of the cross-entropy with the labels.
        temperature: of the logits' divergence.

    Example:
        >>> import torch
        >>> objective, logits = Objective(labels=2.0), torch.zeros(1, 2)
        >>> round(float(objective(torch.tensor(0.5), logits, logits, scale=1.0, truth=torch.tensor([1]))), 3)  # 0.5 + 2 ln 2
        1.886
    """

    features: float = 1.0
    logits: float = 0.0
    labels: float = 0.0
    temperature: float = 1.0

    def __call__(self, apart: Tensor, made: Tensor, given: Tensor, scale: float, truth: Tensor | None = None) -> Tensor:
        """Scalar, the mean over the images.

        Args:
            apart: the features' `distance`.
            made: (N, …) outputs of the network that is trained.
            given: the original's for the same images.
            scale: of `divergence`.
            truth: (N,) labels; None where they have no weight.
        """
        total = self.features * apart
        if self.logits:
            total = total + self.logits * divergence(made, given, scale, self.temperature)
        if self.labels and truth is not None:
            total = total + self.labels * F.cross_entropy(made, truth.to(made.device))
        return total


def divergence(made: Tensor, given: Tensor, scale: float, temperature: float = 1.0) -> Tensor:
    """KL of logits (N, classes) at a temperature; of other outputs their squared distance, divided by `scale`.

    Example:
        >>> import torch
        >>> float(divergence(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), 1.0))
        0.0
    """
    return kd_loss(made, given, temperature) if are_logits(made) else (made - given).square().mean() / scale


def are_logits(output: Tensor) -> bool:
    """Whether it is (N, classes)."""
    return output.ndim == 2 and output.shape[1] > 1


class Validator:
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
        >>> Validator(model, ReferenceCache(model, [], images, images.concatenate()), torch.arange(4), Objective(logits=1.0)).check(0).agreement
        1.0
    """

    def __init__(
        self,
        model: nn.Module,
        targets: ReferenceCache,
        index: Tensor,
        objective: Objective,
        labels: Tensor | None = None,
    ) -> None:
        self.model, self.targets, self.index, self.objective = model, targets, index, objective
        self.wanted = torch.cat([targets.of(part).output for part in torch.split(index, REFERENCE_BATCH_SIZE)])
        if labels is not None and not are_logits(self.wanted):
            raise OptionError(
                f"label_weight: labels need logits (images, classes), and the network gives {tuple(self.wanted.shape)}; leave it at 0"
            )
        self.truth = None if labels is None else labels[index.to(labels.device)].to(self.wanted.device)

    @torch.no_grad()
    def check(self, step: int) -> ValidationPoint:
        """How it is now.

        Raises:
            ShapeError: outputs of different shapes.
            NonFiniteError: NaN or Inf in the network's output.
        """
        images, batch = self.targets.images, self.targets.batch
        outputs: list[Tensor] = []
        apart = torch.zeros(())
        for part in torch.split(self.index, REFERENCE_BATCH_SIZE):
            found, wanted = (
                forward_with_features(images, self.model, self.targets.layers, index_batch(batch, part)),
                self.targets.of(part),
            )
            outputs.append(found.output)
            apart = apart + distance(found, wanted, self.targets).cpu() * len(part) / len(self.index)
        made = torch.cat(outputs)
        if made.shape != self.wanted.shape:
            raise ShapeError(
                f"the pruned network gives {tuple(made.shape)}, the original {tuple(self.wanted.shape)} for the same images"
            )
        if not bool(made.isfinite().all()):
            raise NonFiniteError(
                f"NaN or Inf in the pruned network's output after {step} steps; the weights are as they were. "
                + NONFINITE_HINTS[step > 0]
            )
        logits, scale = are_logits(made), self.targets.output_scale
        return ValidationPoint(
            step,
            divergence=_rounded(divergence(made, self.wanted, scale)),
            agreement=float((made.argmax(1) == self.wanted.argmax(1)).float().mean()) if logits else None,
            cross_entropy=None if self.truth is None else float(F.cross_entropy(made, self.truth)),
            features=_rounded(apart) if self.targets.layers else None,
            objective=_rounded(self.objective(apart.to(made.device), made, self.wanted, scale, self.truth)),
        )


def _rounded(value: Tensor) -> float:
    """What is less is rounding, and no reason to choose."""
    return max(0.0, round(float(value), REPORTED_DIGITS))


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
