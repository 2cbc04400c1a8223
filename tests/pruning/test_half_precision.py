"""Networks with weights in bfloat16 or float16: statistics in float32 or better, weights in their own dtype."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

import knowiso_train as ki

HALF = [torch.bfloat16, torch.float16]
OPTIONS: dict[str, Any] = {"progress": False}
TOLERANCE = 0.03  # of unexplained variance


class Residual(nn.Module):
    """A residual block with an inner width that can be pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2 = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.bn1(self.conv1(x)).relu())


def network() -> nn.Sequential:
    """Return a classifier with a residual block."""
    torch.manual_seed(1)
    stem = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*stem, Residual(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)).eval()


@pytest.fixture
def images() -> Tensor:
    """Return noise images."""
    return torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def unexplained(pruned: nn.Module, original: nn.Module, images: Tensor) -> float:
    """Return the squared distance of two networks' outputs as a fraction of the variance."""
    with torch.no_grad():
        outputs, targets = pruned(images).double(), original(images).double()
    return float((outputs - targets).square().mean() / targets.var(0).mean())


def assert_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Assert that all floating parameters and buffers are finite and of one dtype."""
    tensors = [value for value in model.state_dict().values() if value.is_floating_point()]
    assert {value.dtype for value in tensors} == {dtype}
    assert all(bool(value.isfinite().all()) for value in tensors)


@pytest.mark.parametrize(("dtype", "steps"), [(torch.bfloat16, 0), (torch.bfloat16, 4), (torch.float16, 0)])
def test_prune_of_a_half_precision_network_is_as_good_as_in_float32(
    dtype: torch.dtype, steps: int, images: Tensor
) -> None:
    model = network().to(dtype)
    reference = copy.deepcopy(model).float()
    half = ki.prune(model, [images.to(dtype)], macs=0.6, block_steps=steps, **OPTIONS)
    full = ki.prune(reference, [images], macs=0.6, block_steps=steps, **OPTIONS)
    assert_dtype(half.model, dtype)
    assert half.report.macs == full.report.macs
    expected = unexplained(full.model, reference, images)
    assert 0 < expected < 0.5
    assert unexplained(half.model, model, images.to(dtype)) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("dtype", HALF)
def test_refit_of_a_half_precision_network_is_as_good_as_in_float32(dtype: torch.dtype, images: Tensor) -> None:
    original = network().to(dtype)
    reference = copy.deepcopy(original).float()
    pruned = ki.prune(original, [images.to(dtype)], macs=0.6, refit=False, **OPTIONS).model
    full = copy.deepcopy(pruned).float()
    before = unexplained(full, reference, images)
    ki.refit(full, reference, [images], **OPTIONS)
    report = ki.refit(pruned, original, [images.to(dtype)], **OPTIONS)
    assert_dtype(pruned, dtype)
    expected = unexplained(full, reference, images)
    assert expected < 0.7 * before
    assert unexplained(pruned, original, images.to(dtype)) == pytest.approx(expected, abs=TOLERANCE)
    assert all(0 <= layer.after <= 1 for layer in report.layers)


def test_finetuning_in_bfloat16_comes_nearer_to_the_original(images: Tensor) -> None:
    original = network().bfloat16()
    pruned = ki.prune(original, [images.bfloat16()], macs=0.6, refit=False, **OPTIONS).model
    report = ki.finetune(pruned, original, [images.bfloat16()], steps=20, batch_size=32, **OPTIONS)
    assert_dtype(pruned, torch.bfloat16)
    assert report.after.objective < 0.9 * report.before.objective


@pytest.mark.parametrize("call", ["finetune", "refit", "prune"])
def test_training_in_float16_is_refused_by_name(call: str, images: Tensor) -> None:
    original = network().half()
    pruned, loader = copy.deepcopy(original), [images.half()]
    calls = {
        "finetune": lambda: ki.finetune(pruned, original, loader, steps=2, **OPTIONS),
        "refit": lambda: ki.refit(pruned, original, loader, block_steps=2, **OPTIONS),
        "prune": lambda: ki.prune(original, loader, macs=0.6, block_steps=2, **OPTIONS),
    }
    with pytest.raises(ki.KnowisoError, match="float16 weights round small updates to zero"):
        calls[call]()


@pytest.mark.parametrize("cumulative", [True, False])
@pytest.mark.parametrize("dtype", HALF)
def test_importance_of_a_half_precision_network_ranks_as_in_float32(
    dtype: torch.dtype, cumulative: bool, images: Tensor
) -> None:
    scores = []
    model = network().to(dtype)
    for item, batch in ((model, images.to(dtype)), (copy.deepcopy(model).float(), images)):
        importance = ki.IsomorphismImportance(item, [batch], cumulative=cumulative, **OPTIONS)
        graph = tp.DependencyGraph().build_dependency(item, batch[:2])
        group = graph.get_pruning_group(item[3].conv1, tp.prune_conv_out_channels, list(range(16)))
        scores.append(importance(group))
    assert scores[0].dtype == torch.float32
    assert torch.allclose(scores[0], scores[1], rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("call", ["prune", "refit", "finetune", "importance", "measure"])
def test_images_of_another_dtype_than_the_weights_are_refused_by_name(
    call: str, dtype: torch.dtype, images: Tensor
) -> None:
    original = network().to(dtype)
    pruned, loader = copy.deepcopy(original), [images]
    calls = {
        "prune": lambda: ki.prune(original, loader, **OPTIONS),
        "refit": lambda: ki.refit(pruned, original, loader, **OPTIONS),
        "finetune": lambda: ki.finetune(pruned, original, loader, steps=2, **OPTIONS),
        "importance": lambda: ki.prune(
            original, loader, importance=ki.IsomorphismImportance(original, loader, **OPTIONS), **OPTIONS
        ),
        "measure": lambda: ki.measure(original, pruned, loader, "2", order=0, **OPTIONS),
    }
    with pytest.raises(ki.KnowisoError, match=rf"weights of {str(dtype)[6:]} .*images of float32"):
        calls[call]()
