"""Test the distillation baselines against the published formulas in numpy and float64, and cases by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.baselines.distillation.hints import AttentionTransfer, FitNet, SimKD
from benchmarks.baselines.distillation.pooled import CRD, ITRD, SRD, VkD
from benchmarks.baselines.distillation.review import Fusion, ReviewKD, hierarchical_context
from benchmarks.baselines.distillation.timm_task import TimmFeatureTask


def features(channels: list[int], sides: list[int], images: int = 3) -> list[Tensor]:
    return [torch.randn(images, c, s, s, dtype=torch.float64) for c, s in zip(channels, sides, strict=True)]


def normalized(z: np.ndarray, gain: Tensor, shift: Tensor) -> np.ndarray:
    """Apply batch norm in training mode."""
    mean, variance = z.mean((0, 2, 3), keepdims=True), z.var((0, 2, 3), keepdims=True)
    g, b = (v.detach().numpy()[None, :, None, None] for v in (gain, shift))
    return (z - mean) / np.sqrt(variance + 1e-5) * g + b


def convolved(x: np.ndarray, weight: Tensor) -> np.ndarray:
    """Convolve without bias, one shift of the kernel at a time."""
    w = weight.detach().numpy()
    pad = w.shape[2] // 2
    wide, out = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad))), 0.0
    for i in range(w.shape[2]):
        for j in range(w.shape[3]):
            out = out + np.einsum("nchw,dc->ndhw", wide[:, :, i : i + x.shape[2], j : j + x.shape[3]], w[:, :, i, j])
    return np.asarray(out)


def pooled(x: np.ndarray, side: int) -> np.ndarray:
    """Average-pool to a side that divides the input."""
    n, c, h, w = x.shape
    return x.reshape(n, c, side, h // side, side, w // side).mean((3, 5))


def hcl(a: np.ndarray, b: np.ndarray) -> float:
    levels = [(1.0, ((a - b) ** 2).mean())]
    for side, weight in zip([s for s in (4, 2, 1) if s < a.shape[2]], (1 / 2, 1 / 4, 1 / 8), strict=False):
        levels.append((weight, ((pooled(a, side) - pooled(b, side)) ** 2).mean()))
    return float(sum(w * v for w, v in levels) / sum(w for w, _ in levels))


def shaken(module: nn.Module) -> nn.Module:
    """In float64, batch norms away from the identity."""
    for part in module.double().modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias)
    return module


@pytest.mark.parametrize(("kernel_size", "linear"), [(1, False), (3, False), (3, True)])
def test_fitnet_equals_the_squared_error_of_the_adapter(kernel_size: int, linear: bool) -> None:
    student, teacher = features([4, 6], [8, 4]), features([5, 12], [8, 4])
    rival = shaken(FitNet([4, 6], [5, 12], kernel_size, linear))
    expected = 0.0
    for adapter, s, t in zip(rival.adapters, student, teacher, strict=True):
        z = convolved(s.numpy(), adapter[0].weight) + adapter[0].bias.detach().numpy()[:, None, None]
        adapted = normalized(z, adapter[1].weight, adapter[1].bias)
        expected += ((np.maximum(adapted, -np.inf if linear else 0) - t.numpy()) ** 2).mean()
    assert float(rival(student, teacher).detach()) == pytest.approx(expected, rel=1e-10)


def test_attention_transfer_equals_the_published_formula() -> None:
    student, teacher = features([4, 6], [8, 4]), features([5, 12], [8, 2])
    expected = 0.0
    for s, t in zip((student[0].numpy(), pooled(student[1].numpy(), 2)), (x.numpy() for x in teacher), strict=True):
        maps = [(f**2).mean(1).reshape(len(f), -1) for f in (s, t)]
        a, b = (m / np.linalg.norm(m, axis=1, keepdims=True) for m in maps)
        expected += ((a - b) ** 2).mean()
    assert float(AttentionTransfer()(student, teacher)) == pytest.approx(expected, rel=1e-10)


def test_disjoint_attention_has_the_largest_distance() -> None:
    student, teacher = torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4)
    student[:, :, 0, 0], teacher[:, :, 2, 1] = 7.0, 0.3
    assert float(AttentionTransfer()([student], [teacher])) == pytest.approx(2 / 16)
    teacher[:, :, 2, 1], teacher[:, 1, 0, 0] = 0.0, 2.0
    # Blind to scale and channels
    assert float(AttentionTransfer()([student], [teacher])) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("side", [8, 4, 2, 1])
def test_hierarchical_context_equals_the_published_formula(side: int) -> None:
    (a,), (b,) = features([3], [side]), features([3], [side])
    assert float(hierarchical_context(a, b)) == pytest.approx(hcl(a.numpy(), b.numpy()), rel=1e-10)
    # A constant looks the same at every level
    assert float(hierarchical_context(a, a + 0.5)) == pytest.approx(0.25)


def test_review_equals_the_published_recursion() -> None:
    student, teacher = features([4, 6], [8, 4]), features([5, 12], [8, 4])
    rival = shaken(ReviewKD([4, 6], [5, 12]))
    assert [fusion.gates is None for fusion in rival.fusions] == [False, False, True]
    expected, deeper = 0.0, None
    deepest = [x[-1].numpy().mean((2, 3), keepdims=True) for x in (student, teacher)]
    stages = list(
        zip(
            rival.fusions,
            [*(x.numpy() for x in student), deepest[0]],
            [*(x.numpy() for x in teacher), deepest[1]],
            strict=True,
        )
    )
    for fusion, s, t in reversed(stages):
        x = normalized(convolved(s, fusion.inner[0].weight), fusion.inner[1].weight, fusion.inner[1].bias)
        if deeper is not None:
            factor = x.shape[2] // deeper.shape[2]
            up = deeper.repeat(factor, 2).repeat(factor, 3)
            logits = (
                convolved(np.concatenate([x, up], 1), fusion.gates[0].weight)
                + fusion.gates[0].bias.detach().numpy()[:, None, None]
            )
            gates = 1 / (1 + np.exp(-logits))
            x = gates[:, 0:1] * x + gates[:, 1:2] * up
        expected += hcl(
            normalized(convolved(x, fusion.outer[0].weight), fusion.outer[1].weight, fusion.outer[1].bias), t
        )
        deeper = x
    assert float(rival(student, teacher).detach()) == pytest.approx(expected, rel=1e-9)


def test_a_fusion_with_closed_gates_passes_its_own_stage_only() -> None:
    fusion = Fusion(4, 6, 5, deepest=False).eval()
    nn.init.zeros_(fusion.gates[0].weight)
    fusion.gates[0].bias.data = torch.tensor([math.inf, -math.inf])
    x = torch.randn(2, 4, 8, 8)
    compared, onward = fusion(x, torch.randn(2, 6, 4, 4), (8, 8))
    torch.testing.assert_close(onward, fusion.inner(x))
    torch.testing.assert_close(compared, fusion.outer(fusion.inner(x)))


@pytest.mark.parametrize("kind", [FitNet, ReviewKD, lambda *_: AttentionTransfer()])
def test_the_gradient_reaches_the_student_and_every_map(kind: type[nn.Module]) -> None:
    student, teacher = features([4, 6], [8, 4]), features([5, 12], [8, 4])
    rival = kind([4, 6], [5, 12]).double()
    for x in student:
        x.requires_grad_()
    rival(student, teacher).backward()
    # A bias in front of a batch norm gets none
    weights = [parameter for parameter in rival.parameters() if parameter.ndim == 4]
    assert all(float(x.grad.abs().max()) > 1e-4 for x in [*student, *weights])


def set_map(layer: nn.Module, weight: list[list[float]]) -> None:
    """Set the weight of a linear layer, and its bias to zero."""
    layer.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))
    if layer.bias is not None:
        layer.bias = nn.Parameter(torch.zeros(len(weight), dtype=torch.float64))


def test_simkd_by_hand() -> None:
    rival = SimKD(2, 4).double().eval()
    for block in rival.projector:
        nn.init.zeros_(block[0].weight)
        nn.init.constant_(block[1].bias, 3.0)  # the projection is 3 everywhere
    student, teacher = torch.randn(1, 2, 8, 8).double(), torch.full((1, 4, 4, 4), 1.0).double()
    assert float(rival([student], [teacher]).detach()) == pytest.approx((3 - 1) ** 2)
    assert rival.project(student, (4, 4)).shape == teacher.shape


def test_srd_by_hand() -> None:
    rival = SRD(1, 1).double()
    rival.student_norm.eps = rival.teacher_norm.eps = 1e-12
    set_map(rival.map, [[2.0]])
    student, teacher = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]), torch.tensor([[5.0], [5.0], [1.0], [1.0]])
    # Normalized: (1, -1, 1, -1) and (1, 1, -1, -1). Two differences of 2, to the 4th
    assert float(rival(student.double(), teacher.double()).detach()) == pytest.approx(math.log(2 * 2**4))


def test_vkd_by_hand() -> None:
    rival = VkD(2, 2)
    rival.map.weight = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])  # a rotation
    # Layer-normed teacher: (1, -1). Mapped student: (3, -0.5). Differences 2 and 0.5: 2 - 0.5 and 0.5² / 2
    loss = rival(torch.tensor([[0.5, 3.0]]), torch.tensor([[30.0, 10.0]]))
    assert float(loss.detach()) == pytest.approx((1.5 + 0.125) / 2, rel=1e-4)
    weight = VkD(3, 5).map.weight
    torch.testing.assert_close(weight.T @ weight, torch.eye(3), atol=1e-5, rtol=0)


def test_crd_by_hand() -> None:
    rival = CRD(2, 2, width=2, temperature=0.5).double()
    set_map(rival.student_map, [[1.0, 0.0], [0.0, 1.0]])
    set_map(rival.teacher_map, [[1.0, 0.0], [0.0, 1.0]])
    student = torch.tensor([[3.0, 0.0], [0.0, 0.1]]).double()
    # Similarities / 0.5 are 2 for the same image and 0 for the other
    assert float(rival(student, 5 * student).detach()) == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-10)
    assert float(rival(student, student.flip(0)).detach()) == pytest.approx(2 + math.log(1 + math.exp(-2)), rel=1e-10)


def test_itrd_by_hand() -> None:
    rival = ITRD(2, 2, alpha=1.0).double()
    set_map(rival.map, [[1.0, 0.0], [0.0, -1.0]])
    features = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]).double()
    # Correlations 3/4 and -3/4 (unbiased deviations): log2(1/16 + 49/16). The Gram matrices of the four images hold
    # 1, 0 and -1: the sums of squares of G and of G ∘ G with trace 1 are equal
    expected = 2 * math.log2((1 + 49) / 16)
    assert float(rival(features, features).detach()) == pytest.approx(expected, rel=1e-5)


def test_timm_task_by_hand() -> None:
    student, teacher = torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 2.0]])
    assert float(TimmFeatureTask(2, 2)(student, teacher)) == pytest.approx(9 / 2)
    rival = TimmFeatureTask(2, 1)
    (projection,) = [layer for layer in rival.modules() if isinstance(layer, nn.Linear)]
    nn.init.zeros_(projection.weight)
    nn.init.constant_(projection.bias, 1.0)
    loss = rival(student, torch.tensor([[4.0]]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(9.0)
    assert float(projection.bias.grad) == pytest.approx(-6.0)
