"""Refit of a whole network: redundant channels cost nothing, and solutions equal those of least squares."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

import knowiso_train as ki
from benchmarks.common import models
from knowiso_train.errors import DataError, InputTypeError, KnowisoWarning, NonFiniteError, OptionError, ShapeError
from knowiso_train.ops import patch_rows
from knowiso_train.pruning import reconstruction, track_kept_indices
from knowiso_train.regression.ridge import KernelMoments, PrimalMoments
from tests.helpers.pruned_models import settled


class Residual(nn.Module):
    """Stem, two residual blocks with batch norms, a depthwise layer and a classifier."""

    def __init__(self, width: int = 8, inner: int = 10, end: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.end = end
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.conv1 = nn.ModuleList(nn.Conv2d(width, inner, 3, padding=1, bias=False) for _ in range(2))
        self.bn1 = nn.ModuleList(nn.BatchNorm2d(inner) for _ in range(2))
        self.depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.conv2 = nn.ModuleList(nn.Conv2d(inner, width, 3, padding=1, bias=False) for _ in range(2))
        self.bn2 = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for i in range(2):
            y = F.relu(self.bn1[i](self.conv1[i](x)))
            if i == 1:
                y = F.relu(self.depthwise(y))
            x = self.end(self.bn2[i](self.conv2[i](y)) + x)
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def trained(**options: Any) -> Residual:
    """With statistics that are those of its own activations, as after training."""
    return settled(Residual(**options), pictures(256, seed=9))


def pictures(n: int = 160, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def drop(model: Residual, block: int, channels: list[int]) -> Residual:
    """A copy without these inner channels of a block, by plain indexing."""
    small = copy.deepcopy(model)
    left = [c for c in range(model.conv1[block].out_channels) if c not in channels]
    cut = {f"conv1.{block}.weight": 0, f"conv2.{block}.weight": 1}
    cut |= {f"bn1.{block}.{name}": 0 for name in ("weight", "bias", "running_mean", "running_var")}
    cut |= {"depthwise.weight": 0, "depthwise.bias": 0} if block == 1 else {}
    for name, dim in cut.items():
        owner, _, last = name.rpartition(".")
        module = small.get_submodule(owner)
        value = getattr(module, last).detach().index_select(dim, torch.tensor(left))
        setattr(module, last, nn.Parameter(value) if last in ("weight", "bias") else value)
    small.conv1[block].out_channels = small.bn1[block].num_features = small.conv2[block].in_channels = len(left)
    if block == 1:
        small.depthwise.in_channels = small.depthwise.out_channels = small.depthwise.groups = len(left)
    return small


def error(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        wanted, got = a(x), b(x)
    return float((wanted - got).norm() / (wanted - wanted.mean(0)).norm())


def test_residual_streams_are_dropped_after_the_layers_that_need_them(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    before_layer = reconstruction.NetworkReconstruction._before_layer

    def counted(self: Any, name: str, *arguments: Any) -> None:
        sizes.append(len(self.streams.results))
        before_layer(self, name, *arguments)
        sizes.append(len(self.streams.results))

    monkeypatch.setattr(reconstruction.NetworkReconstruction, "_before_layer", counted)
    model = trained()
    ki.refit(drop(model, 0, [2, 5]), model, [pictures()], progress=False)
    assert max(sizes) == 1  # of two residual sums
    assert sizes[-1] == 0


def test_nothing_pruned_nothing_changed() -> None:
    model = trained()
    small = copy.deepcopy(model)
    report = ki.refit(small, model, [pictures()], progress=False)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), small.state_dict().values(), strict=True))
    assert [fit.name for fit in report.layers] == [
        "stem",
        "conv1.0",
        "conv2.0",
        "conv1.1",
        "depthwise",
        "conv2.1",
        "head",
    ]
    assert max(fit.before for fit in report.layers) < 1e-9


@pytest.mark.parametrize("block", [0, 1])
def test_a_copied_channel_goes_without_a_trace(block: int) -> None:
    model = trained()
    with torch.no_grad():
        for module in (model.conv1[block], model.bn1[block], *([model.depthwise] if block else [])):
            for tensor in [*module.parameters(), *module.buffers()]:
                if tensor.ndim:
                    tensor[3] = tensor[6]
    small = drop(model, block, [6])
    assert error(model, small, pictures(40, seed=5)) > 0.02
    ki.refit(small, model, [pictures()], ridge=1e-9, progress=False)
    assert error(model, small, pictures(40, seed=5)) < 1e-4  # other images than the refit saw


def test_a_mixture_of_other_channels_goes_without_a_trace() -> None:
    # Linear up to the reader
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3))
    model.eval()
    with torch.no_grad():
        model[0].weight[5] = 0.7 * model[0].weight[0] - 1.3 * model[0].weight[2]
    small = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 3)).eval()
    small.load_state_dict({name: _part(name, value) for name, value in model.state_dict().items()})
    ki.refit(small, model, [pictures()], ridge=1e-9, progress=False)
    assert error(model, small, pictures(seed=3)) < 1e-5


def _part(name: str, value: Tensor) -> Tensor:
    return value[:, :5] if name == "2.weight" else value[:5] if value.ndim and name[0] in "01" else value


def solved_by_hand(
    model: Residual, small: Residual, x: Tensor, fitted: int, gone: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return outputs of bn2 of block 0: of the original, of a refitted network, and of plain least squares."""
    with torch.no_grad():
        s = F.relu(model.stem(x))
        y = F.relu(model.bn1[0](model.conv1[0](s)))
        wanted = patch_rows(model.bn2[0](model.conv2[0](y)), 1).double()
        rows = patch_rows(y[:, [c for c in range(10) if c not in gone]], 3).double()
        ones = torch.cat([rows, torch.ones(len(rows), 1).double()], 1)
        solution = torch.linalg.lstsq(ones[: 64 * fitted], wanted[: 64 * fitted], driver="gelsd").solution
        found = patch_rows(small.bn2[0](small.conv2[0](F.relu(small.bn1[0](small.conv1[0](s))))), 1).double()
    return wanted, found, ones @ solution


def test_the_layer_after_the_cut_is_what_least_squares_finds() -> None:
    """The target of conv2 of block 0 is the residual sum; it is computed here without the library."""
    model = trained(end=F.softplus)
    small = drop(model, 0, [0, 4, 7])
    x = pictures(60)  # every position of every image: no sampling
    ki.refit(small, model, [x], ridge=1e-9, rows=10**6, progress=False)
    # The last tenth of the images is held out
    _, found, expected = solved_by_hand(model, small, x, 54, [0, 4, 7])
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_in_front_of_a_rectifier_it_is_better_than_least_squares(seed: int) -> None:
    torch.manual_seed(seed)
    model, x = trained(), pictures(160, seed)
    small = drop(model, 0, [0, 4, 7])
    ki.refit(small, model, [x], ridge=1e-9, rows=10**6, progress=False)
    images = torch.cat([x, pictures(100, seed=10 + seed)])
    wanted, found, plain = (rows[64 * 160 :] for rows in solved_by_hand(model, small, images, 144, [0, 4, 7]))
    with torch.no_grad():
        stream = patch_rows(F.relu(model.stem(images[160:])), 1).double()
    errors = [float((F.relu(y + stream) - F.relu(wanted + stream)).square().sum()) for y in (found, plain)]
    assert errors[0] < errors[1]


def test_errors_made_upstream_are_mended_in_the_stream() -> None:
    """Block 0 loses channels; block 1 loses none, and is solved to correct the residual sum."""
    model = trained()
    small = drop(model, 0, [0, 1, 2, 3, 4, 5])
    partly = copy.deepcopy(small)
    ki.refit(small, model, [pictures(400)], progress=False)
    for name in ("conv1.0", "bn1.0", "conv2.0", "bn2.0", "stem"):
        partly.get_submodule(name).load_state_dict(small.get_submodule(name).state_dict())
    x = pictures(200, seed=4)
    assert error(model, small, x) < 0.9 * error(model, partly, x) < error(model, drop(model, 0, [0, 1, 2, 3, 4, 5]), x)


def test_batch_norms_hold_the_statistics_of_what_they_now_read() -> None:
    model = trained()
    small = drop(model, 0, [1, 2, 8])
    x = pictures(300)
    ki.refit(small, model, [x], rows=10**6, progress=False)
    with torch.no_grad():
        s = F.relu(small.stem(x[:270]))  # the last tenth is held out
        z = small.conv2[0](F.relu(small.bn1[0](small.conv1[0](s))))
    torch.testing.assert_close(small.bn2[0].running_mean, z.mean((0, 2, 3)), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(small.bn2[0].running_var, z.var((0, 2, 3)), atol=1e-4, rtol=1e-3)
    assert small.conv2[0].bias is None  # the norm took it


def test_a_bias_is_added_where_no_norm_takes_it() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 2, bias=False),
    )
    small = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 2, bias=False),
    )
    state = model.state_dict()
    small.load_state_dict(
        {"0.weight": state["0.weight"][:4], "2.weight": state["2.weight"][:, :4], "5.weight": state["5.weight"]}
    )
    small[2].requires_grad_(False)
    ki.refit(small, model, [pictures(200)], progress=False)
    assert isinstance(small[2].bias, nn.Parameter)
    assert not small[2].bias.requires_grad
    assert small[0].bias is None  # nothing to mend there


@pytest.mark.parametrize("keep", [None, torch.tensor([[True, False, True, True, False, True]])], ids=["all", "some"])
def test_the_rows_products_give_the_same_weights(keep: Tensor | None) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y, original = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((15, 1, 6), (15, 1, 3), (1, 6, 3))
    )
    for ridge in (1e-6, 0.1, 3.0):
        by_rows, by_columns = KernelMoments.of(x, y), PrimalMoments.of(x, y)
        found, expected = by_rows.weight(original, keep, ridge), by_columns.weight(original, keep, ridge)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(by_rows.bias(found), by_columns.bias(expected))
        torch.testing.assert_close(by_rows.variance(found), by_columns.variance(expected))


def test_groups_are_solved_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y, original = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((40, 3, 5), (40, 3, 2), (3, 5, 2))
    )
    together = PrimalMoments.of(x, y).weight(original, None, 0.2)
    for g in range(3):
        alone = PrimalMoments.of(x[:, [g]], y[:, [g]]).weight(original[[g]], None, 0.2)
        torch.testing.assert_close(together[[g]], alone)


def test_labels_are_never_read() -> None:
    class Poison:
        def __getattribute__(self, name: str) -> Any:
            raise AssertionError("a label was read")

    model = trained()
    small = drop(model, 0, [2])
    x = pictures(64)
    labeled = copy.deepcopy(small)
    ki.refit(labeled, model, [(x, Poison())], progress=False)
    ki.refit(small, model, [x], progress=False)
    assert torch.equal(labeled.head.weight, small.head.weight)


def test_what_was_recorded_serves_after_training_too() -> None:
    model = trained()
    small = copy.deepcopy(model)
    graph = tp.DependencyGraph().build_dependency(small, pictures(1))
    with track_kept_indices(small) as kept:
        graph.get_pruning_group(small.conv1[0], tp.prune_conv_out_channels, [0, 5]).prune()
    small.eval()
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    with pytest.raises(ShapeError, match=r"conv1\.0.*no slice"):
        ki.refit(small, model, [pictures(64)], progress=False)
    before = error(model, small, pictures(seed=2))
    ki.refit(small, model, [pictures()], kept=kept, progress=False)
    assert error(model, small, pictures(seed=2)) < before


def test_modes_and_hooks_are_as_before_also_after_an_error() -> None:
    model, broken = trained(), [torch.full((8, 3, 8, 8), float("nan"))]
    small = drop(model, 0, [2]).train()
    with pytest.raises(NonFiniteError, match="'stem'"):
        ki.refit(small, model, broken, progress=False)
    assert small.training
    assert not model.training
    ki.refit(small, model, [pictures(64)], progress=False)
    assert small.training
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for network in (small, model) for module in network.modules()
    )


def test_few_rows_are_a_warning_not_a_crash() -> None:
    model = trained()
    small = drop(model, 0, [2, 3])
    with pytest.warns(KnowisoWarning, match=r"conv1\.1.*features"):
        ki.refit(small, model, [pictures(1)], progress=False)
    assert all(value.isfinite().all() for value in small.state_dict().values())


class TestErrors:
    def test_arguments(self) -> None:
        model = trained()
        small = drop(model, 0, [2])
        with pytest.raises(OptionError, match="same network"):
            ki.refit(model, model, [pictures()])
        with pytest.raises(InputTypeError, match="pruned"):
            ki.refit("small", model, [pictures()])  # type: ignore[arg-type]
        with pytest.raises(InputTypeError, match="a single batch into a list"):
            ki.refit(small, model, pictures())
        with pytest.raises(DataError, match="no images"):
            ki.refit(small, model, [])
        for wrong in ({"ridge": -1.0}, {"ridge": ()}, {"rows": 0}, {"max_images": 0}):
            with pytest.raises(OptionError):
                ki.refit(small, model, [pictures()], **wrong)

    def test_another_network(self) -> None:
        with pytest.raises(ShapeError, match="no layer 'stem'"):
            ki.refit(nn.Sequential(nn.Conv2d(3, 2, 1)), trained(), [pictures()], progress=False)


@pytest.mark.data
def test_a_real_network_comes_back() -> None:
    """ResNet-20, half of every block's inner width by the L2 norm: the refit brings agreement back without a label."""
    original = models.cifar_resnet(20)
    small = copy.deepcopy(original)
    blocks = [block for stage in (small.layer1, small.layer2, small.layer3) for block in stage]
    others = [
        m for m in small.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and m not in [b.conv1 for b in blocks]
    ]
    importance = tp.importance.MagnitudeImportance(p=2)
    tp.pruner.BasePruner(small, torch.randn(1, 3, 32, 32), importance, pruning_ratio=0.5, ignored_layers=others).step()
    images, tests = models.cifar10("train", 512)[0], models.cifar10("test", 400)[0]
    agreement = []
    for _ in range(2):
        with torch.no_grad():
            agreement.append(float((small.eval()(tests).argmax(1) == original(tests).argmax(1)).float().mean()))
        if len(agreement) == 1:
            ki.refit(small, original, images.split(128), rows=20, progress=False)
    assert agreement[0] < 0.6
    assert agreement[1] > 0.75


def test_weight_free_shortcuts_are_computed_before_they_run() -> None:
    """The shortcut of CIFAR ResNets, subsampling and padding, runs after the layers whose target is the sum."""
    from knowiso_train.pruning._tracing import trace_model

    block = models.BasicBlock(4, 8, 2).eval()
    tails = trace_model(block, torch.randn(2, 4, 8, 8))
    # The shortcut begins at the network's own input, which no operation made
    assert not tails["conv2"].targets_residual_sum
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), block).eval(), pictures(100)
    tail = trace_model(model, x[:2])["1.conv2"]
    assert tail.targets_residual_sum
    with torch.no_grad():
        stream = model[0](x)
        for step in tail.shortcut_ops:
            stream = step(stream)
        torch.testing.assert_close(stream, F.pad(model[0](x)[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
