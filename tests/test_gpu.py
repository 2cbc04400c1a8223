"""Test what only a GPU has: TF32, autocast, compiled networks and streams.

`test_device_parity.py` compares the other computations with the CPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from knowiso_train.ops import gram_residual_energy, residual_energy
from knowiso_train.ops.reference import residual_energy as plain_energy
from knowiso_train.ops.triton import dispatch as kernels
from knowiso_train.regression import StreamingMoments
from tests.ops.test_operations import close, normal
from tests.test_device_parity import train_losses

pytestmark = pytest.mark.gpu


def test_moments_equal_those_of_the_cpu_although_tf32_is_allowed() -> None:
    x, y = torch.randn(40, 6, 9, 7) + 3, torch.randn(40, 4, 9, 7)
    on_cpu, on_gpu = StreamingMoments(6, 4, 3), StreamingMoments(6, 4, 3, "cuda")
    on_cpu.update(x, y)
    torch.set_float32_matmul_precision("high")
    try:
        on_gpu.update(x.cuda(), y.cuda())
    finally:
        torch.set_float32_matmul_precision("highest")
    for name, value in on_cpu.state_dict().items():
        torch.testing.assert_close(on_gpu.state_dict()[name].cpu(), value, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [16, 128, kernels.MAX_SOURCE_CHANNELS, 2 * kernels.MAX_SOURCE_CHANNELS])
def test_energies_run_and_are_correct_at_every_width(channels: int, dtype: torch.dtype) -> None:
    x, y = normal(8, channels, 14, 14, dtype=dtype), normal(8, 2 * channels, 14, 14, seed=1, dtype=dtype)
    weight, zero = (
        normal(2 * channels, channels, 1, 1, seed=2) / channels**0.5,
        torch.zeros(2 * channels, device="cuda"),
    )
    matrix = weight[:, :, 0, 0]
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected = plain_energy(x.double(), y.double(), weight.double())
        close(residual_energy(x.requires_grad_(), y, weight), expected, dtype)
        close(gram_residual_energy(x, y, matrix, matrix.T @ matrix, zero[:channels], zero), expected, dtype)


def test_the_energy_of_a_fixed_map_uses_no_tf32() -> None:
    x, weight = normal(9, 41, 13, 7, offset=3.0), normal(97, 41, seed=2) / 41**0.5
    y = torch.einsum("dc,nchw->ndhw", weight, x) + 0.03 * normal(9, 97, 13, 7, seed=3)
    map_and_means = (weight, weight.T @ weight, x.mean((0, 2, 3)), y.mean((0, 2, 3)))
    expected = gram_residual_energy(x.double(), y.double(), *(tensor.double() for tensor in map_and_means))
    allowed = torch.backends.cudnn.flags(enabled=True, allow_tf32=True)
    torch.set_float32_matmul_precision("high")
    try:
        with allowed:
            actual = gram_residual_energy(x.requires_grad_(), y, *map_and_means)
            assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("options", [{}, {"solver": "learned"}, {"target": "consensus"}], ids=str)
def test_bfloat16_autocast_gives_losses_within_five_percent(options: dict[str, Any]) -> None:
    assert train_losses("cuda", autocast=True, **options) == pytest.approx(train_losses("cuda", **options), rel=0.05)


def test_a_compiled_student_has_the_same_losses() -> None:
    assert train_losses("cuda", torch.compile) == pytest.approx(train_losses("cuda"), rel=2e-3)
