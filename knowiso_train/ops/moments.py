"""Second moments of patches, on a CPU without writing the patches out.

Derivation of the implicit form (`_ImplicitPatches`), for one offset pair (a, b) of a k×k patch. The patch at position p
takes the zero-padded feature at p + a and p + b, so its block of the Gram matrix is

    B_ab = Σ_{p in grid} x(p + a) x(p + b)ᵀ,   x = 0 outside the grid.

1. Substitute q = p + a. Over all positions q of the plane, `P_d = Σ_q x(q) x(q + d)ᵀ` depends on the difference
   d = b - a alone: k⁴ blocks need only about 2 k² products, each on shifted views of one padded copy.
2. q = p + a runs over the grid shifted by a only, so B_ab is P_{b-a} less the terms with q in the grid and q - a
   outside. These q form a border of at most two rectangles, |a| lines or columns wide.
3. Centering: products are taken of x' = x - m with the channel mean m, to keep digits. Padding counts as x = 0, not as
   x' = 0. Let I(q) be 1 in the grid and 0 outside, so that x = x' + I m. Over the positions with both cells in the grid
   (their number is n_ab, and L, R are the sums of x' over the cells p + a and p + b):
   `Σ x xᵀ = Σ x' x'ᵀ + L mᵀ + m Rᵀ + n_ab m mᵀ`. All sums are over rectangles of one field of per-position sums.
   The means μ_a of the columns follow likewise, and `S_ab = B_ab - n μ_a μ_bᵀ` with n patches.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library

from knowiso_train.errors import ShapeError
from knowiso_train.ops.im2col import patch_rows
from knowiso_train.ops.linalg import chunk_slices, mirror_triangle, triangle_bands

# Bytes of samples in memory at once on a CPU, about the cache of a core; at least as much as the sums they are added to
MOMENTS_CHUNK_BYTES = 2**20
# Bands of the upper triangle of a symmetric product: narrower ones save products, wider ones keep the device busy
MIN_CPU_BAND_COLUMNS, MAX_CPU_BANDS = 128, 8
MIN_GPU_BAND_COLUMNS, MAX_GPU_BANDS = 512, 4
MomentTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Window = tuple[slice, slice]


def moments(x: Tensor, y: Tensor, kernel_size: int = 1) -> MomentTensors:
    """Return means and centered second moments of source patches and targets.

    Both features get gradients. Half precision is raised to float32.

    Args:
        x: Source, (N, C, H, W); it enters as zero-padded k×k patches, d = k² · C features in the order of `patch_rows`.
        y: Target, (N, D, H, W), on the same grid.
        kernel_size: Odd k.

    Returns:
        The means (d,) and (D,), `Σ (x - mean)(x - mean)ᵀ` (d, d), `Σ (x - mean)(y - mean)ᵀ` (d, D) and the diagonal of
        `Σ (y - mean)(y - mean)ᵀ` (D,), float32 or float64.

    Raises:
        ShapeError: Features without a common batch and grid, empty features, or an even k.

    Examples:
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
    result: MomentTensors = _moments(x, y, kernel_size)
    return result


def _dtype(x: Tensor, y: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)


def _chunks(x: Tensor, num_columns: int, sum_bytes: int = 0) -> list[slice]:
    """Return slices of images whose samples of `num_columns` values fit a chunk, which is at least `sum_bytes`."""
    return chunk_slices(x, x.shape[2] * x.shape[3] * num_columns * 4, max(MOMENTS_CHUNK_BYTES, sum_bytes))


@library.custom_op("knowiso::moments", mutates_args=())
def _moments(x: Tensor, y: Tensor, kernel_size: int) -> MomentTensors:
    with torch.autocast(x.device.type, enabled=False):
        # On a GPU, launching the many small products of the implicit form takes longer than multiplying all patches
        if kernel_size == 1 or x.device.type != "cpu":
            return _explicit_moments(x, y, kernel_size)
        return _ImplicitPatches(x, y, kernel_size).moments()


def _channel_mean(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.mean((0, 2, 3), dtype=dtype)


def _explicit_moments(x: Tensor, y: Tensor, kernel_size: int) -> MomentTensors:
    """Compute the moments from patches that are written out, a chunk of images at a time."""
    dtype = _dtype(x, y)
    # The mean of the patches is the patches' mean of the mean image
    mean_x = (
        _channel_mean(x, dtype)
        if kernel_size == 1
        else patch_rows(x.mean(0, keepdim=True, dtype=dtype), kernel_size).mean(0)
    )
    mean_y = _channel_mean(y, dtype)
    xx, xy = (torch.zeros(len(mean_x), width, dtype=dtype, device=x.device) for width in (len(mean_x), y.shape[1]))
    yy = torch.zeros(y.shape[1], dtype=dtype, device=x.device)
    bands = _bands(len(mean_x), x.device)
    for part in _chunks(x, len(mean_x) + y.shape[1], xx.nbytes + xy.nbytes):
        rows_x = patch_rows(x[part].to(dtype), kernel_size) - mean_x
        rows_y = patch_rows(y[part].to(dtype), 1) - mean_y
        for band in bands:
            xx[band, band.start :].addmm_(rows_x[:, band].T, rows_x[:, band.start :])
        xy.addmm_(rows_x.T, rows_y)
        yy += torch.linalg.vecdot(rows_y, rows_y, dim=0)
    mirror_triangle(xx, bands)
    return mean_x, mean_y, xx, xy, yy


def _bands(columns: int, device: torch.device) -> list[slice]:
    """Return the bands of a symmetric product, which need about half of the products of all columns."""
    cpu = device.type == "cpu"
    min_columns, max_bands = (MIN_CPU_BAND_COLUMNS, MAX_CPU_BANDS) if cpu else (MIN_GPU_BAND_COLUMNS, MAX_GPU_BANDS)
    return triangle_bands(columns, max(min_columns, -(-columns // max_bands)))


class _ImplicitPatches:
    """Moments of k×k patches from products of shifted views of one padded copy, see the module for the derivation.

    The copy holds positions as rows, image by image and line by line. k - 1 zeros follow every line and k - 1 lines of
    zeros follow every image. A shift within the patch is then a shift of the flat row number, and positions outside the
    grid meet zeros.
    """

    def __init__(self, x: Tensor, y: Tensor, k: int) -> None:
        self.x, self.y, self.k, self.margin = x, y, k, k // 2
        self.dtype = _dtype(x, y)
        self.height, self.width, self.channels = x.shape[2], x.shape[3], x.shape[1]
        self.offsets = [(i - self.margin, j - self.margin) for i in range(k) for j in range(k)]
        self.line = self.width + k - 1
        self.channel_mean_x, self.channel_mean_y = _channel_mean(x, self.dtype), _channel_mean(y, self.dtype)

    def moments(self) -> MomentTensors:
        """Compute the moments."""
        channels, targets, gap = self.channels, self.y.shape[1], self.k - 1
        # P_{-d} = P_dᵀ, so half of the differences and the blocks with a ≤ b are enough
        differences = [(i, j) for i in range(gap + 1) for j in range(-gap, gap + 1) if (i, j) >= (0, 0)]
        pairs = [(a, b) for a in range(self.k**2) for b in range(a, self.k**2)]
        new: dict[str, Any] = {"dtype": self.dtype, "device": self.x.device}
        products = {difference: torch.zeros(channels, channels, **new) for difference in differences}
        xx = torch.zeros(self.k**2 * channels, self.k**2 * channels, **new)
        blocks = xx.view(self.k**2, channels, self.k**2, channels)
        xy = torch.zeros(self.k**2, channels, targets, **new)
        yy = torch.zeros(targets, **new)
        # Sums over images at each position
        field_x, field_y = (
            torch.zeros(self.height, self.width, c, dtype=torch.float64, device=self.x.device)
            for c in (channels, targets)
        )
        columns = (channels + targets) * self.line * (self.height + gap) // (self.height * self.width)
        for part in _chunks(self.x, columns):
            x = self._padded(self.x[part], self.channel_mean_x)
            y = self._padded(self.y[part], self.channel_mean_y)
            field_x.add_(x[:, : self.height, : self.width].sum(0, dtype=torch.float64))
            field_y.add_(y[:, : self.height, : self.width].sum(0, dtype=torch.float64))
            flat_x, flat_y = x.flatten(0, 2), y.flatten(0, 2)
            # Step 1: P_d
            for (i, j), total in products.items():
                shift = i * self.line + j
                total.addmm_(flat_x[: len(flat_x) - shift].T, flat_x[shift:])
            # Σ_p x(p + a) y(p)ᵀ needs no correction, since y is zero outside the grid
            for offset, (i, j) in enumerate(self.offsets):
                shift = i * self.line + j
                if shift >= 0:
                    source, target = flat_x[shift:], flat_y[: len(flat_y) - shift]
                else:
                    source, target = flat_x[:shift], flat_y[-shift:]
                xy[offset].addmm_(source.T, target)
            # Step 2: less the border
            for a, b in pairs:
                self._subtract_border(blocks[a, :, b], x, a, b)
            yy.add_(torch.linalg.vecdot(flat_y, flat_y, dim=0))
        for a, b in pairs:
            (ai, aj), (bi, bj) = self.offsets[a], self.offsets[b]
            blocks[a, :, b] += products[bi - ai, bj - aj]
        return self._center(pairs, xx, xy.flatten(0, 1), yy, field_x, field_y)

    def _padded(self, feature: Tensor, mean: Tensor) -> Tensor:
        """Return the feature less its channel mean with zeros after lines and images, (n, H + k - 1, W + k - 1, C)."""
        rows = feature.new_zeros(
            (len(feature), self.height + self.k - 1, self.line, feature.shape[1]), dtype=self.dtype
        )
        torch.sub(feature.permute(0, 2, 3, 1), mean, out=rows[:, : self.height, : self.width])
        return rows

    def _border(self, a: int) -> list[Window]:
        """Return the rectangles of grid cells q with q - a outside the grid: lines, then columns of other lines."""
        (i, j), (h, w) = self.offsets[a], (self.height, self.width)
        lines = slice(0, min(i, h)) if i > 0 else slice(max(h + i, 0), h)
        rest = slice(min(i, h), h) if i > 0 else slice(0, max(h + i, 0))
        columns = slice(0, min(j, w)) if j > 0 else slice(max(w + j, 0), w)
        return [(lines, slice(0, w)), (rest, columns)]

    def _subtract_border(self, total: Tensor, x: Tensor, a: int, b: int) -> None:
        """Subtract the terms x(q) x(q + b - a)ᵀ of the border of offset a from a block."""
        di, dj = (self.offsets[b][axis] - self.offsets[a][axis] for axis in (0, 1))
        for lines, columns in self._border(a):
            # q + b - a has to lie in the grid too, as x is zero elsewhere
            low, high = max(lines.start, -di), min(lines.stop, self.height - di)
            left, right = max(columns.start, -dj), min(columns.stop, self.width - dj)
            if low < high and left < right:
                at_q = x[:, low:high, left:right].flatten(0, 2)
                shifted = x[:, low + di : high + di, left + dj : right + dj].flatten(0, 2)
                total.addmm_(at_q.T, shifted, alpha=-1)

    def _center(
        self, pairs: list[tuple[int, int]], xx: Tensor, xy: Tensor, yy: Tensor, field_x: Tensor, field_y: Tensor
    ) -> MomentTensors:
        """Turn sums about the channel means into sums about the column means, in place (step 3)."""
        images, channels = len(self.x), self.channels
        rows = images * self.height * self.width
        m, mean_y = self.channel_mean_x.double(), self.channel_mean_y.double()
        inside = [self._window(a) for a in range(self.k**2)]
        counts = [images * _size(window) for window in inside]
        sums = [_sum(field_x, window) + count * m for window, count in zip(inside, counts, strict=True)]
        means = torch.stack(sums) / rows
        # The sum of y - mean_y is 0 in exact arithmetic; its rounding is taken into account
        drift = field_y.sum((0, 1))
        blocks, cross = xx.view(self.k**2, channels, self.k**2, channels), xy.view(self.k**2, channels, -1)
        for a, b in pairs:
            both = _intersect(inside[a], inside[b], self.offsets[a], self.offsets[b])
            left, right, count = _sum(field_x, both[0]), _sum(field_x, both[1]), images * _size(both[0])
            # A copy: for float64 and a = b the transpose below would overlap what it is written to
            block = blocks[a, :, b].to(torch.float64, copy=True)
            block += torch.outer(left, m) + torch.outer(m, right + count * m) - rows * torch.outer(means[a], means[b])
            blocks[a, :, b] = block
            blocks[b, :, a] = block.T
        for a, (i, j) in enumerate(self.offsets):
            # Positions p with p + a in the grid, where x = x' + m
            positions = _shift(inside[a], -i, -j)
            block = cross[a].double() + torch.outer(m, _sum(field_y, positions)) - torch.outer(means[a], drift)
            cross[a] = block
        yy = (yy.double() - drift.square() / rows).to(self.dtype)
        return means.flatten().to(self.dtype), (mean_y + drift / rows).to(self.dtype), xx, xy, yy

    def _window(self, a: int) -> Window:
        """Return the grid cells p + a of all positions p."""
        (i, j), (h, w) = self.offsets[a], (self.height, self.width)
        return slice(max(i, 0), max(min(h, h + i), max(i, 0))), slice(max(j, 0), max(min(w, w + j), max(j, 0)))


def _size(window: Window) -> int:
    lines, columns = window
    return int((lines.stop - lines.start) * (columns.stop - columns.start))


def _sum(field: Tensor, window: Window) -> Tensor:
    return field[window].sum((0, 1))


def _shift(window: Window, i: int, j: int) -> Window:
    return slice(window[0].start + i, window[0].stop + i), slice(window[1].start + j, window[1].stop + j)


def _intersect(first: Window, second: Window, a: tuple[int, int], b: tuple[int, int]) -> tuple[Window, Window]:
    """Return the cells p + a and the cells p + b of the positions p with both in the grid."""
    positions_a, positions_b = _shift(first, -a[0], -a[1]), _shift(second, -b[0], -b[1])
    starts = [max(positions_a[axis].start, positions_b[axis].start) for axis in (0, 1)]
    stops = [max(min(positions_a[axis].stop, positions_b[axis].stop), starts[axis]) for axis in (0, 1)]
    common = slice(starts[0], stops[0]), slice(starts[1], stops[1])
    return _shift(common, *a), _shift(common, *b)


@_moments.register_fake
def _(x: Tensor, y: Tensor, kernel_size: int) -> MomentTensors:
    d, c, dtype = kernel_size**2 * x.shape[1], y.shape[1], _dtype(x, y)
    shapes = ((d,), (c,), (d, d), (d, c), (c,))
    return tuple(x.new_empty(shape, dtype=dtype) for shape in shapes)  # type: ignore[return-value]


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
    """Return the gradients of both features from patches that are written out again, a chunk at a time."""
    # With centered patches P and targets Y, and the gradients G_xx, G_xy, g_yy, g_x, g_y of the five results:
    #   dP = P (G_xx + G_xxᵀ) + Y G_xyᵀ + g_x / n,   dY = P G_xy + 2 Y diag(g_yy) + g_y / n.
    # Centering adds nothing, as P and Y sum to zero. Folding the patches back sums dP over the patches of a cell.
    rows = len(x) * x.shape[2] * x.shape[3]
    by_x, by_y = torch.empty_like(x), torch.empty_like(y)
    symmetric_gradient = of_xx + of_xx.T
    for part in _chunks(x, len(mean_x) + len(mean_y)):
        rows_x = patch_rows(x[part].to(mean_x.dtype), kernel_size) - mean_x
        rows_y = patch_rows(y[part].to(mean_x.dtype), 1) - mean_y
        grad_patches = rows_x @ symmetric_gradient + rows_y @ of_xy.T + of_mean_x / rows
        grad_targets = rows_x @ of_xy + 2 * rows_y * of_yy + of_mean_y / rows
        n, height, width = len(x[part]), x.shape[2], x.shape[3]
        columns = grad_patches.view(n, height * width, kernel_size**2, -1).permute(0, 3, 2, 1).flatten(1, 2)
        by_x[part] = F.fold(columns, (height, width), kernel_size, padding=kernel_size // 2)
        by_y[part] = grad_targets.view(n, height, width, -1).permute(0, 3, 1, 2)
    return by_x, by_y


@_moments_backward.register_fake
def _(x: Tensor, y: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(y)


def _save_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: MomentTensors) -> None:
    x, y, ctx.kernel_size = inputs
    ctx.save_for_backward(x, y, *output[:2])


def _backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
    x, y, mean_x, mean_y = ctx.saved_tensors
    return *_moments_backward(x, y, ctx.kernel_size, mean_x, mean_y, *upstream), None


_moments.register_autograd(_backward, setup_context=_save_context)
