"""Blocks tuned as a whole: nearer to the original on images of their own, undone where they are not, and nothing left behind."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import knowiso_train as ki
from knowiso_train.errors import NonFiniteError, OptionError
from knowiso_train.pruning import blocks
from tests.helpers.pruned_models import settled


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


class Net(nn.Module):
    """Two blocks, a convolution that is added to what the second one gives, and a classifier."""

    def __init__(self, width: int = 8, inner: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(Block(width, inner), Block(width, inner))
        self.last = nn.Conv2d(width, width, 1)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(x)))
        x = self.last(x) + x
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def pictures(n: int = 192, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def original(seed: int) -> Net:
    torch.manual_seed(seed)
    return settled(Net(), pictures(256, seed=9))


def apart(a: nn.Module, b: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        return float((a(images) - b(images)).square().mean())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_nearer_to_the_original_on_images_that_it_did_not_see(seed: int) -> None:
    model, images, others = original(seed), pictures(seed=seed), pictures(256, seed=100 + seed)
    plain = ki.prune(model, [images], macs=0.5, progress=False)
    tuned = ki.prune(model, [images], macs=0.5, block_steps=40, progress=False)
    assert [fit.name for fit in tuned.report.blocks] == ["blocks.0", "blocks.1"]
    assert not plain.report.blocks
    assert all(fit.after < fit.before for fit in tuned.report.blocks)
    with torch.no_grad():
        of = [network.blocks(F.relu(network.stem(others))) for network in (model, plain.model, tuned.model)]
    assert (of[2] - of[0]).square().mean() < 0.97 * (of[1] - of[0]).square().mean()
    assert {key: value.shape for key, value in tuned.model.state_dict().items()} == {
        k: v.shape for k, v in plain.model.state_dict().items()
    }


def test_the_reported_share_is_that_of_the_network() -> None:
    model, images = original(0), pictures()
    pruned = ki.prune(model, [images], macs=0.5, block_steps=20, progress=False)
    seen: dict[str, Tensor] = {}
    for role, network in (("original", model), ("pruned", pruned.model)):
        network.blocks[1].register_forward_hook(lambda _m, _a, output, role=role: seen.__setitem__(role, output))
        with torch.no_grad():
            network(images)
    held = slice(-round(0.1 * len(images)), None)
    spread = (seen["original"] - seen["original"].mean(0)).square().mean()
    share = (seen["pruned"][held] - seen["original"][held]).square().mean() / spread
    assert pruned.report.blocks[1].after == pytest.approx(float(share), rel=1e-4)


def test_later_layers_aim_at_what_a_tuned_block_leaves_of_the_sum() -> None:
    model, images = original(1), pictures(400)
    small = ki.prune(model, [images], macs=0.5, progress=False)
    network = copy.deepcopy(small.model)
    ki.refit(network, model, [images], kept=small.kept, ridge=1e-9, rows=10_000, block_steps=30, progress=False)
    with torch.no_grad():
        fitted = images[:360]  # the last tenth is held out
        read = network.blocks(F.relu(network.stem(fitted)))
        whole = model.blocks(F.relu(model.stem(fitted)))
        left = (model.last(whole) + whole) - (network.last(read) + read)
        x, y = (value.permute(0, 2, 3, 1).flatten(0, 2).double() for value in (read, left))
        x, y = x - x.mean(0), y - y.mean(0)
        correlation = (x.T @ y).abs() / (x.norm(dim=0)[:, None] * y.norm(dim=0)).clamp_min(1e-12)
    assert float(correlation.max()) < 1e-3  # least squares: what is left has nothing to do with what was read


def test_a_block_that_did_not_get_better_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = original(2), pictures()
    small = ki.prune(model, [images], macs=0.5, progress=False)
    plain, tuned = copy.deepcopy(small.model), copy.deepcopy(small.model)
    ki.refit(plain, model, [images], kept=small.kept, progress=False)
    monkeypatch.setattr(blocks, "BLOCK_LR", 50.0)
    report = ki.refit(tuned, model, [images], kept=small.kept, block_steps=5, progress=False)
    assert [fit.before for fit in report.blocks] == [fit.after for fit in report.blocks]
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in tuned.state_dict().items())


def test_it_leaves_no_hook_and_no_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = original(0), pictures()
    small = ki.prune(model, [images], macs=0.5, progress=False)
    flags = {name: index % 2 == 0 for index, (name, _) in enumerate(small.model.named_parameters())}
    for name, parameter in small.model.named_parameters():
        parameter.requires_grad_(flags[name])
    ki.refit(copy.deepcopy(small.model), model, [images], kept=small.kept, block_steps=2, progress=False)
    monkeypatch.setattr(blocks.torch.optim.Adam, "step", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    network = copy.deepcopy(small.model)
    with pytest.raises(KeyboardInterrupt):
        ki.refit(network, model, [images], kept=small.kept, block_steps=2, progress=False)
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in [*network.modules(), *model.modules()]
    )
    assert {name: parameter.requires_grad for name, parameter in network.named_parameters()} == flags


def test_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = original(0), pictures(64)
    with pytest.raises(OptionError, match="block_steps needs the refit"):
        ki.prune(model, [images], refit=False, block_steps=3, progress=False)
    with pytest.raises(OptionError, match="block_steps must be"):
        ki.prune(model, [images], block_steps=-1, progress=False)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    plain = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)).eval()
    with pytest.raises(OptionError, match="Sequential has no blocks"):
        ki.prune(plain, [images], block_steps=3, progress=False)
    # The choice takes long: it must not be reached
    monkeypatch.setattr("knowiso_train.pruning.api.rank_by_isomorphism", None)
    with pytest.raises(OptionError, match="Sequential has no blocks"):
        ki.prune(plain, [images], block_steps=3, progress=False)
    monkeypatch.undo()
    with pytest.raises(NonFiniteError):
        ki.prune(model, [images * float("nan")], block_steps=3, progress=False)
