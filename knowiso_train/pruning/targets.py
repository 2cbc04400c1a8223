"""What the original gives for the images of a short tuning: features and output, computed once where they fit in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from knowiso_train.errors import InputTypeError, NonFiniteError
from knowiso_train.features import FeatureTaps, select
from knowiso_train.pruning.calibration import Calibration

PER_PASS = 128  # images
SMALLEST = 1e-12


@dataclass(frozen=True)
class Given:
    """Features by layer, and the output, of one batch."""

    features: dict[str, Tensor]
    output: Tensor


class Targets:
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
        >>> targets = Targets(nn.Sequential(nn.Linear(3, 2)), ["0"], images, images.all())
        >>> given = targets.of(torch.tensor([4, 1]))
        >>> torch.equal(given.features["0"], given.output), targets.kept
        (True, True)
    """

    def __init__(self, original: nn.Module, layers: Sequence[str], images: Calibration, batch: Any, memory: int = 2**30) -> None:
        self.images, self.batch, self.original, self.layers = images, batch, original, list(layers)
        first = self._run(torch.arange(min(PER_PASS, images.count)))
        self.scales = {name: spread(name, feature) for name, feature in first.features.items()}
        self.output_scale = spread("the output", first.output)
        size = sum(value[0].numel() * value.element_size() for value in (*first.features.values(), first.output))
        self.kept = size * images.count <= memory
        self._store: Given | None = None
        if self.kept:
            parts = [self._run(index) for index in torch.split(torch.arange(images.count), PER_PASS)]
            features = {name: torch.cat([part.features[name] for part in parts]) for name in self.layers}
            self._store = Given(features, torch.cat([part.output for part in parts]))

    def of(self, index: Tensor, seen: Any = None) -> Given:
        """For the images with these indices, or for `seen`, what became of them by augmentation."""
        if seen is None and self._store is not None:
            store, at = self._store, index.to(self._store.output.device, non_blocking=True)
            return Given({name: value[at.to(value.device)] for name, value in store.features.items()}, store.output[at])
        return self._run(index, seen)

    @torch.no_grad()
    def _run(self, index: Tensor, seen: Any = None) -> Given:
        return tapped(self.images, self.original, self.layers, select(self.batch, index) if seen is None else seen)


def tapped(images: Calibration, model: nn.Module, layers: Sequence[str], batch: Any) -> Given:
    """What a network emits for a batch, at some layers and at its end.

    Raises:
        InputTypeError: an output that is not one tensor.

    Example:
        >>> batch = torch.ones(1, 2, 2)
        >>> tapped(Calibration([batch]), nn.Sequential(nn.ReLU(), nn.Flatten()), ["0"], batch).output.shape
        torch.Size([1, 4])
    """
    if not layers:
        return Given({}, _tensor(images.run(model, batch)))
    with FeatureTaps(model, list(layers)) as taps:
        output = _tensor(images.run(model, batch))
        return Given(taps.collect(), output)


def distance(made: Given, given: Given, targets: Targets) -> Tensor:
    """Scalar: mean over the layers of the squared distance of two networks' features, relative to the original's variance; 0 without layers."""
    terms = [(made.features[name] - feature).square().mean() / targets.scales[name] for name, feature in given.features.items()]
    return torch.stack(terms).mean() if terms else made.output.new_zeros(())


def spread(name: str, values: Tensor) -> float:
    """Mean over all entries of their variance over the images, by which squared distances are divided.

    Raises:
        NonFiniteError: NaN or Inf.

    Example:
        >>> spread("layer", torch.tensor([[0.0, 5.0], [2.0, 5.0]]))  # variances 1 and 0
        0.5
    """
    centred = values.detach().float()
    found = float((centred - centred.mean(0)).square().mean())
    if not torch.isfinite(torch.tensor(found)):
        raise NonFiniteError(f"NaN or Inf in the original, in what {name!r} emits")
    return max(found, SMALLEST)


def _tensor(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise InputTypeError(f"expected a network that gives one tensor, got {type(output).__name__}; pass forward= that picks it")
    return output
