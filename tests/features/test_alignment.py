"""The source, and only the source, is brought to the target's grid."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from knowiso_train.errors import ShapeError
from knowiso_train.features import align


def test_equal_grids_are_untouched() -> None:
    x = torch.randn(2, 3, 5, 7)
    assert align(x, (5, 7)) is x


def test_finer_is_pooled() -> None:
    x = torch.randn(2, 3, 8, 4)
    torch.testing.assert_close(align(x, (4, 2)), F.avg_pool2d(x, 2))
    torch.testing.assert_close(align(x, (3, 2)), F.adaptive_avg_pool2d(x, (3, 2)))


def test_coarser_is_interpolated() -> None:
    x = torch.randn(2, 3, 4, 2)
    torch.testing.assert_close(align(x, (8, 5)), F.interpolate(x, size=(8, 5), mode="bilinear", align_corners=False))


def test_mixed_axes_are_treated_separately() -> None:
    columns = torch.arange(4.0).expand(1, 1, 8, 4)  # constant along the finer axis, so pooling must not show
    torch.testing.assert_close(align(columns, (2, 8)), F.interpolate(columns[:, :, :2], size=(2, 8), mode="bilinear"))
    rows = torch.arange(8.0).view(1, 1, 8, 1).expand(1, 1, 8, 4)
    torch.testing.assert_close(align(rows, (4, 8))[0, 0, :, 3], torch.tensor([0.5, 2.5, 4.5, 6.5]))


def test_one_position_is_broadcast() -> None:
    x = torch.randn(2, 3, 1, 1)
    out = align(x, (4, 5))
    assert out.shape == (2, 3, 4, 5)
    assert out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert bool((out == x).all())


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 3, 2, 2), (2, 3, 8, 2), (2, 3, 1, 1)])
def test_gradient(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: align(x, (4, 4)), x)


def test_float32_under_bf16_autocast_stays_float32() -> None:
    x = torch.randn(2, 3, 8, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = align(x, (4, 4))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, align(x, (4, 4)))


@pytest.mark.parametrize(
    ("shape", "grid"), [((2, 3, 4), (4, 4)), ((2, 3, 0, 4), (4, 4)), ((2, 3, 4, 4), (0, 4)), ((2, 3, 4, 4), (4,))]
)
def test_what_has_no_grid_is_refused(shape: tuple[int, ...], grid: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError):
        align(torch.zeros(shape), grid)  # type: ignore[arg-type]
