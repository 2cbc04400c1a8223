"""Moments of a feature pair that changes while it is watched: earlier rows are forgotten exponentially."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Self

import torch
from torch import Tensor, nn

from knowiso_train.statistics.distributed import Group
from knowiso_train.statistics.moments import Moments, batch_moments

FIELDS = tuple(field.name for field in fields(Moments))


class RunningMoments(nn.Module):
    """Exponentially forgotten moments, part of a module's state.

    Always float64, whatever the module is cast to, and on the CPU where the device has no float64 (MPS).

    Forgetting is linear in the rows, so the states of processes that see parts of every batch add up to the state of one process that sees it whole.

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
            name: value.to(self.count.device) for name, value in vars(batch_moments(x.detach(), y.detach(), self.kernel_size, positions)).items()
        }
        finite: Tensor = (batch["xx"].sum() + batch["yy"].sum()).isfinite()
        if finite.device.type == "cpu":
            if bool(finite):
                self._absorb(keep, **batch)
        else:  # decided on the device: no synchronisation in the step
            for value in batch.values():
                value.masked_fill_(~finite, 0)
            self._absorb(torch.where(finite, keep, 1.0).to(self.count), **batch)
        return finite

    def _absorb(self, keep: float | Tensor, count: Tensor, mean_x: Tensor, mean_y: Tensor, xx: Tensor, xy: Tensor, yy: Tensor) -> None:
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
    def share(self, group: Group) -> Moments:
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
