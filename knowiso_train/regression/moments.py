"""Second moments of feature pairs: computed from a batch, merged exactly, streamed, and reduced over processes.

`Moments` is the container; everything else here produces one.

- `batch_moments` computes it from one batch, with gradients.
- `StreamingMoments` adds constant memory over any number of batches, and checks for NaN and Inf.
- `RunningMoments` adds exponential forgetting, in-place updates and buffers that are saved with a module.
- `RowSums` adds the second moments of one matrix of samples in its own precision, which is faster for the wide inputs
  of pruned layers.

`regression.ridge.PrimalMoments` holds averages over samples for each group of a layer, as the solver takes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor, nn

from knowiso_train.errors import NonFiniteError, ShapeError
from knowiso_train.ops.im2col import patch_rows
from knowiso_train.ops.linalg import full_precision, gram
from knowiso_train.ops.moments import moments
from knowiso_train.utils.distributed import ProcessGroup

PATCH_CHUNK_BYTES = 8 * 2**20  # of patches written out at once
ROW_BUFFER_SIZE = 4096  # samples collected before their product is added
# Ratio of standard deviation to root mean square below which a feature is constant up to float32 rounding
MIN_RELATIVE_STD = 1e-6


@dataclass(frozen=True)
class Moments:
    """Centered moments of n samples (positions × images); sums, not averages.

    Attributes:
        count: n, a float64 scalar.
        mean_x: (d,) with d = C_A · k².
        mean_y: (c,).
        xx: (d, d), `Σ (x - mean)(x - mean)ᵀ`.
        xy: (d, c), `Σ (x - mean)(y - mean)ᵀ`.
        yy: (c,), the diagonal of the target's own second moment.
    """

    count: Tensor
    mean_x: Tensor
    mean_y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def zeros(cls, num_features: int, num_targets: int, device: torch.device | str = "cpu") -> Moments:
        """Return the moments of no samples, in float64.

        Examples:
            >>> Moments.zeros(3, 2).xy.shape
            torch.Size([3, 2])
        """
        d, c = num_features, num_targets
        shapes = ((), (d,), (c,), (d, d), (d, c), (c,))
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def targets(self, start: int, stop: int) -> Moments:
        """Return the moments of the same source with target channels `start:stop`."""
        return Moments(
            self.count, self.mean_x, self.mean_y[start:stop], self.xx, self.xy[:, start:stop], self.yy[start:stop]
        )

    def scaled(self, factor: float) -> Moments:
        """Return the moments with every sample counted `factor` times."""
        return Moments(
            self.count * factor, self.mean_x, self.mean_y, self.xx * factor, self.xy * factor, self.yy * factor
        )

    def to(self, device: torch.device) -> Moments:
        """Return the moments in float64 on a device."""
        return Moments(**{name: getattr(self, name).to(device, torch.float64) for name in FIELDS})

    def reduced(self, group: ProcessGroup) -> Moments:
        """Return the moments of the samples of all processes, on this device."""
        if group.size == 1:
            return self
        m = self.to(group.device)
        # First pass: the common mean, Σ n_p mean_p / Σ n_p
        count, sum_x, sum_y = m.count.clone(), m.count * m.mean_x, m.count * m.mean_y
        group.sum_(count, sum_x, sum_y)
        divisor = _positive(count)
        mean_x, mean_y = sum_x / divisor, sum_y / divisor
        # Second pass: second moments about it. With δ_p = mean_p - mean, S = Σ_p (S_p + n_p δ_p δ_pᵀ)
        dx, dy = m.mean_x - mean_x, m.mean_y - mean_y
        xx = m.xx + m.count * torch.outer(dx, dx)
        xy = m.xy + m.count * torch.outer(dx, dy)
        yy = m.yy + m.count * dy.square()
        group.sum_(xx, xy, yy)
        return Moments(count, mean_x, mean_y, xx, xy, yy).to(self.count.device)

    def merged(self, other: Moments) -> Moments:
        """Return the moments of both sets of samples together, exact to rounding.

        References:
            Chan, Golub & LeVeque (1979), *Updating formulae and a pairwise algorithm for computing sample variances*.

        Examples:
            >>> x, y = torch.randn(8, 3, 2, 2), torch.randn(8, 2, 2, 2)
            >>> halves = batch_moments(x[:5], y[:5]).merged(batch_moments(x[5:], y[5:]))
            >>> torch.allclose(halves.xy, batch_moments(x, y).xy, atol=1e-5)
            True
        """
        # With δ = mean_b - mean_a and n = n_a + n_b:
        #   mean = mean_a + (n_b / n) δ,   S = S_a + S_b + (n_a n_b / n) δ δᵀ
        count = self.count + other.count
        weight = torch.where(count > 0, other.count / _positive(count), torch.zeros_like(count))
        dx, dy = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        between = self.count * weight
        return Moments(
            count,
            self.mean_x + weight * dx,
            self.mean_y + weight * dy,
            self.xx + other.xx + between * torch.outer(dx, dx),
            self.xy + other.xy + between * torch.outer(dx, dy),
            self.yy + other.yy + between * dy.square(),
        )


FIELDS = tuple(field.name for field in fields(Moments))


def _positive(count: Tensor) -> Tensor:
    """Return a count that can be divided by."""
    return count.clamp(min=torch.finfo(count.dtype).tiny)


def batch_moments(x: Tensor, y: Tensor, kernel_size: int = 1, positions: Tensor | None = None) -> Moments:
    """Compute the moments of one batch, differentiable with respect to both features.

    Args:
        x: Source, (N, C_A, H, W), floating. Half precision is raised to float32.
        y: Target, (N, C_B, H, W), on the same grid.
        kernel_size: Side k of the zero-padded patches of the source; the target enters as their center.
        positions: Indices into the grid, (N, P). Default: all positions.

    Raises:
        ShapeError: The features do not share batch and grid.

    Examples:
        >>> m = batch_moments(torch.randn(4, 3, 5, 5), torch.randn(4, 2, 5, 5), kernel_size=3)
        >>> int(m.count), tuple(m.xx.shape), tuple(m.xy.shape)
        (100, (27, 27), (27, 2))
    """
    if x.ndim != 4 or y.ndim != 4 or x.shape[0] != y.shape[0] or x.shape[2:] != y.shape[2:]:
        raise ShapeError(
            f"expected source and target as (N, C, H, W) with the same N, H, W; got {tuple(x.shape)} and "
            f"{tuple(y.shape)}. Bring the source to the target's grid with knowiso_train.features.align."
        )
    with full_precision(x.device):
        if positions is not None:
            # Samples at single positions are images of one position, whose patches are already written out
            x, y = _as_images(patch_rows(x, kernel_size, positions)), _as_images(patch_rows(y, 1, positions))
            kernel_size = 1
        # `full` runs on the device; a copy of a CPU scalar would synchronize
        count = torch.full((), float(y[:, 0].numel()), dtype=torch.float64, device=x.device)
        return Moments(count, *moments(x, y, kernel_size))


def _as_images(rows: Tensor) -> Tensor:
    return rows[:, :, None, None]


class StreamingMoments:
    """Moments of any number of batches, in float64 and constant memory, without gradients.

    Args:
        source_channels: C_A.
        target_channels: C_B.
        kernel_size: Odd k.
        device: Device of the sums; that of the features is fastest.

    Examples:
        >>> stream = StreamingMoments(3, 2)
        >>> for _ in range(4):
        ...     stream.update(torch.randn(8, 3, 2, 2), torch.randn(8, 2, 2, 2))
        >>> int(stream.value.count)
        128
    """

    def __init__(
        self, source_channels: int, target_channels: int, kernel_size: int = 1, device: torch.device | str = "cpu"
    ) -> None:
        self.kernel_size = kernel_size
        self.value = Moments.zeros(source_channels * kernel_size**2, target_channels, device)

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor, positions: Tensor | None = None) -> None:
        """Add one batch; arguments as for `batch_moments`.

        Raises:
            ShapeError: Other channels than these moments have.
            NonFiniteError: NaN or Inf in the batch. The moments were not modified.
        """
        d = x.shape[1] * self.kernel_size**2
        if d != len(self.value.mean_x) or y.shape[1] != len(self.value.mean_y):
            expected = (len(self.value.mean_x) // self.kernel_size**2, len(self.value.mean_y))
            raise ShapeError(f"expected source and target channels {expected}, got {(x.shape[1], y.shape[1])}")
        if len(x) == 0:
            return
        step = len(x)
        if positions is not None:
            # These patches are written out, P · d values an image. A merge costs d², so a chunk has at least 2d
            # samples.
            step = max(1, max(PATCH_CHUNK_BYTES, 8 * d * d) // (positions.shape[1] * d * max(x.element_size(), 4)))
        total = self.value
        for start in range(0, len(x), step):
            part = slice(start, start + step)
            batch = batch_moments(x[part], y[part], self.kernel_size, None if positions is None else positions[part])
            total = total.merged(batch.to(self.value.count.device))
        if not bool(torch.isfinite(total.xx.sum() + total.yy.sum())):
            raise NonFiniteError(
                "features with NaN or Inf, or too large to square: nothing was accumulated from this batch"
            )
        self.value = total

    def all_reduce(self, group: ProcessGroup | None = None) -> None:
        """Merge the moments of all processes, see `Moments.reduced`."""
        self.value = self.value.reduced(group or ProcessGroup())


class RunningMoments(nn.Module):
    """Exponentially forgotten moments as buffers of a module.

    They stay float64 when the module is cast, and on the CPU where the device has no float64 (MPS). Forgetting is
    linear in the samples. The moments of processes that take parts of every batch therefore add up to those of one
    process that takes it all.

    Args:
        source_channels: C_A.
        target_channels: C_B.
        kernel_size: Odd k.

    Examples:
        >>> running = RunningMoments(3, 2)
        >>> for _ in range(4):
        ...     _ = running.update(torch.randn(8, 3, 1, 1), torch.randn(8, 2, 1, 1), keep=0.5)
        >>> float(running.value.count)
        15.0
    """

    count: Tensor
    mean_x: Tensor
    mean_y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    def __init__(self, source_channels: int, target_channels: int, kernel_size: int = 1) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        for name, tensor in vars(Moments.zeros(source_channels * kernel_size**2, target_channels)).items():
            self.register_buffer(name, tensor)

    @property
    def value(self) -> Moments:
        """Moments of this process."""
        return Moments(**{name: getattr(self, name) for name in FIELDS})

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor, keep: float = 1.0, positions: Tensor | None = None) -> Tensor:
        """Weight the past by `keep` and add one batch; skip a batch with NaN or Inf.

        Args:
            x: Source, as for `batch_moments`.
            y: Target.
            keep: Weight of all former samples, in (0, 1].
            positions: Indices into the grid, (N, P). Default: all positions.

        Returns:
            True where the batch was finite, a boolean scalar on the device of the moments.
        """
        batch = {
            name: value.to(self.count.device)
            for name, value in vars(batch_moments(x.detach(), y.detach(), self.kernel_size, positions)).items()
        }
        finite: Tensor = (batch["xx"].sum() + batch["yy"].sum()).isfinite()
        if finite.device.type == "cpu":
            if bool(finite):
                self._merge_batch(keep, **batch)
        else:
            # Masking on the device avoids a synchronization in every training step
            for value in batch.values():
                value.masked_fill_(~finite, 0)
            self._merge_batch(torch.where(finite, keep, 1.0).to(self.count), **batch)
        return finite

    def _merge_batch(
        self, keep: float | Tensor, count: Tensor, mean_x: Tensor, mean_y: Tensor, xx: Tensor, xy: Tensor, yy: Tensor
    ) -> None:
        """Compute `value.scaled(keep).merged(batch)` in place, without a second copy of the (d, d) sums.

        A training step calls this where its memory is at its peak.
        """
        before = self.count * keep
        self.count.copy_(before + count)
        weight = count / _positive(self.count)
        dx, dy = mean_x - self.mean_x, mean_y - self.mean_y
        between = before * weight
        # S_b += (n_a n_b / n) δ δᵀ, then S = keep · S_a + S_b
        scaled_dx = (between * dx).to(xx.dtype)
        xx.addr_(scaled_dx, dx.to(xx.dtype))
        xy.addr_(scaled_dx, dy.to(xy.dtype))
        for total, addend in ((self.xx, xx), (self.xy, xy), (self.yy, yy + between * dy.square())):
            if isinstance(keep, Tensor):
                total.mul_(keep).add_(addend)
            else:
                torch.add(addend, total, alpha=keep, out=total)  # one pass over memory
        self.mean_x.add_(weight * dx)
        self.mean_y.add_(weight * dy)

    @torch.no_grad()
    def all_reduce(self, group: ProcessGroup) -> Moments:
        """Return the moments of all processes, and leave an equal part of them in each.

        The state of any one process can then be saved and loaded into all. Collective: every process calls it at the
        same step.
        """
        total = self.value.reduced(group)
        if group.size > 1:
            for name, value in vars(total.scaled(1 / group.size)).items():
                getattr(self, name).copy_(value)
        return total

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Follow a move to another device, ignore a change of dtype
        device = fn(torch.empty(0, device=self.count.device)).device
        float64_device = torch.device("cpu") if device.type == "mps" else device
        for name in FIELDS:
            self._buffers[name] = getattr(self, name).to(float64_device)
        return self

    def extra_repr(self) -> str:
        """Return the sizes for `repr`."""
        return f"num_features={len(self.mean_x)}, target_channels={len(self.mean_y)}, kernel_size={self.kernel_size}"


class RowSums:
    """Mean and second moments of samples that arrive in parts.

    Products are computed in the samples' precision and added in float64.

    Examples:
        >>> sums, x = RowSums(), torch.randn(50, 3).double()
        >>> sums.add(x[:20]), sums.add(x[20:])
        (None, None)
        >>> moments = sums.moments()
        >>> torch.allclose(moments.xx / moments.count, x.T.cov(correction=0)), int(moments.count)
        (True, 50)
    """

    def __init__(self) -> None:
        self.count = 0
        self._buffer: list[Tensor] = []
        self._origin = self._sum = self._product = torch.zeros(0)

    def add(self, rows: Tensor) -> None:
        """Add samples (R, d), R > 0.

        Raises:
            NonFiniteError: NaN or Inf, or values too large to square.
        """
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if not bool(rows.square().sum().isfinite()):
            raise NonFiniteError("NaN or Inf, or too large to square")
        if not self.count:
            # Sums are taken about the mean m of the first part, close to the final mean, so that little cancels
            self._origin = rows.double().mean(0)
            self._sum = torch.zeros_like(self._origin)
            self._product = torch.zeros(len(self._origin), len(self._origin)).to(self._origin)
        self.count += len(rows)
        self._buffer.append(rows - self._origin.to(rows))
        if sum(map(len, self._buffer)) >= ROW_BUFFER_SIZE:
            self._flush()

    def moments(self) -> Moments:
        """Return the moments, with the first feature as the target."""
        self._flush()
        # With δ = mean - m: Σ (x - mean)(x - mean)ᵀ = Σ (x - m)(x - m)ᵀ - n δ δᵀ
        offset = self._sum / self.count
        xx = self._product.addr(offset, offset, alpha=-self.count)
        mean = self._origin + offset
        count = torch.tensor(float(self.count), dtype=torch.float64, device=xx.device)
        return Moments(count, mean, mean[:1], xx, xx[:, :1], xx[0, :1])

    def _flush(self) -> None:
        if self._buffer:
            rows = torch.cat(self._buffer)
            self._buffer = []
            self._sum += rows.sum(0, dtype=torch.float64)
            with full_precision(rows.device):
                gram([rows.T], self._product)
