"""Energy from the Gram matrix against the residual itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from knowiso_train.distillation._closed_form_map import ClosedFormMap
from knowiso_train.errors import ShapeError
from knowiso_train.ops import gram_residual_energy, residual_energy


def case(n: int, c: int, d: int, grid: tuple[int, int], dtype: torch.dtype, offset: float = 0.0) -> tuple[Tensor, ...]:
    torch.manual_seed(n + c)
    x, weight = torch.randn(n, c, *grid, dtype=torch.float64) + offset, torch.randn(d, c, dtype=torch.float64) / c**0.5
    y = torch.einsum("dc,nchw->ndhw", weight, x) + 0.3 * torch.randn(n, d, *grid, dtype=torch.float64)
    mean_x = x.mean((0, 2, 3))
    return tuple(tensor.to(dtype) for tensor in (x, y, weight, weight.T @ weight, mean_x, weight @ mean_x + 0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("n", "c", "d", "grid"), [(3, 41, 97, (13, 7)), (1, 1, 2, (1, 1)), (5, 4, 3, (1, 9)), (200, 8, 64, (8, 8))], ids=str
)
def test_equal_to_the_residual_in_float64(n: int, c: int, d: int, grid: tuple[int, int], dtype: torch.dtype) -> None:
    x, y, weight, gram, mean_x, mean_y = case(n, c, d, grid, dtype)
    weight, gram = weight.float(), weight.double().T @ weight.double()
    x.requires_grad_()
    energy = gram_residual_energy(
        x.to(memory_format=torch.channels_last), y, weight, gram, mean_x.float(), mean_y.float()
    )
    (3.0 * energy).backward()
    exact = x.detach().double().requires_grad_()
    residual = (
        y.double()
        - mean_y.double().view(-1, 1, 1)
        - torch.einsum("dc,nchw->ndhw", weight.double(), exact - mean_x.double().view(-1, 1, 1))
    )
    (3.0 * residual.square().sum()).backward()
    assert energy.dtype == torch.float32
    torch.testing.assert_close(energy.double(), residual.square().sum(), rtol=1e-5, atol=1e-6)
    scale = float(exact.grad.abs().max())
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=0, atol=scale * {4: 1e-5, 2: 1e-2}[dtype.itemsize])


@pytest.mark.parametrize("offset", [0.0, 3.0])
@pytest.mark.parametrize(("unexplained", "tolerance"), [(0.2, 0.02), (0.01, 0.08)])
def test_products_in_bfloat16_keep_energy_and_gradient(offset: float, unexplained: float, tolerance: float) -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(16, 32, 8, 8) + offset).bfloat16(), torch.randn(24, 32, 3, 3) / 17
    exact = x.double().requires_grad_()
    prediction = F.conv2d(exact, weight.double(), padding=1)
    bias = -prediction.detach().mean((0, 2, 3))
    prediction = prediction + bias.view(-1, 1, 1)
    noise = torch.randn_like(prediction) * prediction.detach().std() * unexplained**0.5
    target = prediction.detach() + noise
    (prediction - target).square().sum().backward()
    energy = residual_energy(x.requires_grad_(), target.float(), weight, bias.float())
    energy.backward()
    assert float(energy.detach()) == pytest.approx(float(noise.square().sum()), rel=0.01)
    difference = x.grad.double() - exact.grad
    assert float(difference.norm()) < tolerance * float(exact.grad.norm())


def test_gradcheck() -> None:
    x, *rest = case(2, 3, 7, (2, 3), torch.float64)
    assert torch.autograd.gradcheck(lambda x: gram_residual_energy(x, *rest), x.requires_grad_())


def test_a_large_offset_costs_no_digits() -> None:
    """Means of a hundred standard deviations, as in the outlier channels of transformers."""
    single, double = (case(4, 16, 64, (5, 5), dtype, offset=100.0) for dtype in (torch.float32, torch.float64))
    torch.testing.assert_close(gram_residual_energy(*single).double(), gram_residual_energy(*double), rtol=1e-3, atol=0)


@pytest.mark.parametrize("wide", [24, 8])
def test_the_moment_form_takes_the_gram_matrix_for_wide_teachers_and_means_the_same(wide: int) -> None:
    torch.manual_seed(0)
    map_ = ClosedFormMap(6, wide)
    mixing = torch.randn(wide, 6)
    for _ in range(30):
        x = torch.randn(16, 6, 4, 4) + 2
        y = torch.einsum("dc,nchw->ndhw", mixing, x) + torch.randn(16, wide, 4, 4)
        map_(x, y)
    x.requires_grad_()
    ours, plain = (
        map_.unexplained(x, y),
        residual_energy(x, y, map_.weight, map_.bias) / y[:, 0].numel() / map_.variance,
    )
    assert map_.use_gram == (wide == 24)
    assert 0.05 < ours.item() < 0.3
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(plain, x), rtol=1e-4, atol=1e-8)

    loaded = ClosedFormMap(6, wide)
    loaded.load_state_dict(map_.state_dict())
    assert torch.equal(loaded.gram, map_.gram)
    assert torch.equal(loaded.unexplained(x, y), ours)


def test_shapes_that_do_not_fit() -> None:
    good = case(2, 3, 7, (2, 3), torch.float32)
    for index, wrong in (
        (0, torch.zeros(0, 3, 2, 3)),
        (0, torch.zeros(2, 4, 2, 3)),
        (1, torch.zeros(2, 7, 3, 3)),
        (3, torch.zeros(7, 7)),
    ):
        with pytest.raises(ShapeError, match="expected x"):
            gram_residual_energy(*good[:index], wrong, *good[index + 1 :])
