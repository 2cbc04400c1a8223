"""Muon against its formulas, and the choice of optimizer by parameter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from knowiso_train.optim import ADAM_BETAS, BIAS_LR_FACTOR, FINETUNE_BIAS_LR_FACTOR, Muon, build_optimizers


def planted(*shape: int) -> tuple[nn.Parameter, torch.Tensor]:
    """Return a parameter with a gradient, and its value before the step."""
    parameter = nn.Parameter(torch.randn(shape))
    parameter.grad = torch.randn(shape) * torch.logspace(-1, 1, shape[-1])
    return parameter, parameter.detach().clone()


def singular_values(step: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(step.flatten(1))


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (6, 4, 3, 3)])
def test_a_fan_in_step_has_equal_singular_values_of_the_stated_size(shape: tuple[int, ...]) -> None:
    weight, before = planted(*shape)
    Muon([weight], lr=0.1).step()
    fan_in = before[0].numel()
    sizes = singular_values(before - weight.detach()) / (0.1 * (max(len(before), fan_in) / fan_in) ** 0.5)
    # The iteration brings singular values to 0.7 … 1.2, far from those of the gradient
    assert 0.5 < float(sizes.min()) <= float(sizes.max()) < 1.3


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_a_relative_step_has_the_stated_norm_at_any_scale_of_weight_and_gradient(scale: float) -> None:
    weight, before = planted(8, 20)
    with torch.no_grad():
        weight.mul_(scale)
        weight.grad.div_(scale)
    Muon([weight], lr=0.1, step_size="relative").step()
    step = scale * before - weight.detach()
    assert float(step.norm() / (scale * before).norm()) == pytest.approx(0.1, rel=1e-4)
    sizes = singular_values(step)
    assert float(sizes.max() / sizes.min()) < 2


def test_weight_decay_shrinks_matrices_and_not_vectors() -> None:
    for shape, factor in (((8, 20), 0.98), ((8,), 1.0)):
        pairs = [planted(*shape) for _ in range(2)]
        with torch.no_grad():
            pairs[1][0].copy_(pairs[0][0])
        pairs[1][0].grad = pairs[0][0].grad
        Muon([pairs[0][0]], lr=0.1).step()
        Muon([pairs[1][0]], lr=0.1, weight_decay=0.2).step()
        expected = pairs[0][0].detach() - (1 - factor) * pairs[0][1]
        torch.testing.assert_close(pairs[1][0].detach(), expected)


@pytest.mark.parametrize(("shape", "factor"), [((7,), BIAS_LR_FACTOR), ((5, 6), 6**-0.5)])
def test_vectors_and_large_matrices_take_adam(shape: tuple[int, ...], factor: float) -> None:
    ours, _ = planted(*shape)
    theirs = nn.Parameter(ours.detach().clone())
    muon, adam = Muon([ours], lr=0.1, max_side=4), torch.optim.Adam([theirs], 0.1 * factor, betas=ADAM_BETAS)
    for _ in range(5):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        muon.step()
        adam.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_momentum_with_lookahead() -> None:
    weight, before = planted(4, 4)
    optimizer = Muon([weight], lr=0.0, momentum=0.9)
    gradients = [torch.randn(4, 4) for _ in range(3)]
    expected = torch.zeros(4, 4)
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
        expected = 0.9 * expected + 0.1 * gradient
    torch.testing.assert_close(optimizer.state[weight]["momentum"], expected)
    assert torch.equal(weight.detach(), before)


def test_finetuning_uses_muon_for_matrices_and_adam_for_the_rest() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=4), nn.Linear(4, 2))
    model[3].bias.requires_grad_(False)
    (muon, lr), (adam, rest_lr) = build_optimizers(model, 0.1)
    assert isinstance(muon, Muon)
    assert isinstance(adam, torch.optim.Adam)
    assert (lr, rest_lr) == (0.1, pytest.approx(0.1 * FINETUNE_BIAS_LR_FACTOR))
    assert muon.param_groups[0]["step_size"] == "relative"
    assert [p.shape for p in muon.param_groups[0]["params"]] == [model[0].weight.shape, model[3].weight.shape]
    assert len(adam.param_groups[0]["params"]) == 5


def test_parameters_without_gradient_stay() -> None:
    weight = nn.Parameter(torch.randn(3, 3))
    before = weight.detach().clone()
    optimizer = Muon([weight], lr=0.1)
    optimizer.step()
    assert torch.equal(weight.detach(), before)
    assert not optimizer.state
