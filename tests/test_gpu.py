"""What only a GPU does: TF32, autocast, compiled networks, real streams. `test_other_device.py` has what it should do as well as a CPU."""

from __future__ import annotations

import pytest
import torch

from knowiso_train.ops import gram_residual_energy, residual_energy
from knowiso_train.ops.reference import residual_energy as plain_energy
from knowiso_train.ops.triton import dispatch as kernels
from knowiso_train.regression import StreamingMoments
from tests.ops.test_operations import close, normal
from tests.test_device_parity import trained

pytestmark = pytest.mark.gpu


def test_moments_on_the_gpu_equal_those_on_the_cpu_also_with_tf32_allowed() -> None:
    x, y = torch.randn(40, 6, 9, 7) + 3, torch.randn(40, 4, 9, 7)
    here, there = StreamingMoments(6, 4, 3), StreamingMoments(6, 4, 3, "cuda")
    here.update(x, y)
    torch.set_float32_matmul_precision("high")
    try:
        there.update(x.cuda(), y.cuda())
    finally:
        torch.set_float32_matmul_precision("highest")
    for name, value in here.state_dict().items():
        torch.testing.assert_close(there.state_dict()[name].cpu(), value, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [16, 128, kernels.MAX_SOURCE_CHANNELS, 2 * kernels.MAX_SOURCE_CHANNELS])
def test_energies_of_every_width_have_a_way_that_fits_the_chip(channels: int, dtype: torch.dtype) -> None:
    x, y = normal(8, channels, 14, 14, dtype=dtype), normal(8, 2 * channels, 14, 14, seed=1, dtype=dtype)
    weight, zero = (
        normal(2 * channels, channels, 1, 1, seed=2) / channels**0.5,
        torch.zeros(2 * channels, device="cuda"),
    )
    map_ = weight[:, :, 0, 0]
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        wanted = plain_energy(x.double(), y.double(), weight.double())
        close(residual_energy(x.requires_grad_(), y, weight), wanted, dtype)
        close(gram_residual_energy(x, y, map_, map_.T @ map_, zero[:channels], zero), wanted, dtype)


def test_the_energy_of_a_fixed_map_uses_no_tf32_where_it_is_allowed() -> None:
    x, weight = normal(9, 41, 13, 7, offset=3.0), normal(97, 41, seed=2) / 41**0.5
    y = torch.einsum("dc,nchw->ndhw", weight, x) + 0.03 * normal(9, 97, 13, 7, seed=3)
    rest = (weight, weight.T @ weight, x.mean((0, 2, 3)), y.mean((0, 2, 3)))
    wanted = gram_residual_energy(x.double(), y.double(), *(tensor.double() for tensor in rest))
    allowed = torch.backends.cudnn.flags(enabled=True, allow_tf32=True)
    torch.set_float32_matmul_precision("high")
    try:
        with allowed:
            found = gram_residual_energy(x.requires_grad_(), y, *rest)
            assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("form", ["moment", "learned", "consensus"])
def test_half_of_the_digits_train_as_well(form: str) -> None:
    assert trained("cuda", form, autocast=True) == pytest.approx(trained("cuda", form), rel=0.05)


def test_a_compiled_student_trains_the_same() -> None:
    assert trained("cuda", "moment", torch.compile) == pytest.approx(trained("cuda", "moment"), rel=2e-3)
