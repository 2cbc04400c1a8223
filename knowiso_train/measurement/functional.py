"""Output of the explained network when a part of a feature replaces the feature."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knowiso_train.errors import DataError, NonFiniteError, ShapeError
from knowiso_train.features.calls import find_logits
from knowiso_train.features.extractor import Extractor
from knowiso_train.features.substitution import Substitution
from knowiso_train.utils.batch import LABEL_KEYS
from knowiso_train.utils.distributed import ProcessGroup

AUTO_LABELS = "auto"
# Positions that segmentation masks leave out, as do negative labels
IGNORED_LABEL = 255
NUM_SUMS = 6


@dataclass(frozen=True)
class FunctionalShare:
    """Output of the explained network with a part of the feature in its place, measured on the report images.

    Attributes:
        agreement: Share of images (positions of dense outputs) with the top-1 class of the network's own output.
        agreement_error: Standard error of `agreement` over images.
        kl: KL divergence of the output from the network's own, KL(own ‖ replaced), in nats; mean over images.
        top1: Share of the labeled images (positions) with their label as the top-1 class. None: no labels.
    """

    agreement: float
    agreement_error: float
    kl: float
    top1: float | None


class ExplainedNetwork:
    """Network whose feature is explained: its features, its own output, and its output with other features.

    Attributes:
        log_probabilities: Of the last batch, (N, C, P), with the positions of dense outputs on one axis.
        labels: Class indices of the last batch, (N, P). None: no labels.

    Args:
        extractor: Entered extractor of the network.
        output: Function of the network's output that returns the logits. None: see `find_logits`.
        labels: "auto", the key of the labels, a function of the batch, or None for no labels.
    """

    def __init__(
        self,
        extractor: Extractor,
        output: Callable[[Any], Tensor] | None = None,
        labels: str | Callable[[Any], Any] | None = AUTO_LABELS,
    ) -> None:
        self.name = extractor.name
        self.substitution = Substitution(extractor)
        self.labels: Tensor | None = None
        self.log_probabilities = torch.empty(0)
        self._find_logits = output
        self._find_labels = labels

    def run(self, batch: Any) -> dict[str, Tensor]:
        """Run the network on a batch of the loader, and return its features.

        Raises:
            ShapeError: An output that is not logits (N, C, …).
            NonFiniteError: NaN in the output.
            DataError: Labels that are no class indices of the output.
        """
        features = self.substitution.run(batch)
        logits = self._logits(self.substitution.output)
        self.log_probabilities = logits.log_softmax(1)
        if bool(self.log_probabilities.isnan().any()):
            raise NonFiniteError(f"{self.name}: NaN or +Inf in the network's output; functional=True needs its logits")
        labels = find_labels(batch, self._find_labels)
        self.labels = None if labels is None else check_labels(labels, logits).to(logits.device)
        return features

    def replace(self, layer: str, feature: Tensor) -> Tensor:
        """Return the log-probabilities (N, C, P) of the network with another feature (N, C_B, H, W) in a layer."""
        return self._logits(self.substitution.replace(layer, feature)).log_softmax(1)

    def _logits(self, output: Any) -> Tensor:
        logits = find_logits(output) if self._find_logits is None else self._find_logits(output)
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            kind = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
            raise ShapeError(f"{self.name}: expected output= to return floating logits (N, C, …), got {kind}")
        if logits.ndim < 2 or logits.shape[1] < 2 or (self._find_logits is None and logits.ndim == 3):
            raise ShapeError(
                f"{self.name}: expected logits (N, C) or (N, C, H, W) of at least two classes, got "
                f"{tuple(logits.shape)}. Pass output=, which may return (N, C, …), such as "
                "lambda out: out.logits.transpose(1, 2) for tokens, or functional=False."
            )
        # Positions on one axis; half precision would round the probabilities
        return (logits if logits.dtype == torch.float64 else logits.float()).reshape(*logits.shape[:2], -1)


class FunctionalStatistics:
    """Sums of agreement, KL and correct classes over images, with orders 0…k or the residual as feature.

    Args:
        num_components: K + 1.
    """

    def __init__(self, num_components: int) -> None:
        # The last row: the network's own output
        self.sums = torch.zeros(num_components + 2, NUM_SUMS, dtype=torch.float64)

    @torch.no_grad()
    def update(
        self,
        network: ExplainedNetwork,
        layer: str,
        feature: Tensor,
        components: Sequence[Tensor],
        center: Tensor,
        images: Tensor,
    ) -> None:
        """Add the report images of a batch.

        Args:
            network: Explained network, after `run` on this batch.
            layer: Explained layer.
            feature: Its feature of all images of the batch, (N, C, H, W).
            components: K + 1 components of the report images, (R, C, H, W).
            center: Mean of the feature on the fitting images, (C,).
            images: (N,) mask of the R report images.
        """
        images = images.to(feature.device)
        outputs = images.to(network.log_probabilities.device)
        own, labels = network.log_probabilities, network.labels
        own, labels = own[outputs], None if labels is None else labels[outputs]
        mapped = torch.zeros_like(components[0])
        for row in range(len(components) + 1):
            if row < len(components):
                mapped = part = mapped + components[row]
            else:
                part = feature[images] - mapped + center.to(feature).view(1, -1, 1, 1)
            # Images of other parts of the split keep their feature
            replaced = feature.clone()
            replaced[images] = part.to(feature)
            self.sums[row] += image_sums(network.replace(layer, replaced)[outputs], own, labels)
        self.sums[-1] += image_sums(own, own, labels)

    def all_reduce(self, group: ProcessGroup) -> None:
        """Sum over all processes."""
        if group.size > 1:
            sums = self.sums.to(group.device)
            group.sum_(sums)
            self.sums = sums.cpu()

    def shares(self) -> tuple[tuple[FunctionalShare, ...], FunctionalShare, FunctionalShare]:
        """Return the figures of orders 0…k for every k, of the residual alone, and of the network's own output."""
        *orders, residual, own = map(share_from_sums, self.sums)
        return tuple(orders), residual, own


def share_from_sums(sums: Tensor) -> FunctionalShare:
    """Return the figures of sums (6,) of `image_sums`."""
    images, agreement, squares, divergence, correct, labeled = sums.tolist()
    mean = agreement / images
    # Standard error of a mean: s / √n with the unbiased variance
    variance = max(squares / images - mean * mean, 0.0)
    error = float(np.sqrt(variance / (images - 1))) if images > 1 else float("nan")
    return FunctionalShare(mean, error, divergence / images, correct / labeled if labeled else None)


def image_sums(output: Tensor, own: Tensor, labels: Tensor | None) -> Tensor:
    """Return sums over images: their number, agreement, its square, KL, correct and labeled positions.

    Args:
        output: Log-probabilities (N, C, P) with the replaced feature.
        own: The network's own.
        labels: (N, P). None: no labels.
    """
    predicted = output.argmax(1)
    agreement = (predicted == own.argmax(1)).double().mean(1)
    probabilities = own.exp()
    # 0 · log 0 = 0
    terms = torch.where(probabilities > 0, probabilities * (own - output), torch.zeros_like(own))
    divergence = terms.sum(1).double().mean(1)
    correct = labeled = torch.zeros((), dtype=torch.float64)
    if labels is not None:
        is_labeled = (labels >= 0) & ~((labels == IGNORED_LABEL) & (own.shape[1] <= IGNORED_LABEL))
        correct, labeled = ((predicted == labels) & is_labeled).sum().double(), is_labeled.sum().double()
    count = torch.tensor(float(len(output)), dtype=torch.float64)
    sums = (count, agreement.sum(), agreement.square().sum(), divergence.sum(), correct, labeled)
    return torch.stack([value.cpu() for value in sums])


def find_labels(batch: Any, labels: str | Callable[[Any], Any] | None = AUTO_LABELS) -> Tensor | None:
    """Return the labels of a batch, or None if it has none.

    Args:
        batch: Batch of the loader.
        labels: "auto" (second element of a tuple, or the entry of a mapping at one of `LABEL_KEYS`), the key of the
            labels, a function of the batch, or None for no labels.

    Raises:
        DataError: No entry at the given key, or labels that are no tensor.

    Examples:
        >>> find_labels((torch.zeros(2, 3, 8, 8), torch.tensor([4, 1])))
        tensor([4, 1])
    """
    value: Any = None
    if callable(labels):
        value = labels(batch)
    elif labels == AUTO_LABELS:
        if isinstance(batch, Mapping):
            value = next((batch[key] for key in LABEL_KEYS if key in batch), None)
        elif isinstance(batch, (tuple, list)) and len(batch) > 1:
            value = batch[1]
    elif labels is not None:
        if not isinstance(batch, Mapping) or labels not in batch:
            content = f"keys {list(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
            raise DataError(f"expected labels at {labels!r} of each batch (labels={labels!r}), got {content}")
        value = batch[labels]
    if value is None or isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"expected labels as a tensor of class indices, got {type(value).__name__}; pass labels=, or labels=None "
            "to measure agreement and KL alone"
        ) from error


def check_labels(labels: Tensor, logits: Tensor) -> Tensor:
    """Return labels (N, P) as int64, checked to be class indices of flattened logits (N, C, P).

    Raises:
        DataError: Another type or number of labels, or a label that is no class.

    Examples:
        >>> check_labels(torch.tensor([4, 1]), torch.zeros(2, 5, 1))
        tensor([[4],
                [1]])
    """
    count, num_classes, positions = logits.shape
    cure = "pass labels=, or labels=None to measure agreement and KL alone"
    if (
        labels.is_floating_point()
        or labels.is_complex()
        or labels.shape[:1] != (count,)
        or (labels[0].numel() if labels.ndim > 1 else 1) != positions
    ):
        raise DataError(
            f"expected labels that are one class index for each of {count} images"
            f"{'' if positions == 1 else f' and {positions} positions'}, got {labels.dtype} of shape "
            f"{tuple(labels.shape)}; {cure}"
        )
    labels = labels.long()
    # Negative and 255 mark positions without a label in dense outputs
    known = labels[(labels >= 0) & (labels != IGNORED_LABEL)] if positions > 1 else labels
    if known.numel() and not (int(known.min()) >= 0 and int(known.max()) < num_classes):
        raise DataError(
            f"expected labels from 0 to {num_classes - 1}, the classes of the network's output; "
            f"got {int(known.min())} to {int(known.max())}; {cure}"
        )
    return labels.reshape(count, positions)
