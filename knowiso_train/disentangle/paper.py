"""The paper's disentangler (arXiv 1908.01581, §3; ICLR 2020): K gated steps, split exactly by non-linear order."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from knowiso_train.errors import OptionError, ShapeError
from knowiso_train.ops import channel_scale, gate, gate_orders


class PaperMaps(nn.Module):
    """`h_k = U_k x + V_k z_k + b_k`, `z_k = p_k · ReLU(h_{k-1} / σ(h_{k-1}))`, `g(x) = h_K`; tied and bias-free (U_k = V_k) it is the paper's.

    Args:
        source_channels: C_A.
        target_channels: C_B; tied maps need C_A = C_B.
        order: K ≥ 0, the number of non-linear steps.
        kernel_size: odd; zero padding keeps the grid. The paper uses 3.
        tied: one bias-free map per step, as published; None ties where the channels allow it.

    Raises:
        OptionError: tied maps between different numbers of channels.

    Example:
        >>> maps = PaperMaps(4, 4, order=2, kernel_size=3)
        >>> x = torch.randn(2, 4, 5, 5)
        >>> torch.allclose(sum(maps.components(x)), maps(x), atol=1e-5)
        True
    """

    def __init__(self, source_channels: int, target_channels: int, order: int = 2, kernel_size: int = 3, tied: bool | None = None) -> None:
        super().__init__()
        if tied and source_channels != target_channels:
            raise OptionError(
                f"tied maps need as many source as target channels, got {source_channels} and {target_channels}; use tied=False for the general form"
            )
        self.order, self.kernel_size = order, kernel_size
        self.source_channels, self.target_channels = source_channels, target_channels
        self.tied = source_channels == target_channels if tied is None else tied
        pad = kernel_size // 2

        def conv(inputs: int, bias: bool) -> nn.Conv2d:
            return nn.Conv2d(inputs, target_channels, kernel_size, padding=pad, bias=bias)

        self.of_source = nn.ModuleList(conv(source_channels, not self.tied) for _ in range(order + 1))
        self.of_gated = nn.ModuleList() if self.tied else nn.ModuleList(conv(target_channels, False) for _ in range(order))
        self.q = nn.Parameter(torch.zeros(order))

    @property
    def gates(self) -> Tensor:
        """p_1 … p_K in (0, 1), what the paper penalises."""
        return torch.sigmoid(self.q)

    def _gated_map(self, step: int) -> nn.Module:
        return self.of_source[step] if self.tied else self.of_gated[step - 1]

    def forward(self, x: Tensor) -> Tensor:
        """g(x): (N, C_A, H, W) → (N, C_B, H, W)."""
        return self.of_normalised(self._normalised(x))

    def of_normalised(self, x: Tensor) -> Tensor:
        """g(x) of a source that was divided by its scale already."""
        return self._after(self.order, x)

    def last_step(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Source, weight and bias of the convolution that gives `of_normalised(x)`, for whoever wants its residual and not itself.

        Returns:
            (N, C, H, W), (C_B, C, k, k) and (C_B,) or None, where C is C_A, or C_A + C_B if untied maps read the source and the gated signal.
        """
        last = self.of_source[self.order]
        weight, bias = last.get_parameter("weight"), last.bias
        if not self.order:
            return x, weight, bias  # type: ignore[return-value]
        h, p = self._after(self.order - 1, x), self.gates[-1]
        if self.tied:
            return gate(x, h, p), weight, bias  # type: ignore[return-value]
        of_gated = self.of_gated[-1].get_parameter("weight")
        return torch.cat([x, gate(None, h, p)], 1), torch.cat([weight, of_gated], 1), bias  # type: ignore[return-value]

    def _after(self, steps: int, x: Tensor) -> Tensor:
        h: Tensor = self.of_source[0](x)
        for step, p in enumerate(self.gates[:steps], start=1):
            h = self.of_source[step](gate(x, h, p)) if self.tied else self.of_source[step](x) + self.of_gated[step - 1](gate(None, h, p))
        return h

    def components(self, x: Tensor) -> list[Tensor]:
        """x^(0) … x^(K), which sum to g(x): the orders go side by side through gates frozen at this input, in one pass.

        Returns:
            K + 1 tensors (N, C_B, H, W); the k-th has passed exactly k gates. Biases belong to order 0 of the step that adds them.
        """
        x = self._normalised(x)
        orders: list[Tensor] = [self.of_source[0](x)]
        for step, p in enumerate(self.gates, start=1):
            raised = self._gated_map(step)(gate_orders(torch.stack(orders), p).flatten(0, 1))
            orders = [self.of_source[step](x), *raised.chunk(len(orders))]
        return orders

    def _normalised(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.source_channels:
            raise ShapeError(f"expected a source of shape (N, {self.source_channels}, H, W), got {tuple(x.shape)}")
        return x / channel_scale(x)
