"""Importance in the pruners of torch-pruning, on real architectures."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import timm
import torch
import torch_pruning as tp
from torch import Tensor, nn

import knowiso_train as ki
from knowiso_train.errors import DataError, InputTypeError, NonFiniteError, OptionError
from knowiso_train.ops.im2col import input_rows, regression_weight
from knowiso_train.pruning._elimination import BackwardElimination, removal_costs
from knowiso_train.pruning.layer_samples import input_moments

# A few images are enough to tell how channels are scored
pytestmark = pytest.mark.filterwarnings("ignore:fewer samples than features")


def pictures(n: int = 24, side: int = 32, seed: int = 0) -> list[Tensor]:
    return list(torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed)).split(8))


def group_of(model: nn.Module, layer: nn.Module, side: int = 32) -> Any:
    graph = tp.DependencyGraph().build_dependency(model, torch.randn(1, 3, side, side))
    return graph.get_pruning_group(layer, tp.prune_conv_out_channels, list(range(layer.out_channels)))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 5, 3, padding=1),
        nn.Conv2d(3, 5, (3, 1), stride=(2, 1), padding=(2, 0)),
        nn.Conv2d(3, 5, 3, padding="same", dilation=2),
        nn.Conv2d(3, 5, 2, padding="same", padding_mode="reflect"),
        nn.Conv2d(3, 5, 4, stride=4, padding="valid"),
        nn.Linear(9, 5),
        timm.layers.Conv2dSame(3, 5, 3, stride=2),
        timm.layers.Conv2dSame(3, 5, 5, stride=1, dilation=2),
    ],
    ids=str,
)
def test_rows_times_weights_are_what_the_layer_gives(layer: Any) -> None:
    x = torch.randn(2, 3, 8, 9)
    rows = input_rows(layer, x, 10**6, torch.Generator().manual_seed(0))
    found = rows @ regression_weight(layer.weight) + layer.bias
    out = layer(x)
    out = out.flatten(0, -2) if isinstance(layer, nn.Linear) else out.permute(0, 2, 3, 1).flatten(0, 2)
    assert found.shape == out.shape
    order, expected = (value[:, 0].argsort() for value in (found, out))  # positions come in random order
    torch.testing.assert_close(found[order], out[expected])


def test_a_copied_channel_goes_first_and_its_twin_stays() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3))
    with torch.no_grad():
        model[0].weight[4], model[0].bias[4] = model[0].weight[1], model[0].bias[1]
    importance = ki.IsomorphismImportance(model, pictures(), progress=False, ridge=1e-8, per="channel")
    scores = importance(group_of(model, model[0]))
    assert scores.shape == (6,)
    first = int(scores.argmin())
    assert first in (1, 4)
    assert float(scores[first]) < 1e-4
    # Without the first one, the equal channel is as necessary as any other
    assert float(scores[5 - first]) > 100 * float(scores[first])
    alone = ki.IsomorphismImportance(model, pictures(), progress=False, ridge=1e-8, cumulative=False)(
        group_of(model, model[0])
    )
    assert set(alone.argsort()[:2].tolist()) == {1, 4}


def test_scores_are_those_of_the_mathematics() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))
    importance = ki.IsomorphismImportance(model, pictures(), progress=False, cumulative=False, per="channel")
    group = group_of(model, model[0])
    torch.testing.assert_close(importance(group), removal_costs(importance.consumers(group), 1e-4).float())
    assert [consumer.name for consumer in importance.consumers(group)] == ["2"]
    elimination = BackwardElimination(importance.consumers(group), 1e-4)
    order, costs = elimination.eliminate_until(1)
    scores = ki.IsomorphismImportance(model, pictures(), progress=False, per="channel")(group)
    assert len(order) == len(costs) == 5
    # In the order of removal, and no score below an earlier one
    torch.testing.assert_close(scores[order].double(), torch.tensor(costs).double().cummax(0).values)
    assert scores.max() >= max(costs) * 0.999


def test_what_a_channel_computes_is_what_torch_pruning_counts() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.Identity(),
        nn.Conv2d(6, 4, 3, stride=2, bias=False),
        nn.Flatten(),
        nn.Linear(4 * 49, 2, bias=False),
    )
    example = torch.randn(1, 3, 18, 18)
    importance = ki.IsomorphismImportance(model, [torch.randn(4, 3, 18, 18)], progress=False)
    for layer in (model[0], model[2]):
        group = group_of(model, layer, 18)
        importance(group)
        before, _ = tp.utils.count_ops_and_params(model, example)
        smaller = copy.deepcopy(model)
        tp.DependencyGraph().build_dependency(smaller, example).get_pruning_group(
            smaller[0] if layer is model[0] else smaller[2], tp.prune_conv_out_channels, [1]
        ).prune()
        after, _ = tp.utils.count_ops_and_params(smaller, example)
        assert importance.macs(group) == pytest.approx(before - after)


def test_flatten_repeats_channels_and_several_layers_read_one_group() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 8 * 8, 10))
    importance = ki.IsomorphismImportance(model, pictures(), progress=False)
    (consumer,) = importance.consumers(group_of(model, model[0]))
    assert consumer.columns.shape == (6, 64)
    assert consumer.columns[1].tolist() == list(range(64, 128))

    dense = timm.create_model("densenet121", growth_rate=4, block_config=(2, 2), num_classes=4).eval()
    importance = ki.IsomorphismImportance(dense, pictures(), progress=False)
    group = group_of(dense, dense.features.conv0)
    consumers = importance.consumers(group)
    assert len(consumers) == 3  # two layers of the block and the transition, at their own offsets
    assert importance(group).shape == (dense.features.conv0.out_channels,)


@pytest.mark.parametrize(
    "options",
    [{}, {"global_pruning": True}, {"global_pruning": True, "isomorphic": True}, {"iterative_steps": 2}],
    ids=str,
)
def test_every_way_to_prune(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=5)
    before = copy.deepcopy(model.state_dict())
    importance = ki.IsomorphismImportance(model, pictures(), progress=False)
    example = torch.randn(1, 3, 32, 32)
    macs, _ = tp.utils.count_ops_and_params(model, example)
    pruner = tp.pruner.BasePruner(
        model, example, importance, pruning_ratio=0.5, ignored_layers=[model.fc], round_to=2, **options
    )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model.train()
    for _ in range(options.get("iterative_steps", 1)):
        pruner.step()
    assert model.training
    after, _ = tp.utils.count_ops_and_params(model, example)
    # A ratio of channels: globally, where they are cheapest to lose
    assert after < (0.9 if "global_pruning" in options else 0.6) * macs
    assert model.eval()(example).isfinite().all()
    assert not any(module._forward_pre_hooks for module in model.modules())


def change_statistics(model: nn.Module) -> None:
    model[1].running_mean += torch.linspace(-1, 1, 8)


def replace_data(model: nn.Module) -> None:
    model[0].weight.data = model[0].weight.data.flip(0)


def change_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight[:4] *= 3


@pytest.mark.parametrize("change", [change_statistics, replace_data, change_in_place])
def test_scores_follow_changes_of_the_network(change: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    importance = ki.IsomorphismImportance(model, pictures(), progress=False)
    before = importance(group_of(model, model[0]))
    assert torch.equal(importance(group_of(model, model[0])), before)
    change(model)
    after = importance(group_of(model, model[0]))
    fresh = ki.IsomorphismImportance(model, pictures(), progress=False)
    assert not torch.equal(after, before)
    assert torch.equal(after, fresh(group_of(model, model[0])))


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 1},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 16)},
    "mobilenetv3_small_050": {},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")
def test_architectures(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **ARCHITECTURES[name])
    importance = ki.IsomorphismImportance(model, pictures(8), progress=False, rows=2)
    graph = tp.DependencyGraph().build_dependency(model, torch.randn(1, 3, 32, 32))
    groups = list(
        graph.get_all_groups(ignored_layers=[model.get_classifier()], root_module_types=[nn.Conv2d, nn.Linear])
    )
    scores = [importance(group) for group in groups[:4]]
    finite = [bool(found.isfinite().all()) for found in scores if found is not None]
    assert len(finite) >= 1
    assert all(finite)


class WithSpareLayers(nn.Module):
    """Layers that never run in eval mode: an auxiliary head, and the projection of torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.auxiliary = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3), nn.Conv2d(6, 4, 1)
        self.attention, self.fc = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        feature = self.a(x).relu()
        tokens = self.b(feature).relu().flatten(2).transpose(1, 2)
        tokens, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        out = self.fc(tokens.mean(1))
        return (out, self.auxiliary(feature).mean()) if self.training else out


def test_layers_that_never_run_are_no_consumers() -> None:
    torch.manual_seed(0)
    model = WithSpareLayers().eval()
    importance = ki.IsomorphismImportance(model, [torch.randn(16, 3, 8, 8)], progress=False)
    group = group_of(model, model.a, 8)
    assert [consumer.name for consumer in importance.consumers(group)] == ["b"]
    passes = []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    assert importance(group).shape == (6,)
    assert not passes  # the moments are known
    handle.remove()
    # In training mode the tracer finds the auxiliary head
    both = tp.DependencyGraph().build_dependency(
        model, torch.randn(1, 3, 8, 8), forward_fn=lambda m, x: [m(x), m.auxiliary(m.a(x).relu())], verbose=False
    )
    group = both.get_pruning_group(model.a, tp.prune_conv_out_channels, list(range(6)))
    assert "auxiliary" in {
        name for item in group for name, module in model.named_modules() if module is item.dep.target.module
    }
    assert [consumer.name for consumer in importance.consumers(group)] == ["b"]


class Split(nn.Module):
    """Splits channels among two layers, the first of which runs twice, or among three."""

    def __init__(self, width: int = 8, repeated: bool = True) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(width, width, 1), nn.GELU(), nn.Conv2d(width, 4 * width, 1))
        self.a, self.b = nn.Conv2d(width, width, 1), nn.Conv2d(2 * width, width, 1)
        self.second = self.a if repeated else nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Any:
        widths = [self.a.in_channels, self.second.in_channels, self.b.in_channels]
        first, second, third = self.stem(x).split(widths, 1)
        return self.a(first), self.second(second), self.b(third)


@pytest.mark.parametrize("cumulative", [True, False])
@pytest.mark.parametrize("width", [8, 48])
def test_a_consumer_loses_nothing_by_channels_that_it_does_not_take(cumulative: bool, width: int) -> None:
    torch.manual_seed(0)
    model, images = Split(width).eval(), torch.randn(40, width, 5, 5)
    importance = ki.IsomorphismImportance(model, [images], cumulative=cumulative, per="channel", progress=False)
    graph = tp.DependencyGraph().build_dependency(model, images[:1], verbose=False)
    group = graph.get_pruning_group(model.stem[2], tp.prune_conv_out_channels, list(range(4 * width)))
    consumers = {consumer.name: consumer for consumer in importance.consumers(group)}
    assert [len(consumer.columns) for consumer in consumers.values()] == [4 * width] * 2
    taken = {name: (consumer.columns >= 0).any(1) for name, consumer in consumers.items()}
    assert (int(taken["a"].sum()), int(taken["b"].sum())) == (width, 2 * width)
    scores = importance(group)
    assert scores.shape == (4 * width,)
    assert bool(scores.isfinite().all())
    # Channels that only one layer takes cost what they cost that layer alone
    alone = removal_costs([consumers["b"]], 1e-4)
    assert alone[~taken["b"]].eq(0).all()
    if not cumulative:
        only = taken["b"] & ~taken["a"]
        torch.testing.assert_close(scores[only], alone[only].float())


@pytest.mark.parametrize("repeated", [True, False])
def test_torch_pruning_prunes_split_channels_with_this_importance(repeated: bool) -> None:
    torch.manual_seed(0)
    model, images = Split(8, repeated).eval(), torch.randn(40, 8, 5, 5)
    importance = ki.IsomorphismImportance(model, [images], progress=False)
    pruner = tp.pruner.BasePruner(model, images[:1], importance, pruning_ratio=0.5)
    for group in pruner.step(interactive=True):
        group.prune()
    assert model.stem[0].out_channels == 4
    # torch-pruning cuts no group that would leave a layer without inputs, as that of the repeated one
    assert model.stem[2].out_channels == (32 if repeated else 16)
    assert all(output.isfinite().all() for output in model(images))


def test_channels_of_a_wide_layer_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The moments of a wide layer are those of its channels, with the features of a channel as samples."""
    monkeypatch.setattr("knowiso_train.pruning.importance.WIDE_LAYER_FEATURES", 100)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        model[0].weight[4], model[0].bias[4] = model[0].weight[1], model[0].bias[1]
    images = torch.randn(16, 3, 8, 8)
    importance = ki.IsomorphismImportance(model, [images], progress=False, ridge=1e-8, per="channel")
    group = group_of(model, model[0], 8)
    (consumer,) = importance.consumers(group)
    feature = model[:2](images).detach().double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(consumer.xx, feature.cov(correction=0), rtol=1e-5, atol=1e-7)
    # Its outputs are those of every position of the map with the weights of every position
    weight = model[3].weight.detach().double().view(5, 6, 36)
    outputs = torch.einsum("js,cjp->cps", feature, weight)
    assert consumer.variance == pytest.approx(float(outputs.var(-1, correction=0).sum()), rel=1e-5)
    scores = importance(group)
    assert int(scores.argmin()) in (1, 4)
    assert float(scores.min()) < 1e-4 * float(scores.max())
    # Of the group that the wide layer produces too, its positions count
    later = tp.DependencyGraph().build_dependency(model, images[:1])
    later = later.get_pruning_group(model[3], tp.prune_linear_out_channels, list(range(5)))
    fresh = ki.IsomorphismImportance(model, [images], progress=False)
    fresh(later)
    assert fresh.macs(later) == 6 * 36 + 2
    pruner = tp.pruner.BasePruner(
        model, images[:1], importance, pruning_ratio=0.7, iterative_steps=2, ignored_layers=[model[5]]
    )
    for _ in range(2):
        pruner.step()
    assert model[3].in_features == 36 * model[0].out_channels < 100
    assert model(images).shape == (16, 2)


@pytest.mark.parametrize(("batches", "max_images"), [([24], 512), ([8, 8, 8], 512), ([40], 24), ([20, 20], 24)])
def test_samples_are_divided_by_the_images_that_the_loader_has(batches: list[int], max_images: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))
    images = [torch.randn(count, 3, 12, 12) for count in batches]
    importance = ki.IsomorphismImportance(model, images, max_images=max_images, rows=20, progress=False)
    importance(group_of(model, model[0], 12))
    counts = {name: float(item.moments.count) for name, item in importance._inputs.items()}
    assert counts["0"] == pytest.approx(20 * 27, abs=len(batches) * 24)
    assert counts["2"] == pytest.approx(20 * 54, abs=len(batches) * 24)


def test_batches_that_only_a_forward_of_ones_own_can_read() -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    images = torch.randn(40, 3)
    batches = [({"left": part, "right": part + 1}, torch.zeros(len(part))) for part in images.split(16)]
    layers = {"2": model[2]}
    own = input_moments(model, batches, layers, max_images=30, forward=lambda m, b: m(b[0]["left"]), progress=False)
    plain = input_moments(model, images.split(16), layers, max_images=30, progress=False)
    assert own["2"].moments.count == plain["2"].moments.count == 30
    assert torch.equal(own["2"].moments.xx, plain["2"].moments.xx)


class TestErrors:
    def test_nothing_is_left_behind_after_one(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).train()
        importance = ki.IsomorphismImportance(model, [torch.full((2, 3, 8, 8), float("nan"))], progress=False)
        group = group_of(model, model[0], 8)
        model.train()
        with pytest.raises(NonFiniteError, match="layer '0'"):
            importance(group)
        assert model.training
        assert not any(module._forward_pre_hooks for module in model.modules())

    def test_no_images_and_layers_that_never_run(self) -> None:
        model = nn.ModuleDict({"used": nn.Linear(3, 3), "spare": nn.Linear(3, 3)})
        with pytest.raises(DataError, match="0 images"):
            input_moments(nn.Linear(3, 3), [], {"": nn.Linear(3, 3)}, progress=False)
        with pytest.raises(DataError, match="spare"):
            input_moments(
                model, [torch.zeros(2, 3)], dict(model.items()), forward=lambda m, x: m["used"](x), progress=False
            )

    def test_options(self) -> None:
        with pytest.raises(InputTypeError, match="Module"):
            ki.IsomorphismImportance("resnet", [])  # type: ignore[arg-type]
        for wrong in ({"ridge": -1.0}, {"ridge": math.inf}, {"max_images": 0}, {"rows": 0}, {"per": "layer"}):
            with pytest.raises(OptionError, match=f"{next(iter(wrong))} must be"):
                ki.IsomorphismImportance(nn.Linear(1, 1), [], **wrong)
        with pytest.raises(InputTypeError, match="one group"):
            input_rows(nn.Conv2d(4, 4, 3, groups=4), torch.zeros(1, 4, 4, 4), 3, torch.Generator())
