"""`ki.prune` on many architectures: budgets, cuts, attributes and plain modules as results."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch_pruning as tp
from timm.models.mlp_mixer import MlpMixer
from timm.models.vgg import VGG
from torch import Tensor, nn

import knowiso_train as ki
from knowiso_train.errors import OptionError
from knowiso_train.pruning import api
from knowiso_train.pruning.allocation import count_macs
from knowiso_train.pruning.calibration import Calibration
from knowiso_train.pruning.kept_indices import index_kept
from tests.helpers.prune_models import FAMILIES, Chain, chain, family, little, lively
from tests.helpers.pruned_models import network


@pytest.mark.parametrize("name", FAMILIES)
def test_architectures_are_pruned_within_the_budget_and_saved(name: str, tmp_path: Path) -> None:
    model, images = family(name)
    before = copy.deepcopy(model.state_dict())
    pruned = little(model, images)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    macs = [count_macs(net, images[:2]) for net in (model, pruned.model)]
    assert pruned.report.macs == tuple(macs)
    assert 0.5 * macs[0] < macs[1] <= 0.7 * macs[0]
    assert type(pruned.model) is type(model)
    with torch.no_grad():
        out = pruned.model(images)
    assert out.shape == (32, 5)
    assert out.isfinite().all()
    for key, indices in pruned.kept.items():
        assert pruned.model.state_dict()[key].shape == index_kept(model.state_dict()[key], indices).shape
    for path, part in pruned.model.named_modules():
        if hasattr(part, "scale") and isinstance(part.scale, float):
            assert part.scale == model.get_submodule(path).scale
        if hasattr(part, "attn_dim"):
            assert part.qkv.out_features == 3 * part.num_heads * part.head_dim
            assert part.proj.in_features == part.attn_dim == part.num_heads * part.head_dim
    (pruned.model.train()(images).sum()).backward()  # trains on
    pruned.model.eval()
    options = {"num_classes": 5, **FAMILIES[name]}
    pruned.save(tmp_path / "saved", factory=(name, options), example=images[:1].shape)
    with torch.no_grad():
        torch.testing.assert_close(ki.load_pruned(tmp_path / "saved")(images), pruned.model(images))


def test_vgg_with_batch_norm_loses_channels_of_every_convolution() -> None:
    torch.manual_seed(0)
    images = torch.randn(32, 3, 32, 32)
    model = lively(
        VGG([8, "M", 16, "M", 16, "M", 16], num_classes=5, norm_layer=nn.BatchNorm2d, mlp_ratio=0.01), images
    )
    pruned = little(model, images, ignored=["pre_logits"])
    assert [width.name for width in pruned.report.widths] == ["features.12", "features.8", "features.4", "features.0"]
    assert pruned.report.macs[1] <= 0.7 * pruned.report.macs[0]
    assert pruned.model(images).shape == (32, 5)


def test_mixer_loses_inner_widths_of_both_kinds_of_mlp() -> None:
    """Its two kinds of MLP are cut, tokens and channels are streams."""
    torch.manual_seed(0)
    images = torch.randn(32, 3, 32, 32)
    model = lively(MlpMixer(num_classes=5, img_size=32, patch_size=8, num_blocks=2, embed_dim=24), images)
    pruned = little(model, images)
    assert {width.name.split(".", 2)[2] for width in pruned.report.widths} == {"mlp_tokens.fc1", "mlp_channels.fc1"}
    assert pruned.model(images).shape == (32, 5)


def test_grouped_convolutions_of_resnext_lose_the_same_of_every_group() -> None:
    torch.manual_seed(0)
    images = torch.randn(32, 3, 32, 32)
    options: dict[str, Any] = {
        "layers": (1, 1, 1, 1),
        "cardinality": 4,
        "base_width": 32,
        "channels": (16, 16, 32, 32),
        "stem_width": 16,
    }
    model = lively(timm.create_model("resnext50_32x4d", num_classes=5, **options), images)
    pruned = little(model, images, macs=0.9)
    narrower = [
        name
        for name, conv in pruned.model.named_modules()
        if name.endswith("conv2") and conv.out_channels < _out(model, name)
    ]
    assert narrower
    assert all(pruned.model.get_submodule(name).groups == 4 and _out(pruned.model, name) % 4 == 0 for name in narrower)
    assert pruned.report.macs[1] <= 0.9 * pruned.report.macs[0]


def _out(model: nn.Module, name: str) -> int:
    return int(model.get_submodule(name).out_channels)  # type: ignore[arg-type]


def test_labels_are_never_read() -> None:
    class Unreadable:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"a label was asked for {name}")

    model, images = chain()
    batches = [(part, Unreadable()) for part in images.split(32)]
    labeled, plain = (ki.prune(model, given, macs=0.7, progress=False).model for given in (batches, images.split(32)))
    assert all(
        torch.equal(a, b) for a, b in zip(labeled.state_dict().values(), plain.state_dict().values(), strict=True)
    )
    importance = ki.IsomorphismImportance(model, batches, progress=False)
    tp.pruner.BasePruner(model, images[:1], importance, pruning_ratio=0.5, ignored_layers=[model.fc]).step()


@pytest.mark.parametrize("name", ["test_resnet", "vit_tiny_patch16_224", "densenet121"])
def test_pruned_without_refit_is_the_original_that_does_not_read(name: str) -> None:
    """Readers' inputs of what went are set to zero by hand; batch norms and residual streams stay."""
    model, images = family(name)
    pruned = little(model, images, refit=False)
    masked = copy.deepcopy(model)
    kept = {
        key: indices
        for key, indices in pruned.kept.items()
        if key.endswith("weight") and model.state_dict()[key].ndim > 1 and indices[1] is not None
    }
    assert kept
    with torch.no_grad():
        for key, indices in kept.items():
            weight = masked.get_parameter(key)
            gone = [c for c in range(weight.shape[1]) if c not in indices[1]]
            weight[:, gone] = 0
        out, expected = pruned.model(images), masked(images)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)


def test_the_refit_keeps_more_of_the_output_than_no_refit_and_the_choice_more_than_the_worst_one() -> None:
    class Worst(tp.importance.Importance):  # type: ignore[misc]
        def __call__(self, group: Any) -> Tensor:
            norms = [float(weight.norm()) for weight in group[0].dep.target.module.weight]
            return torch.tensor(norms)  # keeps what the loud channels already say

    found: dict[str, list[float]] = {}
    for seed in range(3):
        model, images = chain(seed)
        with torch.no_grad():  # half of the channels are known to the others, and the loudest
            for weight in (model.conv1.weight, model.conv2.weight):
                half = len(weight) // 2
                weight[half:] = 2 * weight[:half] + 0.05 * torch.randn_like(weight[:half])
        lively(model, images)
        others = torch.randn(64, 3, 10, 10)
        for kind, options in {"ours": {}, "bare": {"refit": False}, "worst": {"importance": Worst()}}.items():
            small = ki.prune(model, [images], macs=0.4, progress=False, **options).model
            with torch.no_grad():
                found.setdefault(kind, []).append(
                    float((small(others) - model(others)).square().mean() / model(others).var(0).mean())
                )
    for ours, bare, worst in zip(*found.values(), strict=True):
        assert ours < 0.8 * worst
        assert ours < 0.5 * bare


def test_budgets_minimum_widths_and_rounding_hold() -> None:
    model, images = chain()
    pruned = ki.prune(model, [images], params=0.5, progress=False)
    sizes = [
        sum(m.weight.numel() for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
        for net in (model, pruned.model)
    ]
    assert sizes[1] <= 0.5 * sizes[0]
    pruned = ki.prune(model, [images], macs=0.6, min_width=0.5, round_to=4, progress=False)
    assert {width.name: width.after for width in pruned.report.widths}["conv1"] in (8, 12)
    assert all(width.after >= 0.5 * width.before for width in pruned.report.widths)
    only = ki.prune(model, [images], macs=0.6, ignored=["conv2"], progress=False)
    assert [(width.name, width.before) for width in only.report.widths] == [("conv1", 12)]
    for wrong in ("bn1", ["bn*"]):
        with pytest.raises(OptionError, match=r"'bn.' has no effect, since BatchNorm2d has"):
            ki.prune(model, [images], macs=0.6, ignored=wrong, progress=False)


def test_copies_go_first_and_cost_nothing() -> None:
    model, images = chain()
    with torch.no_grad():
        for tensor in [*model.conv1.parameters(), *model.bn1.parameters(), *model.bn1.buffers()]:
            if tensor.ndim:
                tensor[6:] = tensor[:6]
    pruned = ki.prune(model, [images], macs=0.52, ignored=["conv2"], ridge=1e-9, progress=False)
    with torch.no_grad():
        torch.testing.assert_close(pruned.model(images), model(images), atol=1e-4, rtol=1e-3)
    left = pruned.kept["conv1.weight"][0]
    assert len({c % 6 for c in left}) == len(left) == 6


def test_importances_of_torch_pruning_cut_the_same_share() -> None:
    model, images = chain()
    pruned = ki.prune(model, [images], macs=0.5, importance=tp.importance.MagnitudeImportance(p=2), progress=False)
    shares = [width.after / width.before for width in pruned.report.widths]
    assert max(shares) - min(shares) < 0.1
    norms = model.conv1.weight.flatten(1).norm(dim=1)
    kept = pruned.kept["conv1.weight"][0]
    small = ki.prune(
        model, [images], macs=0.9, importance=tp.importance.RandomImportance(), progress=False, refit=False
    )
    assert small.report.layers == ()
    assert len(kept) < 12
    assert norms[kept].mean() > norms.mean()


def test_training_modes_and_gradient_flags_are_those_of_the_original() -> None:
    model, images = chain()
    model.bn2.train()
    model.fc.requires_grad_(False)
    pruned = ki.prune(model, [images], progress=False)
    assert [m.training for m in pruned.model.modules()] == [m.training for m in model.modules()]
    assert {n: p.requires_grad for n, p in pruned.model.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }


def test_the_report_is_a_table_and_json(tmp_path: Path) -> None:
    import json

    model, images = chain()
    report = ki.prune(model, [images], progress=False).report
    text = str(report)
    for word in ("conv1", "unexplained", "refitted", "multiply-adds", "parameters", "no labels"):
        assert word in text
    report.to_json(tmp_path / "report.json")
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["macs"] == list(report.macs)
    assert {"torch", "knowiso_train"} <= set(found["versions"])


def test_latency_search_continues_until_the_latency_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    # A "network" that says how long it takes
    monkeypatch.setattr(api, "measure_latency", lambda model, images: float(model.weight))
    tried: list[float] = []

    def make(target: float) -> tuple[Any, ...]:
        tried.append(target)
        return (type("Net", (), {"weight": 0.3 + 0.5 * target})(),)

    original: Any = type("Net", (), {"weight": 1.0})()
    images = Calibration([torch.zeros(1, 1)])
    assert api.reach_latency(make, original, images, 0.5)[0].weight <= 0.5
    assert len(tried) > 1
    with pytest.raises(OptionError, match="not reached"):
        api.reach_latency(make, original, images, 0.2)


@pytest.mark.parametrize(
    "time_of", [lambda share: share**2, lambda share: 0.2 if share < 0.6 else share], ids=["square", "step"]
)
def test_latency_search_returns_to_larger_models(monkeypatch: pytest.MonkeyPatch, time_of: Any) -> None:
    monkeypatch.setattr(api, "measure_latency", lambda model, images: float(model.weight))
    tried: dict[float, float] = {}

    def build(target: float) -> tuple[Any, ...]:
        tried[target] = time_of(target)
        return (type("Net", (), {"weight": tried[target]})(), target)

    original: Any = type("Net", (), {"weight": 1.0})()
    chosen = api.reach_latency(build, original, Calibration([torch.zeros(1, 1)]), 0.5)
    assert chosen[1] == max(target for target, taken in tried.items() if taken <= 0.5)
    assert chosen[1] > 0.5  # where it began
    assert len(tried) <= api.MAX_SECANT_STEPS


def test_latency_search_interpolates_between_the_nearest_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the curve t = f², secant steps from 0.5 need three builds, and bisection needs four."""
    monkeypatch.setattr(api, "measure_latency", lambda model, images: float(model.weight))
    fractions: list[float] = []

    def build(fraction: float) -> tuple[Any, ...]:
        fractions.append(fraction)
        return (type("Net", (), {"weight": fraction**2})(),)

    original: Any = type("Net", (), {"weight": 1.0})()
    api.reach_latency(build, original, Calibration([torch.zeros(1, 1)]), 0.5)
    second = 0.5 + (1 - 0.5) * (0.475 - 0.25) / (1 - 0.25)
    third = second + (1 - second) * (0.475 - second**2) / (1 - second**2)
    assert fractions == pytest.approx([0.5, second, third])


def test_a_wrapped_network_is_unwrapped() -> None:
    model, images = chain()
    pruned = ki.prune(nn.DataParallel(model), [images], progress=False)
    assert isinstance(pruned.model, Chain)
    assert {name.partition(".")[0] for name, _ in pruned.model.named_parameters()} == {
        "conv1",
        "bn1",
        "conv2",
        "bn2",
        "fc",
    }


def test_networks_of_the_storage_tests_can_be_pruned() -> None:
    pruned = little(network("test_resnet"), torch.randn(8, 3, 32, 32))
    assert pruned.report.parameters[1] < pruned.report.parameters[0]
