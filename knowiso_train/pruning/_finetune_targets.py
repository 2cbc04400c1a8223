"""Objective, reference outputs and validation of fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knowiso_train.distillation.kd import kd_loss
from knowiso_train.errors import InputTypeError, NonFiniteError, OptionError, ShapeError
from knowiso_train.features.hooks import FeatureTaps
from knowiso_train.pruning._report import ValidationPoint
from knowiso_train.pruning.calibration import Calibration
from knowiso_train.utils.batch import index_batch, tensor_leaves

# Images of one forward pass without gradients
REFERENCE_BATCH_SIZE = 128
# Floor of a feature's variance, which divides squared distances
MIN_FEATURE_VARIANCE = 1e-12
# Decimals of reported values; smaller differences are rounding and must not select a checkpoint
REPORTED_DIGITS = 6


@dataclass(frozen=True)
class ModelOutputs:
    """Features by layer, and the output, of one batch."""

    features: dict[str, Tensor]
    output: Tensor


class ReferenceCache:
    """Features and outputs of the original model for any of the calibration images.

    Args:
        original: Model before pruning; in eval mode while the cache is used.
        layers: Names of the compared layers.
        images: Calibration images.
        batch: The same images as one batch.
        memory_bytes: Largest size of the cached tensors. Above it the original runs again for each batch.

    Raises:
        InputTypeError: The output is not one tensor.
        NonFiniteError: NaN or Inf in a feature; the message names the layer.

    Examples:
        >>> images = Calibration([torch.randn(8, 3)])
        >>> references = ReferenceCache(nn.Sequential(nn.Linear(3, 2)), ["0"], images, images.concatenate())
        >>> outputs = references.get(torch.tensor([4, 1]))
        >>> torch.equal(outputs.features["0"], outputs.output), references.is_cached
        (True, True)
    """

    def __init__(
        self, original: nn.Module, layers: Sequence[str], images: Calibration, batch: Any, memory_bytes: int = 2**30
    ) -> None:
        self.images, self.batch, self.original, self.layers = images, batch, original, list(layers)
        first = self._forward(self.select(torch.arange(min(REFERENCE_BATCH_SIZE, images.count))))
        self.variances = {name: feature_variance(name, feature) for name, feature in first.features.items()}
        self.output_variance = feature_variance("the output", first.output)
        image_bytes = sum(value[0].numel() * value.element_size() for value in (*first.features.values(), first.output))
        self.is_cached = image_bytes * images.count <= memory_bytes
        self._cache: ModelOutputs | None = self._forward_all() if self.is_cached else None

    def select(self, index: Tensor) -> Any:
        """Return the images with these indices, as one batch."""
        return index_batch(self.batch, index)

    def get(self, index: Tensor, augmented: Any = None) -> ModelOutputs:
        """Return the original's outputs.

        Args:
            index: Indices of images.
            augmented: Augmented batch of these images. Default: the images themselves.
        """
        if augmented is not None:
            return self._forward(augmented)
        if self._cache is None:
            return self._forward(self.select(index))
        index = index.to(self._cache.output.device, non_blocking=True)
        features = {name: value[index.to(value.device)] for name, value in self._cache.features.items()}
        return ModelOutputs(features, self._cache.output[index])

    def _forward_all(self) -> ModelOutputs:
        parts = [
            self._forward(self.select(index))
            for index in torch.split(torch.arange(self.images.count), REFERENCE_BATCH_SIZE)
        ]
        features = {name: torch.cat([part.features[name] for part in parts]) for name in self.layers}
        return ModelOutputs(features, torch.cat([part.output for part in parts]))

    @torch.no_grad()
    def _forward(self, batch: Any) -> ModelOutputs:
        return forward_with_features(self.images, self.original, self.layers, batch)


def forward_with_features(images: Calibration, model: nn.Module, layers: Sequence[str], batch: Any) -> ModelOutputs:
    """Return the features of some layers and the output of a model for a batch.

    Raises:
        InputTypeError: The output is not one tensor.

    Examples:
        >>> batch = torch.ones(1, 2, 2)
        >>> model = nn.Sequential(nn.ReLU(), nn.Flatten())
        >>> forward_with_features(Calibration([batch]), model, ["0"], batch).output.shape
        torch.Size([1, 4])
    """
    if not layers:
        return ModelOutputs({}, _check_tensor(images.forward(model, batch)))
    with FeatureTaps(model, list(layers)) as taps:
        output = _check_tensor(images.forward(model, batch))
        return ModelOutputs(taps.collect(), output)


def _check_tensor(output: Any) -> Tensor:
    tensors = tensor_leaves(output)
    if len(tensors) != 1:
        raise InputTypeError(
            f"expected a model whose output holds one tensor, got {type(output).__name__} with {len(tensors)}. Pass "
            "forward= that selects it"
        )
    return tensors[0]


def feature_distance(outputs: ModelOutputs, reference: ModelOutputs, variances: Mapping[str, float]) -> Tensor:
    """Return the mean over the layers of ‖x - x_ref‖² / Var(x_ref), a scalar; 0 without layers.

    Args:
        outputs: Features of the pruned model.
        reference: Features of the original for the same images.
        variances: Variance of the original's features by layer, from `feature_variance`.
    """
    terms = [
        (outputs.features[name] - feature).square().mean() / variances[name]
        for name, feature in reference.features.items()
    ]
    return torch.stack(terms).mean() if terms else outputs.output.new_zeros(())


def feature_variance(name: str, values: Tensor) -> float:
    """Return the variance over the images, averaged over all other axes.

    Raises:
        NonFiniteError: NaN or Inf.

    Examples:
        >>> feature_variance("layer", torch.tensor([[0.0, 5.0], [2.0, 5.0]]))  # variances 1 and 0
        0.5
    """
    centered = values.detach().float()
    variance = float((centered - centered.mean(0)).square().mean())
    if not math.isfinite(variance):
        raise NonFiniteError(f"NaN or Inf in the original model, in the output of {name!r}")
    return max(variance, MIN_FEATURE_VARIANCE)


@dataclass(frozen=True)
class Objective:
    """Weighted sum of feature distance, output divergence and cross-entropy; a divergence of weight 0 is not computed.

    Attributes:
        feature_weight: Weight of `feature_distance`.
        logit_weight: Weight of `output_divergence`.
        label_weight: Weight of the cross-entropy with the labels.
        temperature: Temperature of the divergence of logits.

    Examples:
        >>> objective, logits = Objective(label_weight=2.0), torch.zeros(1, 2)
        >>> value = objective(torch.tensor(0.5), logits, logits, output_variance=1.0, labels=torch.tensor([1]))
        >>> round(float(value), 3)  # 0.5 + 2 ln 2
        1.886
    """

    feature_weight: float = 1.0
    logit_weight: float = 0.0
    label_weight: float = 0.0
    temperature: float = 1.0

    def __call__(
        self, distance: Tensor, output: Tensor, reference: Tensor, output_variance: float, labels: Tensor | None = None
    ) -> Tensor:
        """Return the objective, a scalar, averaged over the images.

        Args:
            distance: Value of `feature_distance`.
            output: (N, …) outputs of the trained model.
            reference: (N, …) outputs of the original for the same images.
            output_variance: Divisor of squared distances, for outputs that are not logits.
            labels: (N,) class indices. Default: no cross-entropy.
        """
        total = self.feature_weight * distance
        if self.logit_weight:
            total = total + self.logit_weight * output_divergence(output, reference, output_variance, self.temperature)
        if self.label_weight and labels is not None:
            total = total + self.label_weight * F.cross_entropy(output, labels.to(output.device))
        return total


def output_divergence(output: Tensor, reference: Tensor, variance: float, temperature: float = 1.0) -> Tensor:
    """Return the KL divergence of logits (N, classes), or the relative squared distance of other outputs.

    Args:
        output: (N, …) outputs of the trained model.
        reference: (N, …) outputs of the original.
        variance: Divisor of the squared distance.
        temperature: Temperature of the softmax.

    Examples:
        >>> float(output_divergence(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), 1.0))
        0.0
    """
    if are_logits(output):
        return kd_loss(output, reference, temperature)
    return (output - reference).square().mean() / variance


def are_logits(output: Tensor) -> bool:
    """Return True for an output of shape (N, classes) with two classes or more."""
    return output.ndim == 2 and output.shape[1] > 1


class Validator:
    """Comparison of a model with its original on held-out images.

    Args:
        model: Trained model; the caller sets its mode.
        references: Outputs of the original.
        index: Indices of the held-out images.
        objective: Objective that selects the checkpoint.
        labels: Class indices of all images. Default: no cross-entropy.

    Raises:
        OptionError: Labels are given and the outputs are not logits.
        ShapeError: A label without a logit.

    Examples:
        >>> model, images = nn.Linear(3, 2), Calibration([torch.randn(8, 3)])
        >>> references = ReferenceCache(model, [], images, images.concatenate())
        >>> Validator(model, references, torch.arange(4), Objective(logit_weight=1.0)).evaluate(0).agreement
        1.0
    """

    def __init__(
        self,
        model: nn.Module,
        references: ReferenceCache,
        index: Tensor,
        objective: Objective,
        labels: Tensor | None = None,
    ) -> None:
        self.model, self.references, self.index, self.objective = model, references, index, objective
        self.expected = torch.cat([references.get(part).output for part in self._parts()])
        if labels is not None and not are_logits(self.expected):
            raise OptionError(
                f"label_weight needs logits (images, classes), and the output has shape {tuple(self.expected.shape)}. "
                "Leave it at 0"
            )
        if labels is not None and int(labels.max()) >= self.expected.shape[1]:
            raise ShapeError(
                f"label_weight: expected labels below {self.expected.shape[1]}, the number of logits, got "
                f"{int(labels.max())}. Map the labels to the classes of the model"
            )
        self.labels = None if labels is None else labels[index.to(labels.device)].to(self.expected.device)

    def _parts(self) -> Iterator[Tensor]:
        yield from torch.split(self.index, REFERENCE_BATCH_SIZE)

    @torch.no_grad()
    def evaluate(self, step: int) -> ValidationPoint:
        """Compare the model in its present state with the original.

        Raises:
            ShapeError: The outputs have different shapes.
            NonFiniteError: NaN or Inf in the model's output.
        """
        output, distance = self._forward()
        if output.shape != self.expected.shape:
            raise ShapeError(
                f"the output of the pruned model has shape {tuple(output.shape)}, and the original's has shape "
                f"{tuple(self.expected.shape)} for the same images. Expected equal shapes"
            )
        if not bool(output.isfinite().all()):
            advice = "try a smaller lr" if step else "check its weights"
            raise NonFiniteError(
                f"NaN or Inf in the output of the pruned model after {step} steps. The model was not modified; {advice}"
            )
        variance, expected = self.references.output_variance, self.expected
        objective = self.objective(distance.to(output.device), output, expected, variance, self.labels)
        agreement = (output.argmax(1) == expected.argmax(1)).float().mean() if are_logits(output) else None
        return ValidationPoint(
            step,
            divergence=_rounded(output_divergence(output, expected, variance)),
            agreement=None if agreement is None else float(agreement),
            cross_entropy=None if self.labels is None else float(F.cross_entropy(output, self.labels)),
            feature_distance=_rounded(distance) if self.references.layers else None,
            objective=_rounded(objective),
        )

    def _forward(self) -> tuple[Tensor, Tensor]:
        """Return the outputs (N, …) for the held-out images, and their mean feature distance."""
        references, parts = self.references, []
        distance = torch.zeros(())
        for index in self._parts():
            outputs = forward_with_features(references.images, self.model, references.layers, references.select(index))
            part = feature_distance(outputs, references.get(index), references.variances)
            distance = distance + part.cpu() * len(index) / len(self.index)
            parts.append(outputs.output)
        return torch.cat(parts), distance


def _rounded(value: Tensor) -> float:
    return max(0.0, round(float(value), REPORTED_DIGITS))


def shuffled_batches(index: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield batches of indices forever, each epoch in a new order and without its incomplete last batch.

    Args:
        index: (N,) indices.
        size: Indices of a batch, at most N.
        generator: Random generator of the order.

    Examples:
        >>> batches = shuffled_batches(torch.arange(5), 2, torch.Generator())
        >>> first, second, third = (set(next(batches).tolist()) for _ in range(3))
        >>> len(first | second), len(third)
        (4, 2)
    """
    while True:
        order = index[torch.randperm(len(index), generator=generator)]
        yield from torch.split(order, size)[: len(index) // size]
