"""Pruning and refitting of unusual networks: repeated layers, tied weights, several outputs, hooks, copies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

import knowiso_train as ki
from knowiso_train.errors import InputTypeError, KnowisoWarning, OptionError, ShapeError
from knowiso_train.features import FeatureTaps

IMAGES = torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def little(model: nn.Module, **options: Any) -> Any:
    return ki.prune(model, [IMAGES], progress=False, **options)


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()


class Base(nn.Module):
    """With a plain chain of layers behind whatever comes first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.c, self.d = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.d(torch.relu(self.c(self.first(self.stem(x)))))

    def first(self, x: Tensor) -> Tensor:
        return x


class Looped(Base):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)

    def first(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + self.b(torch.relu(self.a(x)))
        return x


class Tied(Base):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.b.weight = self.a.weight

    def first(self, x: Tensor) -> Tensor:
        return torch.relu(self.b(torch.relu(self.a(x))))


class Several(Base):
    def forward(self, x: Tensor) -> Any:
        feature = torch.relu(self.c(self.stem(x)))
        return self.d(feature), feature


@pytest.mark.parametrize(("kind", "macs"), [(Looped, 0.9), (Tied, 0.7)])
def test_layers_that_run_twice_or_share_weights_are_not_changed(kind: type[Base], macs: float) -> None:
    model = kind()
    pruned = little(model, macs=macs)
    assert {group.name for group in pruned.report.widths if group.after < group.before} == {"c"}
    assert pruned.model.c.out_channels == next(group.after for group in pruned.report.widths if group.name == "c") < 16
    assert pruned.report.macs[1] <= macs * pruned.report.macs[0]
    for name in ("a", "b"):
        assert torch.equal(getattr(pruned.model, name).weight, getattr(model, name).weight)
    assert (pruned.model(IMAGES) - model(IMAGES)).norm() < (model(IMAGES) - model(IMAGES).mean(0)).norm()
    with pytest.raises(OptionError, match="cannot reach"):
        little(model, macs=0.2)


def test_a_width_that_reaches_an_output_is_not_cut() -> None:
    model = Several().eval()
    with pytest.warns(KnowisoWarning, match="layers 'c' of Several keep their widths: a width reaches its output"):
        assert {group.name for group in little(model, macs=0.9).report.widths} == {"stem"}
    with pytest.raises(OptionError, match=r"a width reaches its output.*no channels of 'c' can be removed"):
        little(model, macs=0.5, ignored="stem")
    with pytest.raises(OptionError, match=r"nothing to prune|leaves every width"):
        little(model, macs=0.9, ignored=["c", "stem"])
    # One name, as a text
    assert {group.name for group in little(model, macs=0.9, ignored="c").report.widths} == {"stem"}


def test_ignored_accepts_globs() -> None:
    model = Looped()
    assert "c" in {group.name for group in little(model, macs=0.95).report.widths}
    with pytest.raises(OptionError, match="nothing to prune"):
        little(model, macs=0.95, ignored=["?", "st*"])


def test_open_hooks_of_this_library_raise() -> None:
    model = chain()
    small = little(model, macs=0.7).model
    before = copy.deepcopy(small.state_dict())
    with FeatureTaps(small, ["0"]), pytest.raises(OptionError, match="FeatureTaps or a loss watches"):
        ki.refit(small, model, [IMAGES], progress=False)
    student = copy.deepcopy(model)
    with ki.IsomorphismLoss(student, model, ["2"], example=IMAGES[:4]), pytest.raises(OptionError, match="watches"):
        little(student, macs=0.7)
    handle = small.register_forward_hook(lambda *_: None)  # somebody else's
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())
    ki.refit(small, model, [IMAGES], progress=False)
    handle.remove()


def test_kept_indices_of_another_network_raise() -> None:
    model = chain()
    pruned = little(model, macs=0.7)
    with pytest.raises(ShapeError, match=r"kept names stem\.weight, and the original has no such tensors"):
        ki.refit(pruned.model, model, [IMAGES], kept={**pruned.kept, "stem.weight": [None]}, progress=False)


def test_inference_mode_raises() -> None:
    with torch.inference_mode(), pytest.raises(OptionError, match="inference_mode"):
        little(chain())
    with torch.inference_mode():
        model = chain()
    with pytest.raises(OptionError, match="were made under"):
        little(model)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"min_width": "a"}, "min_width must be a number above 0 to 1, got the string 'a'"),
        ({"round_to": "8"}, "round_to must be an integer at least 1, got the string '8'"),
        ({"max_images": 1.5}, "max_images must be an integer at least 1, got 1.5"),
        ({"block_steps": 2.5}, "block_steps must be an integer at least 0, got 2.5"),
        ({"seed": None}, "seed must be an integer from .*, got None"),
        ({"rows": True}, "rows must be an integer at least 1, got True"),
    ],
    ids=str,
)
def test_arguments_of_wrong_types_raise(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        ki.prune(chain(), [IMAGES], **{"macs": 0.7, "progress": False, **wrong})


def test_images_of_two_sizes_raise() -> None:
    with pytest.raises(ShapeError, match=r"\(3, 12, 12\) and \(3, 14, 14\)"):
        ki.prune(chain(), [IMAGES, torch.randn(4, 3, 14, 14)], progress=False)


def test_batch_norms_without_statistics_stay_as_they_are() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(), nn.Conv2d(8, 4, 3)
    ).eval()
    pruned = little(model, macs=0.7)
    assert pruned.model[1].num_features == pruned.model[0].out_channels < 8
    assert pruned.model[1].running_mean is None


@pytest.mark.parametrize(
    ("importance", "words"),
    [
        (tp.importance.TaylorImportance(), "TaylorImportance cannot score '0'"),
        (tp.importance.MagnitudeImportance, "got <class"),
    ],
)
def test_importances_that_cannot_score_raise(importance: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        little(chain(), importance=importance)


class TestImportance:
    def step(self, model: nn.Sequential, importance: ki.IsomorphismImportance) -> None:
        tp.pruner.BasePruner(model, IMAGES[:1], importance, pruning_ratio=0.5, ignored_layers=[model[2]]).step()

    def test_a_copy_of_the_network_raises(self) -> None:
        model = chain()
        with pytest.raises(OptionError, match="made for another network than the one that is pruned"):
            self.step(copy.deepcopy(model), ki.IsomorphismImportance(model, [IMAGES], progress=False))

    def test_ratios_for_single_layers(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
        importance, ratios = ki.IsomorphismImportance(model, [IMAGES], progress=False), {model[0]: 0.25, model[2]: 0.5}
        tp.pruner.BasePruner(model, IMAGES[:1], importance, pruning_ratio_dict=ratios, ignored_layers=[model[4]]).step()
        assert (model[0].out_channels, model[2].out_channels) == (6, 4)

    def test_few_images_warn(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 4, 3)).eval()
        with pytest.warns(KnowisoWarning, match=r"'2' \(72 samples for 288 features\)"):
            self.step(model, ki.IsomorphismImportance(model, [IMAGES[:2, :, :10, :10]], progress=False))

    def test_moments_are_computed_again_after_training(self) -> None:
        """Half of the channels become copies of the others: after one look more, one of each pair is free."""
        model = chain()
        importance = ki.IsomorphismImportance(model, [IMAGES], progress=False)
        graph = tp.DependencyGraph().build_dependency(model, IMAGES[:1])
        group = graph.get_pruning_group(model[0], tp.prune_conv_out_channels, list(range(8)))
        low, high = importance(group).sort().values.chunk(2)
        assert low.max() > 1e-3 * high.min()
        with torch.no_grad():
            model[0].weight[4:] = model[0].weight[:4]
            model[0].bias[4:] = model[0].bias[:4]
        low, high = importance(group).sort().values.chunk(2)
        assert low.max() < 1e-3 * high.min()

    @pytest.mark.parametrize(
        ("loader", "words"), [(IMAGES, "single batch into a list"), (iter([IMAGES]), "can be read more than once")]
    )
    def test_needs_images_that_can_be_read_again(self, loader: Any, words: str) -> None:
        with pytest.raises(InputTypeError, match=words):
            ki.IsomorphismImportance(chain(), loader)


class Named(Base):
    """Calls its layers by keyword."""

    def forward(self, x: Tensor) -> Any:
        return self.d(input=torch.relu(self.c(input=self.first(self.stem(input=x)))))


def test_layers_may_be_called_by_keyword() -> None:
    model, plain = Named().eval(), Base().eval()
    plain.load_state_dict(model.state_dict())
    found, wanted = little(model, macs=0.6), little(plain, macs=0.6)
    assert [width.after for width in found.report.widths] == [width.after for width in wanted.report.widths]
    torch.testing.assert_close(found.model(IMAGES), wanted.model(IMAGES))


class CachedBias(nn.Module):
    """Add a table of position biases, which eval mode computes once and caches, as timm's LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.cache = nn.Parameter(torch.randn(5)), {}
        self.index: Tensor
        self.register_buffer("index", torch.arange(12 * 12) % 5)

    def train(self, mode: bool = True) -> CachedBias:
        self.cache = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x + self.table[self.index].view(12, 12)
        if "bias" not in self.cache:
            self.cache["bias"] = self.table[self.index].view(12, 12)
        return x + self.cache["bias"]


class Cached(Base):
    """Residual sum behind the cached biases: its operations have other numbers in the first pass."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.e = CachedBias(), nn.Conv2d(8, 8, 3, padding=1)

    def first(self, x: Tensor) -> Tensor:
        x = self.bias(x)
        return x + self.e(x.relu())


@pytest.mark.parametrize("filled", [False, True])
def test_results_cached_in_eval_mode(filled: bool) -> None:
    model = Cached().eval()
    if filled:
        model(IMAGES[:2])  # the cache is part of an autograd graph, which torch does not copy
    pruned = little(model, macs=0.6)
    assert pruned.model.c.out_channels < 16
    assert pruned.report.macs[1] <= 0.6 * pruned.report.macs[0]
    if not filled:
        assert not model.bias.cache or not model.bias.cache["bias"].requires_grad
        copy.deepcopy(model)
    report = ki.refit(pruned.model, model, [IMAGES], kept=pruned.kept, progress=False)
    assert {layer.name for layer in report.layers} == {"stem", "e", "c", "d"}


class Windows(Base):
    """Convolutions on windows of 6 × 6, four for each image."""

    def first(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, c, 2, h // 2, 2, w // 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, h // 2, w // 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        return out.view(len(x), -1)


def test_convolutions_on_windows_of_the_images() -> None:
    model = Windows().eval()
    # Other weights of one layer are found again, as the regression has the patches of its outputs
    changed = copy.deepcopy(model)
    nn.init.normal_(changed.c.weight)
    ki.refit(changed, model, [IMAGES], ridge=0.0, progress=False)
    torch.testing.assert_close(changed.c.weight, model.c.weight, rtol=1e-4, atol=1e-4)
    assert little(model, macs=0.6).model.c.out_channels < 16
