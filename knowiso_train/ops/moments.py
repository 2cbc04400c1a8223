"""Second moments of patches without writing the patches out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library

from knowiso_train.errors import ShapeError
from knowiso_train.ops.im2col import patch_rows
from knowiso_train.ops.linalg import chunk_slices, mirror_triangle, triangle_bands

# Of rows that are alive at once on a CPU, about what a core's cache holds, but as much as the sums that they are added
# to
MOMENTS_CHUNK_BYTES = 2**20
BAND = 512  # columns, at least, of a product that takes half of a symmetric one
Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Window = tuple[slice, slice]


def moments(x: Tensor, y: Tensor, kernel_size: int = 1) -> Five:
    """Means of source patches and targets, `Σ (x - mean)(x - mean)ᵀ`, `Σ (x - mean)(y - mean)ᵀ` and the diagonal of the target's own.

    Differentiable with respect to both. Halves are raised to float32.

    Args:
        x: (N, C, H, W); enters as its zero-padded k×k patches, d = k² · C columns in the order of `patch_rows`.
        y: (N, D, H, W), on the same grid.
        kernel_size: odd k.

    Returns:
        (d,), (D,), (d, d), (d, D), (D,), float32 or float64.

    Raises:
        ShapeError: features that do not share batch and grid, nothing in them, or an even k.

    Example:
        >>> [tuple(part.shape) for part in moments(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4), 3)]
        [(27,), (5,), (27, 27), (27, 5), (5,)]
    """
    if (
        x.ndim != 4
        or y.ndim != 4
        or not x.numel()
        or not y.numel()
        or (len(y), *y.shape[2:]) != (len(x), *x.shape[2:])
        or kernel_size % 2 == 0
    ):
        raise ShapeError(
            f"expected x (N, C, H, W) and y (N, D, H, W) with N, H, W > 0 and an odd kernel size; "
            f"got {tuple(x.shape)}, {tuple(y.shape)} and {kernel_size}"
        )
    result: Five = _moments(x, y, kernel_size)
    return result


def _dtype(x: Tensor, y: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)


def _parts(x: Tensor, rows: int, sums: int = 0) -> list[slice]:
    """Slices of images whose `rows`-wide rows fit a chunk; `sums` is what is added to, in bytes."""
    return chunk_slices(x, x.shape[2] * x.shape[3] * rows * 4, max(MOMENTS_CHUNK_BYTES, sums))


@library.custom_op("knowiso::moments", mutates_args=())
def _moments(x: Tensor, y: Tensor, kernel_size: int) -> Five:
    with torch.autocast(x.device.type, enabled=False):
        # A GPU takes more time to launch what saves products than it has to multiply
        if kernel_size == 1 or x.device.type != "cpu":
            return _written(x, y, kernel_size)
        return _Patches(x, y, kernel_size).summed()


def _middle(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean per channel; a chunk at a time where the dtype has to be raised."""
    return x.mean((0, 2, 3), dtype=dtype)


def _written(x: Tensor, y: Tensor, kernel_size: int) -> Five:
    """From rows that are written out, a chunk of images at a time."""
    dtype = _dtype(x, y)
    mean_x = (
        _middle(x, dtype) if kernel_size == 1 else patch_rows(x.mean(0, keepdim=True, dtype=dtype), kernel_size).mean(0)
    )
    mean_y = _middle(y, dtype)
    xx, xy = (torch.zeros(len(mean_x), width, dtype=dtype, device=x.device) for width in (len(mean_x), y.shape[1]))
    yy = torch.zeros(y.shape[1], dtype=dtype, device=x.device)
    parts = _bands(len(mean_x), x.device)
    for part in _parts(x, len(mean_x) + y.shape[1], xx.nbytes + xy.nbytes):
        rows_x = patch_rows(x[part].to(dtype), kernel_size) - mean_x
        rows_y = patch_rows(y[part].to(dtype), 1) - mean_y
        for band in parts:
            xx[band, band.start :].addmm_(rows_x[:, band].T, rows_x[:, band.start :])
        xy.addmm_(rows_x.T, rows_y)
        yy += torch.linalg.vecdot(rows_y, rows_y, dim=0)
    mirror_triangle(xx, parts)
    return mean_x, mean_y, xx, xy, yy


def _bands(columns: int, device: torch.device) -> list[slice]:
    """Several on a GPU, where they are wide enough to keep it busy."""
    wide = columns if device.type == "cpu" else max(BAND, -(-columns // 4))
    return triangle_bands(columns, wide)


class _Patches:
    """Moments of k×k patches from products of shifted views of one padded copy.

    Its rows go image by image and line by line, with k - 1 zeros after every line and k - 1 lines of zeros after every
    image, so that a shift within
    the patch is a shift of the flat row number, and what leaves the grid meets zeros.
    """

    def __init__(self, x: Tensor, y: Tensor, k: int) -> None:
        self.x, self.y, self.k, self.margin = x, y, k, k // 2
        self.dtype = _dtype(x, y)
        self.height, self.width, self.channels = x.shape[2], x.shape[3], x.shape[1]
        self.offsets = [(i - self.margin, j - self.margin) for i in range(k) for j in range(k)]
        self.line = self.width + k - 1
        self.middle_x, self.middle_y = _middle(x, self.dtype), _middle(y, self.dtype)

    def summed(self) -> Five:
        channels, wide, gap = self.channels, self.y.shape[1], self.k - 1
        differences = [(i, j) for i in range(gap + 1) for j in range(-gap, gap + 1) if (i, j) >= (0, 0)]
        pairs = [(a, b) for a in range(self.k**2) for b in range(a, self.k**2)]
        new: dict[str, Any] = {"dtype": self.dtype, "device": self.x.device}
        shared = {difference: torch.zeros(channels, channels, **new) for difference in differences}
        xx = torch.zeros(self.k**2 * channels, self.k**2 * channels, **new)
        blocks = xx.view(self.k**2, channels, self.k**2, channels)
        cross = torch.zeros(self.k**2, channels, wide, **new)
        yy = torch.zeros(wide, **new)
        field_x, field_y = (
            torch.zeros(self.height, self.width, c, dtype=torch.float64, device=self.x.device) for c in (channels, wide)
        )

        def add(part: slice) -> None:
            x, y = self._padded(self.x[part], self.middle_x), self._padded(self.y[part], self.middle_y)
            field_x.add_(x[:, : self.height, : self.width].sum(0, dtype=torch.float64))
            field_y.add_(y[:, : self.height, : self.width].sum(0, dtype=torch.float64))
            flat_x, flat_y = x.flatten(0, 2), y.flatten(0, 2)
            for (i, j), total in shared.items():
                shift = i * self.line + j
                total.addmm_(flat_x[: len(flat_x) - shift].T, flat_x[shift:])
            for at, (i, j) in enumerate(self.offsets):
                shift = i * self.line + j
                source, target = (
                    (flat_x[shift:], flat_y[: len(flat_y) - shift]) if shift >= 0 else (flat_x[:shift], flat_y[-shift:])
                )
                cross[at].addmm_(source.T, target)
            for a, b in pairs:
                self._take_out(blocks[a, :, b], x, a, b)
            yy.add_(torch.linalg.vecdot(flat_y, flat_y, dim=0))

        for part in _parts(self.x, (channels + wide) * self.line * (self.height + gap) // (self.height * self.width)):
            add(part)
        for a, b in pairs:
            (ai, aj), (bi, bj) = self.offsets[a], self.offsets[b]
            blocks[a, :, b] += shared[bi - ai, bj - aj]
        return self._centered(pairs, xx, cross.flatten(0, 1), yy, field_x, field_y)

    def _padded(self, feature: Tensor, middle: Tensor) -> Tensor:
        """(n, H + k - 1, W + k - 1, C), about the mean."""
        rows = feature.new_zeros(
            (len(feature), self.height + self.k - 1, self.line, feature.shape[1]), dtype=self.dtype
        )
        torch.sub(feature.permute(0, 2, 3, 1), middle, out=rows[:, : self.height, : self.width])
        return rows

    def _outside(self, a: int) -> list[tuple[slice, slice]]:
        """Rectangles of grid cells q with q - a outside the grid, which no patch reaches at offset a: lines, then columns less those lines."""
        (i, j), (h, w) = self.offsets[a], (self.height, self.width)
        lines = slice(0, min(i, h)) if i > 0 else slice(max(h + i, 0), h)
        rest = slice(min(i, h), h) if i > 0 else slice(0, max(h + i, 0))
        columns = slice(0, min(j, w)) if j > 0 else slice(max(w + j, 0), w)
        return [(lines, slice(0, w)), (rest, columns)]

    def _take_out(self, total: Tensor, x: Tensor, a: int, b: int) -> None:
        """Subtract what the shared product counts at cells that no patch reaches at offset a."""
        di, dj = (self.offsets[b][axis] - self.offsets[a][axis] for axis in (0, 1))
        for lines, columns in self._outside(a):
            low, high = max(lines.start, -di), min(lines.stop, self.height - di)
            left, right = max(columns.start, -dj), min(columns.stop, self.width - dj)
            if low < high and left < right:
                here = x[:, low:high, left:right].flatten(0, 2)
                there = x[:, low + di : high + di, left + dj : right + dj].flatten(0, 2)
                total.addmm_(here.T, there, alpha=-1)

    def _centered(
        self, pairs: list[tuple[int, int]], xx: Tensor, xy: Tensor, yy: Tensor, field_x: Tensor, field_y: Tensor
    ) -> Five:
        """In place, from sums about the channel means to sums about the means of the patches' columns, in which padding counts as zero.

        With x = x' + m inside the grid and 0 outside, all that is needed beside the products are sums of x' over
        rectangles.
        """
        images, cells, channels = len(self.x), self.height * self.width, self.channels
        rows = images * cells
        m, middle_y = self.middle_x.double(), self.middle_y.double()
        inside = [self._window(a) for a in range(self.k**2)]
        counts = [images * _size(window) for window in inside]
        sums = [_sum(field_x, window) + count * m for window, count in zip(inside, counts, strict=True)]
        means = torch.stack(sums) / rows
        drift = field_y.sum((0, 1))  # of rounding; 0 in exact arithmetic
        blocks, cross = xx.view(self.k**2, channels, self.k**2, channels), xy.view(self.k**2, channels, -1)
        for a, b in pairs:
            both = _meet(inside[a], inside[b], self.offsets[a], self.offsets[b])
            left, right, count = _sum(field_x, both[0]), _sum(field_x, both[1]), images * _size(both[0])
            block = blocks[a, :, b].double()
            block += torch.outer(left, m) + torch.outer(m, right + count * m) - rows * torch.outer(means[a], means[b])
            blocks[a, :, b] = block
            blocks[b, :, a] = block.T
        for a, (i, j) in enumerate(self.offsets):
            under = _shifted(inside[a], -i, -j)  # positions whose neighbor at offset a lies in the grid
            block = cross[a].double() + torch.outer(m, _sum(field_y, under)) - torch.outer(means[a], drift)
            cross[a] = block
        yy = (yy.double() - drift.square() / rows).to(self.dtype)
        return means.flatten().to(self.dtype), (middle_y + drift / rows).to(self.dtype), xx, xy, yy

    def _window(self, a: int) -> tuple[slice, slice]:
        """Grid cells that some patch reaches at offset a."""
        (i, j), (h, w) = self.offsets[a], (self.height, self.width)
        return slice(max(i, 0), max(min(h, h + i), max(i, 0))), slice(max(j, 0), max(min(w, w + j), max(j, 0)))


def _size(window: Window) -> int:
    lines, columns = window
    return int((lines.stop - lines.start) * (columns.stop - columns.start))


def _sum(field: Tensor, window: Window) -> Tensor:
    return field[window].sum((0, 1))


def _shifted(window: Window, i: int, j: int) -> Window:
    return slice(window[0].start + i, window[0].stop + i), slice(window[1].start + j, window[1].stop + j)


def _meet(first: Window, second: Window, a: tuple[int, int], b: tuple[int, int]) -> tuple[Window, Window]:
    """Cells p + a and cells p + b over the positions p where both lie in the grid."""
    of_a, of_b = _shifted(first, -a[0], -a[1]), _shifted(second, -b[0], -b[1])
    starts = [max(of_a[axis].start, of_b[axis].start) for axis in (0, 1)]
    stops = [max(min(of_a[axis].stop, of_b[axis].stop), starts[axis]) for axis in (0, 1)]
    shared = slice(starts[0], stops[0]), slice(starts[1], stops[1])
    return _shifted(shared, *a), _shifted(shared, *b)


@_moments.register_fake
def _(x: Tensor, y: Tensor, kernel_size: int) -> Five:
    d, c, dtype = kernel_size**2 * x.shape[1], y.shape[1], _dtype(x, y)
    return tuple(x.new_empty(shape, dtype=dtype) for shape in ((d,), (c,), (d, d), (d, c), (c,)))  # type: ignore[return-value]


@library.custom_op("knowiso::moments_backward", mutates_args=())
def _moments_backward(
    x: Tensor,
    y: Tensor,
    kernel_size: int,
    mean_x: Tensor,
    mean_y: Tensor,
    of_mean_x: Tensor,
    of_mean_y: Tensor,
    of_xx: Tensor,
    of_xy: Tensor,
    of_yy: Tensor,
) -> tuple[Tensor, Tensor]:
    """Patches are written out again, a chunk at a time: `dP = P_c (G + Gᵀ) + Y_c G_xyᵀ + g / n`, and back through the patches."""
    rows = len(x) * x.shape[2] * x.shape[3]
    by_x, by_y = torch.empty_like(x), torch.empty_like(y)
    both_ways = of_xx + of_xx.T
    for part in _parts(x, len(mean_x) + len(mean_y)):
        rows_x = patch_rows(x[part].to(mean_x.dtype), kernel_size) - mean_x
        rows_y = patch_rows(y[part].to(mean_x.dtype), 1) - mean_y
        pulled_x = rows_x @ both_ways + rows_y @ of_xy.T + of_mean_x / rows
        pulled_y = rows_x @ of_xy + 2 * rows_y * of_yy + of_mean_y / rows
        n, height, width = len(x[part]), x.shape[2], x.shape[3]
        columns = pulled_x.view(n, height * width, kernel_size**2, -1).permute(0, 3, 2, 1).flatten(1, 2)
        by_x[part] = F.fold(columns, (height, width), kernel_size, padding=kernel_size // 2)
        by_y[part] = pulled_y.view(n, height, width, -1).permute(0, 3, 1, 2)
    return by_x, by_y


@_moments_backward.register_fake
def _(x: Tensor, y: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(y)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Five) -> None:
    x, y, ctx.kernel_size = inputs
    ctx.save_for_backward(x, y, *output[:2])


def _pull(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
    x, y, mean_x, mean_y = ctx.saved_tensors
    return *_moments_backward(x, y, ctx.kernel_size, mean_x, mean_y, *upstream), None


_moments.register_autograd(_pull, setup_context=_keep)
