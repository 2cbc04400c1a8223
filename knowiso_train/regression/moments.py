"""Second moments of feature pairs: streamed, merged exactly and reduced over processes."""

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

PATCH_CHUNK_BYTES = 8 * 2**20  # of patch rows that are alive at once

ROW_BUFFER_SIZE = 4096  # that wait until their product is added


@dataclass(frozen=True)
class Moments:
    """Centered moments of n rows (positions × images); sums, not averages.

    Attributes:
        count: n, a float64 scalar.
        mean_x: (d,) with d = C_A · k².
        mean_y: (c,).
        xx: (d, d), `Σ (x - mean)(x - mean)ᵀ`.
        xy: (d, c).
        yy: (c,), the diagonal: the target's own second moment per channel.
    """

    count: Tensor
    mean_x: Tensor
    mean_y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    def targets(self, start: int, stop: int) -> Moments:
        """The same source against target channels `start:stop`."""
        return Moments(
            self.count, self.mean_x, self.mean_y[start:stop], self.xx, self.xy[:, start:stop], self.yy[start:stop]
        )

    def scaled(self, factor: float) -> Moments:
        """The same rows, each counted `factor` times."""
        return Moments(
            self.count * factor, self.mean_x, self.mean_y, self.xx * factor, self.xy * factor, self.yy * factor
        )

    def to(self, device: torch.device) -> Moments:
        """In float64 on a device."""
        return Moments(**{field.name: getattr(self, field.name).to(device, torch.float64) for field in fields(Moments)})

    def reduced(self, group: ProcessGroup) -> Moments:
        """Moments of the rows of all processes, on this device; in two passes: the common mean first, then second moments about it."""
        if group.size == 1:
            return self
        m = self.to(group.device)
        count, sum_x, sum_y = m.count.clone(), m.count * m.mean_x, m.count * m.mean_y
        group.sum_(count, sum_x, sum_y)
        least = count.clamp(min=torch.finfo(count.dtype).tiny)
        mean_x, mean_y = sum_x / least, sum_y / least
        dx, dy = m.mean_x - mean_x, m.mean_y - mean_y
        xx = m.xx + m.count * torch.outer(dx, dx)
        xy = m.xy + m.count * torch.outer(dx, dy)
        yy = m.yy + m.count * dy.square()
        group.sum_(xx, xy, yy)
        return Moments(count, mean_x, mean_y, xx, xy, yy).to(self.count.device)

    def merged(self, other: Moments) -> Moments:
        """Moments of both sets of rows together (Chan, Golub & LeVeque 1979); exact to rounding.

        Example:
            >>> x, y = torch.randn(8, 3, 2, 2), torch.randn(8, 2, 2, 2)
            >>> halves = batch_moments(x[:5], y[:5]).merged(batch_moments(x[5:], y[5:]))
            >>> torch.allclose(halves.xy, batch_moments(x, y).xy, atol=1e-5)
            True
        """
        count = self.count + other.count
        weight = torch.where(
            count > 0, other.count / count.clamp(min=torch.finfo(count.dtype).tiny), torch.zeros_like(count)
        )
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


def batch_moments(x: Tensor, y: Tensor, kernel_size: int = 1, positions: Tensor | None = None) -> Moments:
    """Moments of one batch; pure and differentiable with respect to both features.

    Args:
        x: source, (N, C_A, H, W), floating; half precision is raised to float32.
        y: target, (N, C_B, H, W), on the same grid.
        kernel_size: k; the source enters as its zero-padded k×k patches, the target as its center.
        positions: (N, P) indices into the grid, or None for all.

    Raises:
        ShapeError: the features do not share batch and grid.

    Example:
        >>> m = batch_moments(torch.randn(4, 3, 5, 5), torch.randn(4, 2, 5, 5), kernel_size=3)
        >>> int(m.count), tuple(m.xx.shape), tuple(m.xy.shape)
        (100, (27, 27), (27, 2))
    """
    if x.ndim != 4 or y.ndim != 4 or x.shape[0] != y.shape[0] or x.shape[2:] != y.shape[2:]:
        raise ShapeError(
            f"expected source and target as (N, C, H, W) with the same N, H, W; got {tuple(x.shape)} and {tuple(y.shape)}. "
            "Bring the source to the target's grid with knowiso_train.features.align."
        )
    with full_precision(x.device):
        if positions is not None:
            x, y, kernel_size = (*(_as_images(patch_rows(f, k, positions)) for f, k in ((x, kernel_size), (y, 1))), 1)
        # Filled there: a copy would wait
        count = torch.full((), float(y[:, 0].numel()), dtype=torch.float64, device=x.device)
        return Moments(count, *moments(x, y, kernel_size))


def _as_images(rows: Tensor) -> Tensor:
    return rows[:, :, None, None]


class StreamingMoments:
    """Moments over any number of batches in float64 and constant memory; detached, mergeable, all-reducible.

    Args:
        source_channels: C_A.
        target_channels: C_B.
        kernel_size: k, odd.
        device: where the sums live; that of the features is best.

    Example:
        >>> stream = StreamingMoments(3, 2)
        >>> for _ in range(4):
        ...     stream.update(torch.randn(8, 3, 2, 2), torch.randn(8, 2, 2, 2))
        >>> int(stream.value.count)
        128
    """

    def __init__(
        self, source_channels: int, target_channels: int, kernel_size: int = 1, device: torch.device | str = "cpu"
    ) -> None:
        d, c = source_channels * kernel_size**2, target_channels
        self.kernel_size = kernel_size
        shapes = {"count": (), "mean_x": (d,), "mean_y": (c,), "xx": (d, d), "xy": (d, c), "yy": (c,)}
        self.value = Moments(
            **{name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}
        )

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor, positions: Tensor | None = None) -> None:
        """Add one batch; arguments as for `batch_moments`.

        Raises:
            ShapeError: other channels than this state was made for.
            NonFiniteError: NaN or Inf; the state stays as it was.
        """
        d = x.shape[1] * self.kernel_size**2
        if d != len(self.value.mean_x) or y.shape[1] != len(self.value.mean_y):
            expected = (len(self.value.mean_x) // self.kernel_size**2, len(self.value.mean_y))
            raise ShapeError(f"expected source and target channels {expected}, got {(x.shape[1], y.shape[1])}")
        if len(x) == 0:
            return
        step = len(x)
        if positions is not None:  # chosen patches are written out; merging costs d², so at least 2d rows
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

    def merge(self, other: StreamingMoments) -> None:
        """Add everything that another state has seen."""
        self.value = self.value.merged(other.value.to(self.value.count.device))

    def all_reduce(self, group: ProcessGroup | None = None) -> None:
        """Merge the states of all processes, see `Moments.reduced`."""
        self.value = self.value.reduced(group or ProcessGroup())

    def state_dict(self) -> dict[str, Tensor]:
        """Everything, as float64 tensors."""
        return {field.name: getattr(self.value, field.name) for field in fields(Moments)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ShapeError: a state of other channels or kernel size.
        """
        for name, tensor in self.state_dict().items():
            if name not in state or state[name].shape != tensor.shape:
                got = tuple(state[name].shape) if name in state else "nothing"
                raise ShapeError(f"saved moments do not fit: expected {name} of shape {tuple(tensor.shape)}, got {got}")
        self.value = Moments(**{field.name: state[field.name] for field in fields(Moments)}).to(self.value.count.device)


FIELDS = tuple(field.name for field in fields(Moments))


class RunningMoments(nn.Module):
    """Exponentially forgotten moments, part of a module's state.

    Always float64, whatever the module is cast to, and on the CPU where the device has no float64 (MPS).

    Forgetting is linear in the rows, so the states of processes that see parts of every batch add up to the state of
    one process that sees it whole.

    Args:
        source_channels: C_A.
        target_channels: C_B.
        kernel_size: k, odd.

    Example:
        >>> running = RunningMoments(3, 2)
        >>> for _ in range(4):
        ...     _ = running.observe(torch.randn(8, 3, 1, 1), torch.randn(8, 2, 1, 1), keep=0.5)
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
        d, c = source_channels * kernel_size**2, target_channels
        self.kernel_size = kernel_size
        for name, shape in zip(FIELDS, ((), (d,), (c,), (d, d), (d, c), (c,)), strict=True):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))

    @property
    def value(self) -> Moments:
        """The moments that this process holds."""
        return Moments(**{name: getattr(self, name) for name in FIELDS})

    @torch.no_grad()
    def observe(self, x: Tensor, y: Tensor, keep: float = 1.0, positions: Tensor | None = None) -> Tensor:
        """Weigh what is there by `keep` and add one batch; a batch with NaN or Inf is left out.

        Args:
            x: source, as for `batch_moments`.
            y: target.
            keep: in (0, 1].
            positions: (N, P) indices into the grid, or None for all.

        Returns:
            Whether the batch was finite, a boolean scalar on the device of the moments.
        """
        batch = {
            name: value.to(self.count.device)
            for name, value in vars(batch_moments(x.detach(), y.detach(), self.kernel_size, positions)).items()
        }
        finite: Tensor = (batch["xx"].sum() + batch["yy"].sum()).isfinite()
        if finite.device.type == "cpu":
            if bool(finite):
                self._absorb(keep, **batch)
        else:  # decided on the device: no synchronization in the step
            for value in batch.values():
                value.masked_fill_(~finite, 0)
            self._absorb(torch.where(finite, keep, 1.0).to(self.count), **batch)
        return finite

    def _absorb(
        self, keep: float | Tensor, count: Tensor, mean_x: Tensor, mean_y: Tensor, xx: Tensor, xy: Tensor, yy: Tensor
    ) -> None:
        """`value.scaled(keep).merged(batch)` in place: the sums of wide layers are large, and this happens where a step's memory is at its peak."""
        before = self.count * keep
        self.count.copy_(before + count)
        weight = count / self.count.clamp(min=torch.finfo(self.count.dtype).tiny)
        dx, dy = mean_x - self.mean_x, mean_y - self.mean_y
        between = before * weight
        pulled = (between * dx).to(xx.dtype)
        xx.addr_(pulled, dx.to(xx.dtype))
        xy.addr_(pulled, dy.to(xy.dtype))
        for kept, new in ((self.xx, xx), (self.xy, xy), (self.yy, yy + between * dy.square())):
            if isinstance(keep, Tensor):
                kept.mul_(keep).add_(new)
            else:
                torch.add(new, kept, alpha=keep, out=kept)  # one pass
        self.mean_x.add_(weight * dx)
        self.mean_y.add_(weight * dy)

    @torch.no_grad()
    def share(self, group: ProcessGroup) -> Moments:
        """Moments over all processes. Each then holds an equal part of them, so that the state of any one of them can be saved and loaded into all.

        Collective: every process calls it at the same step.
        """
        total = self.value.reduced(group)
        if group.size > 1:
            for name, value in vars(total.scaled(1 / group.size)).items():
                getattr(self, name).copy_(value)
        return total

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        device = fn(torch.empty(0, device=self.count.device)).device
        place = torch.device("cpu") if device.type == "mps" else device
        for name in FIELDS:
            self._buffers[name] = getattr(self, name).to(place)
        return self

    def extra_repr(self) -> str:
        """Sizes."""
        return f"source_columns={len(self.get_buffer('mean_x'))}, target_channels={len(self.get_buffer('mean_y'))}, kernel_size={self.kernel_size}"


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
            self._sum, self._product = (
                torch.zeros_like(self._about),
                torch.zeros(len(self._about), len(self._about)).to(self._about),
            )
        self.count += len(rows)
        self._waiting.append(rows - self._about.to(rows))
        if sum(map(len, self._waiting)) >= ROW_BUFFER_SIZE:
            self._flush()

    def moments(self) -> Moments:
        """With the first column for a target."""
        self._flush()
        off = self._sum / self.count
        xx = self._product.addr(off, off, alpha=-self.count)
        mean = self._about + off
        return Moments(
            torch.tensor(float(self.count), dtype=torch.float64, device=xx.device),
            mean,
            mean[:1],
            xx,
            xx[:, :1],
            xx[0, :1],
        )

    def _flush(self) -> None:
        if self._waiting:
            rows = torch.cat(self._waiting)
            self._waiting = []
            self._sum += rows.sum(0, dtype=torch.float64)
            with full_precision(rows.device):
                gram([rows.T], self._product)
