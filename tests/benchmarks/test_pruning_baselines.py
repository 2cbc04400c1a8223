"""Test the pruning baselines against multiply-adds counted by hand, brute force and known answers."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from benchmarks.baselines.grail_osscar import (
    OsscarRegression,
    grail_weights,
    input_grams,
    recompute_statistics,
    set_weights,
)
from benchmarks.baselines.tp_importances import IMPORTANCES, CalibrationData, accumulate_gradient, hessian, prune_with
from benchmarks.baselines.tp_pruner import BudgetPruner, MacCounter, inner_layers, scale_widths
from benchmarks.common.models import CifarResNet


def resnet() -> tuple[nn.Module, Tensor, list[str]]:
    model = CifarResNet(8).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.running_mean.normal_()
    return model, torch.randn(1, 3, 32, 32), [f"layer{i}.0.conv1" for i in (1, 2, 3)]


def calibration(model: nn.Module, n: int = 24) -> CalibrationData:
    images = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    return CalibrationData(images, model(images).argmax(1))


def test_multiply_adds_are_those_of_the_paper_and_of_torch_pruning() -> None:
    model, example = CifarResNet(56).eval(), torch.randn(1, 3, 32, 32)
    assert MacCounter(model, example)(model) == pytest.approx(125.49e6, rel=1e-3)  # He et al.'s ResNet-56: 0.13 G
    small = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    assert MacCounter(small, torch.randn(2, 3, 8, 8))(small) == 16 * 8 * 27 + 4 * 8 * 9 + 40


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_cut_reaches_the_target_from_below_and_cuts_inner_widths_only(scope: str, steps: int) -> None:
    model, example, roots = resnet()
    macs = MacCounter(model, example)
    target = macs(model) / 1.5
    prune_with(BudgetPruner(model, example, macs, roots), IMPORTANCES["L2"], calibration(model), target, scope, steps)
    assert 0.97 * target <= macs(model) <= target  # three layers: one channel is up to 2 %
    assert MacCounter(model, example)(model) == macs(model)  # counted again from nothing
    assert model(example).shape == (1, 10)
    assert [model.get_submodule(name.replace("conv1", "conv2")).out_channels for name in roots] == [16, 32, 64]


def test_planned_multiply_adds_are_those_after_the_cut_with_depthwise_layers_too() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.Conv2d(8, 12, 1),
        nn.Conv2d(12, 12, 3, groups=12),
        nn.BatchNorm2d(12),
        nn.Conv2d(12, 6, 1),
    ).eval()
    example = torch.randn(1, 3, 6, 6)
    macs = MacCounter(model, example)
    assert inner_layers(model, example, ["4"]) == ["0", "1"]
    cutter = BudgetPruner(model, example, macs, ["0", "1"])
    assert cutter.consumers() == {"0": "1", "1": "4"}
    groups = [
        tp.DependencyGraph()
        .build_dependency(model, example)
        .get_pruning_group(model[i], tp.prune_conv_out_channels, gone)
        for i, gone in ((0, [1, 2]), (1, [0, 5, 7]))
    ]
    planned = macs.after(model, groups)
    cutter.remove({"0": [0, 3, 4, 5, 6, 7], "1": [1, 2, 3, 4, 6, 8, 9, 10, 11]})
    assert macs(model) == planned == 36 * 3 * 6 + 36 * 6 * 9 + 16 * 9 * 9 + 16 * 9 * 6


def test_uniform_widths_follow_the_ratio_and_differ_by_one_channel() -> None:
    kept = scale_widths({str(i): 16 for i in range(100)}, 0.45)
    assert set(kept.values()) == {8, 9}
    assert sum(kept.values()) == pytest.approx(100 * 16 * 0.55, abs=4)


@pytest.mark.parametrize("name", IMPORTANCES)
def test_every_importance_prunes(name: str) -> None:
    model, example, roots = resnet()
    data, macs = calibration(model), MacCounter(model, example)
    prune_with(BudgetPruner(model, example, macs, roots), IMPORTANCES[name], data, macs(model) * 0.6, "global")
    assert 0.58 <= macs(model) / MacCounter(*resnet()[:2])(resnet()[0]) <= 0.6
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_a_zero_channel_is_removed_first_under_every_importance_of_weights_and_gradients() -> None:
    for name in ("L1", "L2", "LAMP", "Taylor", "Hessian", "OBD-C", "Activation"):
        model, example, _ = resnet()
        with torch.no_grad():
            block = model.layer2[0]
            block.conv1.weight[5] = 0
            block.bn1.weight[5] = block.bn1.bias[5] = block.bn1.running_mean[5] = 0
            block.conv2.weight[:, 5] = 0
        importance = IMPORTANCES[name](model, calibration(model))
        graph = tp.DependencyGraph().build_dependency(model, example)
        scores = importance(graph.get_pruning_group(block.conv1, tp.prune_conv_out_channels, list(range(32))))
        assert float(scores[5]) == float(scores.min()), name


def test_gradients_are_means_over_the_images_and_squares_count_every_image() -> None:
    model, _, _ = resnet()
    data = calibration(model, 6)
    loss = nn.functional.cross_entropy(model(data.images), data.predictions)
    expected = torch.autograd.grad(loss, model.conv1.weight)[0]
    accumulate_gradient(model, data, batch=4)
    torch.testing.assert_close(model.conv1.weight.grad, expected, rtol=1e-3, atol=1e-6)
    pairs = zip(data.images.split(1), data.predictions.split(1), strict=True)
    single = [torch.autograd.grad(nn.functional.cross_entropy(model(x), y), model.conv1.weight)[0] for x, y in pairs]
    scorer = hessian(model, data, images=6)
    torch.testing.assert_close(scorer._accu_grad[model.conv1.weight], sum(g.square() for g in single))


def test_recomputed_statistics_equal_those_of_the_current_network() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2), nn.Dropout()
    ).eval()
    batches = list(torch.randn(40, 3, 6, 6).split(20))
    recompute_statistics(model, batches)
    out = torch.cat([model[0](x) for x in batches])
    torch.testing.assert_close(model[1].running_mean, out.mean((0, 2, 3)))
    torch.testing.assert_close(model[1].running_var, torch.stack([model[0](x).var((0, 2, 3)) for x in batches]).mean(0))
    assert not any(module.training for module in model.modules())
    assert model[1].momentum == 0.1


def test_grail_restores_the_output_where_the_lost_channels_are_mixtures_of_the_kept() -> None:
    torch.manual_seed(2)
    x = torch.randn(16, 6, 5, 5, dtype=torch.float64)
    x[:, 4], x[:, 1] = 2 * x[:, 0] - x[:, 2], 0.5 * x[:, 3]
    layer = nn.Conv2d(6, 4, 3).double()
    gram = input_grams(nn.Sequential(layer), ["0"], [x], taps=False)["0"]
    torch.testing.assert_close(gram, torch.einsum("nchw,ndhw->cd", x, x) / (16 * 25))
    kept = [0, 2, 3, 5]
    weight = grail_weights(layer.weight, gram, kept, ridge=1e-10)
    torch.testing.assert_close(nn.functional.conv2d(x[:, kept], weight, layer.bias), layer(x), rtol=1e-6, atol=1e-6)
    eye = torch.eye(6, dtype=torch.float64)
    # Nothing to mix: plain pruning
    torch.testing.assert_close(grail_weights(layer.weight, eye, kept, ridge=0.0), layer.weight[:, kept])


def test_the_regression_is_that_of_brute_force() -> None:
    torch.manual_seed(4)
    x = torch.randn(200, 5, 4, 4, dtype=torch.float64) @ torch.randn(4, 4, dtype=torch.float64)
    layer = nn.Conv2d(5, 3, 2, bias=False).double()
    gram = input_grams(nn.Sequential(layer), ["0"], [x], rows=10**4)["0"]
    problem = OsscarRegression(layer.weight, gram, ridge=0.0)
    patches = nn.functional.unfold(x, 2).movedim(1, 2).flatten(0, 1)
    y = patches @ layer.weight.detach().flatten(1).T

    def error(kept: list[int]) -> float:
        chosen = patches.unflatten(1, (5, 4))[:, kept].flatten(1)
        return float((y - chosen @ torch.linalg.lstsq(chosen, y).solution).square().sum()) / len(y)

    assert problem.error([0, 2, 3]) == pytest.approx(error([0, 2, 3]), rel=1e-8)
    losses, gains = problem.losses([0, 2, 3]), problem.gains([0, 2], [1, 3, 4])
    assert losses.tolist() == pytest.approx(
        [error(rest) - error([0, 2, 3]) for rest in ([2, 3], [0, 3], [0, 2])], rel=1e-8
    )
    assert gains.tolist() == pytest.approx([error([0, 2]) - error([0, 2, new]) for new in (1, 3, 4)], rel=1e-8)
    found = problem.search(2)
    assert problem.error(found) <= min(error([*found[:1], other]) for other in range(5) if other not in found) + 1e-12
    best = min((list(pair) for pair in itertools.combinations(range(5), 2)), key=error)
    assert error(found) == pytest.approx(error(best), rel=1e-6)


def test_the_search_gives_exact_weights_where_channels_are_copies() -> None:
    torch.manual_seed(5)
    model, example, roots = resnet()
    with torch.no_grad():
        block = model.layer1[0]
        for tensor in (
            block.conv1.weight,
            block.bn1.weight,
            block.bn1.bias,
            block.bn1.running_mean,
            block.bn1.running_var,
        ):
            tensor[8:] = tensor[:8]
    before, macs = copy.deepcopy(model), MacCounter(model, example)
    cutter = BudgetPruner(model, example, macs, roots)
    images = torch.randn(8, 3, 32, 32)
    name = cutter.consumers()["layer1.0.conv1"]
    problem = OsscarRegression(block.conv2.weight, input_grams(model, [name], [images])[name], ridge=1e-9)
    kept = problem.search(8)
    assert problem.error(kept) < 1e-6 * problem.error(kept[:1])
    weights = problem.weights(kept)
    cutter.remove({"layer1.0.conv1": kept})
    set_weights(model, {name: weights})
    torch.testing.assert_close(model(images), before(images), rtol=1e-3, atol=1e-3)
