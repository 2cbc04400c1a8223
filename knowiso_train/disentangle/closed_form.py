"""Maps of the closed-form solver: a linear order 0, and one chain of ReLU layers whose k-th map feeds the readout of order k."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from knowiso_train.errors import ShapeError


class ClosedFormMaps(nn.Module):
    """`x^(0) = W x + b`; `a_0` = x standardised, `a_k = ReLU(M_k a_{k-1} + c_k)`; `x^(k) = Σ_{j≤k} V_{k,j} a_j + b_k` for k ≥ 1.

    M_k is fitted to what the orders below leave over and frozen before the next order, so every order costs one more layer. The readouts of the
    earlier regressors x, a_1 … a_{k-1} take out of a_k what they explain linearly (`x^(k) = V_k ã_k`).

    Args:
        source_channels: C_A.
        target_channels: C_B.
        order: K.
        kernel_size: of every map; zero padding keeps the grid.
        hidden: channels of every a_k.
        projection: (p, C_A) fixed orthonormal rows that the source is first projected on, or None.

    Shape:
        (N, C_A, H, W) → (N, C_B, H, W).
    """

    centre: Tensor
    scale: Tensor
    projection: Tensor | None

    def __init__(
        self, source_channels: int, target_channels: int, order: int, kernel_size: int, hidden: int, projection: Tensor | None = None
    ) -> None:
        super().__init__()
        self.source_channels, self.target_channels = source_channels, target_channels
        self.order, self.kernel_size, self.hidden = order, kernel_size, hidden
        self.register_buffer("projection", projection)
        inner = source_channels if projection is None else len(projection)
        self.register_buffer("centre", torch.zeros(inner, 1, 1))
        self.register_buffer("scale", torch.ones(inner, 1, 1))

        def conv(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2, bias=bias)

        self.linear = conv(inner, target_channels)
        self.layers = nn.ModuleList(conv(inner if k == 0 else hidden, hidden) for k in range(order))
        self.readouts = nn.ModuleList(
            nn.ModuleList(conv(inner if j == 0 else hidden, target_channels, bias=j == 0) for j in range(k + 1)) for k in range(1, order + 1)
        )
        self.requires_grad_(False)

    def project(self, x: Tensor) -> Tensor:
        """The source as the maps see it."""
        if x.ndim != 4 or x.shape[1] != self.source_channels:
            raise ShapeError(f"expected a source of shape (N, {self.source_channels}, H, W), got {tuple(x.shape)}")
        return x if self.projection is None else torch.einsum("pc,nchw->nphw", self.projection, x)

    def regressors(self, x: Tensor, order: int, inside: Tensor | None = None) -> list[Tensor]:
        """x, a_1, …, a_order of a projected source; `inside` is 1 within the image and 0 in the padding, where x is a crop with a margin."""
        a, found = (x - self.centre) / self.scale, [x]
        if inside is not None:
            a = a * inside
        for layer in self.layers[:order]:
            a = torch.relu(layer(a))
            if inside is not None:
                a = a * inside
            found.append(a)
        return found

    def readout(self, order: int, regressors: list[Tensor]) -> Tensor:
        """x^(order), of order ≥ 1, from x, a_1, …, a_order."""
        outputs = [readout(a) for readout, a in zip(self.readouts_of(order), regressors, strict=True)]
        return torch.stack(outputs).sum(0)

    def readouts_of(self, order: int) -> list[nn.Conv2d]:
        """Convolutions of x, a_1, …, a_order."""
        return list(cast(nn.ModuleList, self.readouts[order - 1]))  # type: ignore[arg-type]

    def components(self, x: Tensor) -> list[Tensor]:
        """x^(0) … x^(K), each (N, C_B, H, W)."""
        x = self.project(x)
        found = self.regressors(x, self.order)
        return [self.linear(x), *(self.readout(k, found[: k + 1]) for k in range(1, self.order + 1))]

    def forward(self, x: Tensor) -> Tensor:
        """g(x), the sum of the components."""
        return torch.stack(self.components(x)).sum(0)
