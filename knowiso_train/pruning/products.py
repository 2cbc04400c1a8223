"""Products of rows with themselves: the most expensive part of choosing and refitting wide layers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from knowiso_train.errors import NonFiniteError
from knowiso_train.ops import full_precision
from knowiso_train.ops.triangle import bands, mirror
from knowiso_train.statistics import Moments

SPLIT, BLOCKS = 512, 8  # columns from which on one triangle is computed, in so many blocks
ROWS = 4096  # that wait until their product is added


def gram(parts: Iterable[Tensor], total: Tensor) -> Tensor:
    """Σ x·xᵀ over parts (…, d, R), added to `total` (…, d, d) in place; of wide ones the products on and above the diagonal's blocks.

    Example:
        >>> x = torch.randn(600, 50, dtype=torch.float64)
        >>> torch.allclose(gram(x.split(20, 1), torch.zeros(600, 600, dtype=torch.float64)), x @ x.T)
        True
    """
    d = total.shape[-1]
    rows = bands(d, d if d < SPLIT else -(-d // BLOCKS))
    for x in parts:
        for band in rows:
            total[..., band, band.start :] += x[..., band, :] @ x[..., band.start :, :].mT
    mirror(total, rows)
    return total


class RowSums:
    """Mean and second moments of rows that come in parts; products are taken in the rows' precision and added up in float64.

    Example:
        >>> sums, x = RowSums(), torch.randn(50, 3).double()
        >>> sums.add(x[:20]), sums.add(x[20:])
        (None, None)
        >>> moments = sums.moments()
        >>> torch.allclose(moments.xx / moments.count, x.T.cov(correction=0)), int(moments.count)
        (True, 50)
    """

    def __init__(self) -> None:
        self.count = 0
        self._waiting: list[Tensor] = []
        self._about = self._sum = self._product = torch.zeros(0)

    def add(self, rows: Tensor) -> None:
        """Rows (R, d), R > 0.

        Raises:
            NonFiniteError: NaN or Inf, or too large to square.
        """
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if not bool(rows.square().sum().isfinite()):
            raise NonFiniteError("NaN or Inf, or too large to square")
        if not self.count:
            self._about = rows.double().mean(0)  # near the mean, so that nothing cancels
            self._sum, self._product = torch.zeros_like(self._about), torch.zeros(len(self._about), len(self._about)).to(self._about)
        self.count += len(rows)
        self._waiting.append(rows - self._about.to(rows))
        if sum(map(len, self._waiting)) >= ROWS:
            self._flush()

    def moments(self) -> Moments:
        """With the first column for a target."""
        self._flush()
        off = self._sum / self.count
        xx = self._product.addr(off, off, alpha=-self.count)
        mean = self._about + off
        return Moments(torch.tensor(float(self.count), dtype=torch.float64, device=xx.device), mean, mean[:1], xx, xx[:, :1], xx[0, :1])

    def _flush(self) -> None:
        if self._waiting:
            rows = torch.cat(self._waiting)
            self._waiting = []
            self._sum += rows.sum(0, dtype=torch.float64)
            with full_precision(rows.device):
                gram([rows.T], self._product)
