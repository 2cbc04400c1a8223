"""Closed-form maps of every order, and their readouts from second moments."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knowiso_train.errors import ShapeError
from knowiso_train.regression.sampling import Sample, trim

MAX_BATCH_POSITIONS = 16_384
MAX_SOURCE_DEVIATIONS = 30.0  # of a standardized channel


class ClosedFormMaps(nn.Module):
    """Linear map of order 0 and one hidden layer more for every further order.

    With a_0 = x standardized and `a_k = ReLU(M_k a_{k-1} + c_k)`:

    - `x^(0) = W x + b`,
    - `x^(k) = V_k ã_k = Σ_{j≤k} V_{k,j} a_j + b_k` for k ≥ 1, with V_{k,0} applied to x itself.

    ã_k is a_k without its linear regression on the earlier features x, a_1 … a_{k-1}; the V_{k,j} with j < k subtract
    it. M_k is fitted to the residual of the orders below and then frozen.

    Args:
        source_channels: C_A.
        target_channels: C_B.
        order: K.
        kernel_size: Odd kernel of every map; zero padding keeps the grid.
        hidden: Channels of every a_k.
        projection: Fixed orthonormal rows that the source is first projected on, (p, C_A), or None.

    Shape:
        (N, C_A, H, W) → (N, C_B, H, W).
    """

    center: Tensor
    scale: Tensor
    projection: Tensor | None

    def __init__(
        self,
        source_channels: int,
        target_channels: int,
        order: int,
        kernel_size: int,
        hidden: int,
        projection: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.source_channels, self.target_channels = source_channels, target_channels
        self.order, self.kernel_size, self.hidden = order, kernel_size, hidden
        self.register_buffer("projection", projection)
        inner = source_channels if projection is None else len(projection)
        self.register_buffer("center", torch.zeros(inner, 1, 1))
        self.register_buffer("scale", torch.ones(inner, 1, 1))

        def conv(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2, bias=bias)

        self.linear = conv(inner, target_channels)
        self.layers = nn.ModuleList(conv(inner if k == 0 else hidden, hidden) for k in range(order))
        self.readouts = nn.ModuleList(
            nn.ModuleList(conv(inner if j == 0 else hidden, target_channels, bias=j == 0) for j in range(k + 1))
            for k in range(1, order + 1)
        )
        self.requires_grad_(False)

    def project(self, x: Tensor) -> Tensor:
        """Return the projected source."""
        if x.ndim != 4 or x.shape[1] != self.source_channels:
            raise ShapeError(f"expected a source of shape (N, {self.source_channels}, H, W), got {tuple(x.shape)}")
        return x if self.projection is None else torch.einsum("pc,nchw->nphw", self.projection, x)

    def standardize(self, x: Tensor) -> Tensor:
        """Return a_0 of a projected source, limited to `MAX_SOURCE_DEVIATIONS` standard deviations.

        Without the limit, one image in which a nearly constant channel is active would dominate the hidden map.
        """
        return ((x - self.center) / self.scale).clamp(-MAX_SOURCE_DEVIATIONS, MAX_SOURCE_DEVIATIONS)

    def features(self, x: Tensor, order: int, inside: Tensor | None = None) -> list[Tensor]:
        """Return x, a_1, …, a_order of a projected source.

        Args:
            x: Projected source.
            order: Number of hidden layers.
            inside: 1 within the image and 0 in its padding, where x is a crop with a margin of (order + 1) · (k // 2).
                The features then have the margin k // 2.
        """
        a, features = self.standardize(x), [x]
        radius = self.kernel_size // 2
        padding = radius if inside is None else 0
        # The padding of a whole image is 0 in every layer, so a crop's margin outside the image is set to 0 after each
        if inside is not None:
            a = a * inside
        for layer in self.layers[:order]:
            a = torch.relu(F.conv2d(a, layer.weight, layer.bias, padding=padding))  # type: ignore[arg-type]
            if inside is not None:
                inside = trim(inside, radius)
                a = a * inside
            features.append(a)
        if inside is None:
            return features
        return [trim(feature, (order - k) * radius) for k, feature in enumerate(features)]

    def readout(self, order: int, features: list[Tensor], *, padded: bool = True) -> Tensor:
        """Return x^(order) from x, a_1, …, a_order; without padding where they have the margin k // 2."""
        readouts = [self.linear] if order == 0 else self.readouts_of(order)
        padding = self.kernel_size // 2 if padded else 0
        outputs = [
            F.conv2d(a, readout.weight, readout.bias, padding=padding)
            for readout, a in zip(readouts, features, strict=True)
        ]
        return torch.stack(outputs).sum(0)

    def layer(self, order: int) -> nn.Conv2d:
        """Return the convolution M_k of an order k ≥ 1."""
        return cast(nn.Conv2d, self.layers[order - 1])

    def readouts_of(self, order: int) -> list[nn.Conv2d]:
        """Return the convolutions V_{k,0} … V_{k,k} of an order k ≥ 1."""
        return list(cast(nn.ModuleList, self.readouts[order - 1]))  # type: ignore[arg-type]

    def components(self, x: Tensor) -> list[Tensor]:
        """Return x^(0) … x^(K), each (N, C_B, H, W)."""
        x = self.project(x)
        features = self.features(x, self.order)
        return [self.readout(k, features[: k + 1]) for k in range(self.order + 1)]

    def forward(self, x: Tensor) -> Tensor:
        """Return g(x), the sum of the components."""
        return torch.stack(self.components(x)).sum(0)


def split_indices(sample: Sample) -> list[Tensor]:
    """Return the indices of the sample's images in batches of a bounded number of positions."""
    batch_size = max(1, MAX_BATCH_POSITIONS // (sample.y.shape[2] * sample.y.shape[3]))
    return list(torch.split(torch.arange(len(sample), device=sample.x.device), batch_size))


@torch.no_grad()
def predict_component(maps: ClosedFormMaps, order: int, sample: Sample) -> Tensor:
    """Return x^(order) at the sample's targets."""
    parts = []
    for index in split_indices(sample):
        part = sample.batch(index).with_margin((order + 1) * (maps.kernel_size // 2))
        parts.append(maps.readout(order, maps.features(part.x, order, part.inside), padded=part.inside is None))
    return torch.cat(parts)
